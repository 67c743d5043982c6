"""How tests run: property tests on the same examples every time, files side by side, the longest way first.

HYPOTHESIS_PROFILE=explore looks further, at random.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

from tests.shared_state.redis_process import RedisProcess

settings.register_profile("gateway", max_examples=60, deadline=None, database=None, derandomize=True)
settings.register_profile("explore", max_examples=2_000, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gateway"))

_LIVE: Final = Path(__file__).parent / "live"
_V1: Final = "v1"
"""The fixture of the V1 server, which takes half a minute to start and most of a gigabyte: one for all workers."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests with one worker, and all that need V1; these go first, as they take longest.

    pytest 9.2 would lose the groups: xdist 3.8 writes them into a field that is no more (pytest-xdist#1386).
    """
    with_v1 = {item.path for item in items if _needs_v1(item)}
    for item in items:
        group = _V1 if item.path in with_v1 else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (item.path not in with_v1, not item.path.is_relative_to(_LIVE)))


def _needs_v1(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and _V1 in [*item.fixturenames, *_params(item)]


def _params(item: pytest.Function) -> list[object]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisProcess]:
    with RedisProcess() as process:
        yield process


@pytest.fixture
def redis(redis_process: RedisProcess) -> RedisProcess:
    with redis_process.client() as client:
        client.flushall()
    return redis_process
