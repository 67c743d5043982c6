"""What was read lately, in memory: bounded in number and age, and never older than what ended it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Ticket(NamedTuple):
    """When a read began, and how often something had been forgotten by then."""

    begun: float
    forgotten: int


class Recent(Generic[K, V]):
    """A map that holds at most ``size`` values, each for ``seconds`` from the begin of its reading.

    A value whose reading began before something was forgotten is not held: it may be what was to be forgotten.
    """

    def __init__(self, size: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._seconds = seconds
        self._clock = clock
        self._held: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._forgotten = 0

    def __len__(self) -> int:
        return len(self._held)

    def ticket(self) -> Ticket:
        """Return the ticket of a reading that begins now."""
        return Ticket(self._clock(), self._forgotten)

    def get(self, key: K) -> V | None:
        """Return what is held, unless it is too old."""
        found = self._held.get(key)
        if found is None:
            return None
        until, value = found
        if self._clock() >= until:
            del self._held[key]
            return None
        return value

    def put(self, key: K, value: V, ticket: Ticket) -> None:
        """Hold what was read since the ticket was taken."""
        if ticket.forgotten != self._forgotten:
            return
        self._held.pop(key, None)
        self._held[key] = (ticket.begun + self._seconds, value)
        while len(self._held) > self._size:
            self._held.popitem(last=False)

    def forget(self, is_concerned: Callable[[K, V], bool]) -> None:
        """Hold no more what this concerns, and nothing of what is being read now."""
        self._forgotten += 1
        for key in [key for key, (_, value) in self._held.items() if is_concerned(key, value)]:
            del self._held[key]
