import inspect

import pytest

from gateway.shared_state.locks import ThreadLocks
from gateway.shared_state.memory import MemoryLocks


@pytest.mark.parametrize("kind", [MemoryLocks])
def test_each_kind_has_the_whole_protocol(kind: type) -> None:
    asked = {
        name: method for name, method in vars(ThreadLocks).items() if inspect.isfunction(method) and name[0] != "_"
    }
    assert set(asked) == {"acquire", "release", "is_taken", "refuse_waiting"}
    for name, method in asked.items():
        given = inspect.getattr_static(kind, name)
        assert inspect.iscoroutinefunction(given) == inspect.iscoroutinefunction(method), name
        assert list(inspect.signature(given).parameters) == list(inspect.signature(method).parameters), name
