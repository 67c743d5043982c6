"""How many requests each caller and each address may make: moving windows, counted in this process."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias

import msgspec
from limits import RateLimitItem

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


class MemoryLimits:
    """``RequestLimits`` in this process's memory; ``clock`` is not the time of day, which may be put back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._taken: dict[Share, deque[float]] = {}
        self._forget_at = 0.0

    def __len__(self) -> int:
        return len(self._taken)

    async def take(self, shares: Sequence[Share]) -> list[Window]:
        """Take a place in each window, or in none where one is full: that one is the last of the answer."""
        now = self._clock()
        if now >= self._forget_at:
            self._forget(now)
        all_taken = []
        for share in shares:
            taken = self._taken.setdefault(share, deque())
            _drop_old(share, taken, now)
            if len(taken) >= share[0].amount:
                return [_window(share, taken, now, is_granted=False)]
            all_taken.append(taken)
        for taken in all_taken:
            taken.append(now)
        return [_window(share, taken, now, is_granted=True) for share, taken in zip(shares, all_taken, strict=True)]

    def _forget(self, now: float) -> None:
        self._forget_at = now + FORGET
        for share, taken in list(self._taken.items()):
            _drop_old(share, taken, now)
            if not taken:
                del self._taken[share]


def _drop_old(share: Share, taken: deque[float], now: float) -> None:
    since = now - share[0].get_expiry()
    while taken and taken[0] <= since:
        taken.popleft()


def _window(share: Share, taken: deque[float], now: float, *, is_granted: bool) -> Window:
    limit, _ = share
    return Window(limit, is_granted, limit.amount - len(taken), taken[0] + limit.get_expiry() - now)
