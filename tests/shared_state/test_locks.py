import inspect

import pytest

from gateway.shared_state.locks import Lease, ThreadLocks
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.redis_locks import RedisLocks
from tests.shared_state.protocols import asked_of


@pytest.mark.parametrize("kind", [MemoryLocks, RedisLocks])
def test_each_kind_has_the_whole_protocol(kind: type) -> None:
    asked = asked_of(ThreadLocks)
    assert set(asked) == {"acquire", "check", "release", "is_taken", "refuse_waiting"}
    for name, method in asked.items():
        given = inspect.getattr_static(kind, name)
        assert inspect.iscoroutinefunction(given) == inspect.iscoroutinefunction(method), name
        assert list(inspect.signature(given).parameters) == list(inspect.signature(method).parameters), name


def test_lease_that_is_lost_is_told_of_once() -> None:
    lease, told = Lease("t"), list[bool]()
    lease.on_lost = lambda: told.append(lease.is_lost)
    lease.lose()
    lease.lose()
    assert told == [True]


def test_leases_of_one_thread_are_two() -> None:
    assert len({Lease("t"), Lease("t")}) == 2
