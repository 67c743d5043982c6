"""How often it was tried in vain: what slows down whoever guesses, in this process or for all replicas together."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import msgspec

Key: TypeAlias = tuple[str, ...]


class Pace(msgspec.Struct, frozen=True):
    """How failures are slowed down; times are in seconds."""

    free: int
    """Attempts that may fail one upon the other."""
    first_delay: float
    """What the next one has to wait; the one behind it twice as long."""
    longest_delay: float
    forget: float
    """After so long without a failure they are forgotten."""


class Share(msgspec.Struct, frozen=True):
    """What an attempt is counted under: a key among those of its kind, at their pace."""

    kind: str
    key: Key
    pace: Pace


class Ticket(Protocol):
    """An attempt; ``wait`` is 0, or the seconds until one may be made: then it is none, and not counted."""

    wait: float

    async def end(self, *, is_failure: bool = False, is_success: bool = False) -> None:
        """Count how it ended; a success forgives as many failures under each key as there are under the first."""
        ...


class Tally(Protocol):
    """Counts failures, and knows who is known; what is under way counts as a failure until it has ended."""

    async def begin(self, shares: Sequence[Share]) -> Ticket:
        """Count an attempt that is made now, if it may be made."""
        ...

    async def knows(self, key: Key, seconds: float) -> None:
        """Remember a key for so long."""
        ...

    async def is_known(self, key: Key) -> bool:
        """Tell whether a key is remembered."""
        ...


class Tried(msgspec.Struct):
    """What is counted under one key; times are the guard's."""

    failed: int = 0
    under_way: int = 0
    failed_at: float = 0.0
    begun_at: float = 0.0


class Counts:
    """Failures by key, at one pace; what is under way counts as a failure until it has ended."""

    def __init__(self, pace: Pace, entries: int) -> None:
        self._pace = pace
        self._entries = entries
        self._tried: OrderedDict[Key, Tried] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tried)

    def wait(self, key: Key, now: float) -> float:
        """Return the seconds until the next attempt may be made."""
        found = self._tried.get(key)
        if found is None or self._is_over(found, now):
            return 0.0
        since = max(found.failed_at, found.begun_at) if found.under_way else found.failed_at
        return max(0.0, since + self._delay(found.failed + found.under_way) - now)

    def begin(self, key: Key, now: float) -> None:
        """Count an attempt that is made now."""
        found = self._tried.pop(key, None)
        if found is None or self._is_over(found, now):
            found = Tried()
        found.under_way += 1
        found.begun_at = now
        self._keep(key, found)

    def end(self, key: Key, now: float, *, is_failure: bool) -> None:
        """Count how an attempt ended."""
        found = self._tried.pop(key, None) or Tried()
        found.under_way = max(0, found.under_way - 1)
        if is_failure:
            found.failed += 1
            found.failed_at = now
        if found.failed or found.under_way:
            self._keep(key, found)

    def forgive(self, key: Key, failures: int) -> None:
        """Count so many failures less."""
        found = self._tried.get(key)
        if found is not None:
            found.failed = max(0, found.failed - failures)

    def failed(self, key: Key) -> int:
        """Return how many failures are counted."""
        found = self._tried.get(key)
        return 0 if found is None else found.failed

    def _is_over(self, tried: Tried, now: float) -> bool:
        return not tried.under_way and now - tried.failed_at >= self._pace.forget

    def _keep(self, key: Key, tried: Tried) -> None:
        self._tried[key] = tried
        while len(self._tried) > self._entries:
            self._tried.popitem(last=False)

    def _delay(self, count: int) -> float:
        over = count - self._pace.free
        if over < 0:
            return 0.0
        return min(self._pace.longest_delay, self._pace.first_delay * 2.0 ** min(over, 40))


class MemoryTally:
    """``Tally`` in this process's memory; ``entries`` of each kind are kept, those that were touched last."""

    def __init__(self, entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries = entries
        self._clock = clock
        self.kinds: dict[str, Counts] = {}
        self.known: OrderedDict[Key, float] = OrderedDict()

    async def begin(self, shares: Sequence[Share]) -> Ticket:
        """Count an attempt that is made now, if it may be made."""
        now, counts = self._clock(), [(self._counts(share), share.key) for share in shares]
        wait = max(counted.wait(key, now) for counted, key in counts)
        if wait <= 0:
            for counted, key in counts:
                counted.begin(key, now)
        return MemoryTicket(wait, counts, self._clock)

    async def knows(self, key: Key, seconds: float) -> None:
        """Remember a key for so long."""
        self.known.pop(key, None)
        self.known[key] = self._clock() + seconds
        while len(self.known) > self._entries:
            self.known.popitem(last=False)

    async def is_known(self, key: Key) -> bool:
        """Tell whether a key is remembered."""
        return self.known.get(key, 0.0) > self._clock()

    def _counts(self, share: Share) -> Counts:
        counts = self.kinds.get(share.kind)
        if counts is None:
            counts = self.kinds[share.kind] = Counts(share.pace, self._entries)
        return counts


class MemoryTicket:
    """``Ticket`` of a tally in memory."""

    def __init__(self, wait: float, counts: list[tuple[Counts, Key]], clock: Callable[[], float]) -> None:
        self.wait = wait
        self._counts = counts
        self._clock = clock

    async def end(self, *, is_failure: bool = False, is_success: bool = False) -> None:
        """Count how it ended."""
        for counted, key in self._counts:
            counted.end(key, self._clock(), is_failure=is_failure)
        if is_success:
            first, own_key = self._counts[0]
            own = first.failed(own_key)
            for counted, key in self._counts:
                counted.forgive(key, own)
