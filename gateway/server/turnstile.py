"""Lets a few act in one round of the event loop: a crowd that comes at once does not hold up the streams under way.

It stands where bytes come in: reading five hundred requests that lie ready takes some tens of milliseconds, beginning
to answer them some hundred, and all the while no stream would get its next chunk.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

PER_ROUND: Final = 4
"""Pieces of requests that are read in one round: each takes some tenths of a millisecond until it first waits."""


class Turnstile:
    """Lets some in per round, the others behind them as they came; alone, nobody waits."""

    def __init__(self, per_round: int = PER_ROUND) -> None:
        self._per_round = per_round
        self._free = per_round
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_turning = False

    def enters(self) -> bool:
        """Take a place in this round; False where there is none."""
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        if not self._free or self._waiting:
            return False
        self._free -= 1
        return True

    def wait(self, act: Callable[[], None]) -> None:
        """Have something done when there is a place."""
        self._waiting.append(act)

    def _turn(self) -> None:
        self._free = self._per_round
        try:
            while self._waiting and self._free:
                self._free -= 1
                self._waiting.popleft()()
        finally:
            self._is_turning = self._free < self._per_round
            if self._is_turning:
                asyncio.get_running_loop().call_soon(self._turn)
