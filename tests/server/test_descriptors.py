import resource
from collections.abc import Callable, Iterator

import pytest

from gateway.server import descriptors

Limit = Callable[[int], None]


@pytest.fixture
def soft_limit() -> Iterator[Limit]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_soft_limit_is_raised_to_the_hard_one(soft_limit: Limit) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft_limit(256)
    assert descriptors.raise_limit() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize("soft", [256, 1_024, 20_000])
def test_turns_and_connections_fit(soft_limit: Limit, soft: int) -> None:
    soft_limit(soft)
    turns, connections = descriptors.turns_that_fit(), descriptors.connections_that_fit()
    assert turns + connections + descriptors.RESERVE <= soft
    assert connections > turns, "whoever asks for /health while all turns are taken"
    assert turns >= (soft - 128) // 2


def test_a_few_turns_always(soft_limit: Limit) -> None:
    soft_limit(100)
    assert descriptors.turns_that_fit() == descriptors.SMALLEST
