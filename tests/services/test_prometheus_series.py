"""The figures of a gateway that a hundred thousand strangers have called stay as many as they were."""

import pytest

from tests.middleware.test_metrics import series
from tests.server.people import town
from tests.server.strangers import Strangers


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Ask for nothing: all of this runs in one process."""


@pytest.mark.timeout(1_800)
async def test_hundred_thousand_paths_methods_models_and_users_make_no_new_series() -> None:
    async with town(talks=False) as gateway:
        strangers = Strangers(gateway)
        await strangers.try_everything()
        before = series(gateway)
        await strangers.come(100_000, at_once=8)
        assert series(gateway) == before
        assert strangers.answers > 100_000
        exposed = gateway.exposed()
        assert not [word for word in (*strangers.words, gateway.ann.id, gateway.ann.email) if word in exposed]
