"""How much there was to do in the last minutes, from the gateway's own figures: no Prometheus is needed for it."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import msgspec

from gateway.metrics import Metrics, Totals

PERIOD: Final = 5.0
"""Seconds between two looks at the figures."""
KEPT: Final = 60
"""Intervals that are kept: five minutes."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """What came in an interval, by the second; ``ended_at`` is in UTC seconds."""

    ended_at: float
    requests: float
    errors: float
    chunks: float


class Traffic:
    """Looks at counters that only grow, and keeps how they grew."""

    def __init__(self, metrics: Metrics, now: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._now = now
        self._seen: deque[tuple[float, Totals]] = deque(maxlen=KEPT + 1)
        self.note()

    def note(self) -> None:
        """Look at the figures once."""
        self._seen.append((self._now(), self._metrics.totals()))

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            self.note()

    def intervals(self) -> tuple[Interval, ...]:
        """Return the last intervals, the oldest first; a clock that was put back makes none."""
        return tuple(
            Interval(
                ended_at=end,
                requests=(after.requests - before.requests) / (end - start),
                errors=(after.errors - before.errors) / (end - start),
                chunks=(after.chunks - before.chunks) / (end - start),
            )
            for (start, before), (end, after) in pairwise(self._seen)
            if end > start
        )
