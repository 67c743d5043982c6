import gc
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.letta import rest_turn
from tests.faults.chaos_upstream import BadLetta
from tests.faults.gateways import nothing_left


@pytest.fixture(scope="package", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leave what is loaded out of the collections by which each test sees what it left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for the end of a body that never ends."""
    monkeypatch.setattr(rest_turn, "END_OF_BODY", 0.3)


@pytest.fixture
async def letta() -> AsyncIterator[BadLetta]:
    """Give a Letta that misbehaves when told to; at the end nothing is left of it or of the gateways before it."""
    async with nothing_left(), BadLetta() as bad:
        yield bad
