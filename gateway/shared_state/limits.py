"""How many requests each caller and each address may make: moving windows, counted in this process."""

import time
from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias

import msgspec
from limits import RateLimitItem
from limits.aio.storage import Storage
from limits.aio.storage.memory import Entry, MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

FORGET: Final = 10.0
"""Seconds between two looks for clients whose windows are over."""

Share: TypeAlias = tuple[RateLimitItem, str]
"""A limit, and whom it holds."""


class Window(msgspec.Struct, frozen=True):
    """How a limit stands: ``wait`` is the seconds until its window is over."""

    limit: RateLimitItem
    is_granted: bool
    remaining: int
    wait: float


class RequestLimits(Protocol):
    """Counts requests."""

    async def take(self, shares: Sequence[Share]) -> list[Window]:
        """Take a place in each window, or in none where one is full: that one is the last of the answer."""
        ...


class Limiter:
    """``RequestLimits`` on one of the library's storages."""

    def __init__(self, storage: Storage) -> None:
        self._limiter = MovingWindowRateLimiter(storage)

    async def take(self, shares: Sequence[Share]) -> list[Window]:
        """Take a place in each window, or in none where one is full: that one is the last of the answer."""
        # All are asked before one is used: whom the one refuses has not used up the other.
        for limit, bucket in shares:
            if not await self._limiter.test(limit, bucket):
                return [await self._window(limit, bucket, is_granted=False)]
        windows = []
        for limit, bucket in shares:
            is_granted = await self._limiter.hit(limit, bucket)
            windows.append(await self._window(limit, bucket, is_granted=is_granted))
            if not is_granted:
                break
        return windows

    async def _window(self, limit: RateLimitItem, bucket: str, *, is_granted: bool) -> Window:
        stats = await self._limiter.get_window_stats(limit, bucket)
        return Window(limit, is_granted, stats.remaining, max(0.0, stats.reset_time - time.time()))


class Windows(MemoryStorage):
    """The library's storage in memory, for moving windows, that forgets now and then.

    The library's own looks through all clients at every request, with a thread for each: from a hundred clients on that
    keeps a processor busy (1 ms per request, measured).
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget_at = 0.0

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Take so many places in a client's window; False where fewer are free."""
        now = time.time()
        if now >= self._forget_at:
            self._forget(now)
        entries = self.events.setdefault(key, [])
        last = limit - amount
        if last < 0 or (last < len(entries) and entries[last].atime >= now - expiry):
            return False
        entries[:0] = [Entry(expiry)] * amount
        return True

    def _forget(self, now: float) -> None:
        self._forget_at = now + FORGET
        for key, entries in list(self.events.items()):
            while entries and entries[-1].expiry <= now:
                entries.pop()
            if not entries:
                del self.events[key]


def memory_limits() -> Limiter:
    """Return limits that this process keeps for itself."""
    return Limiter(Windows())
