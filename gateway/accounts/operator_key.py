"""Who holds the operator key, for all doors that ask for it: whoever guesses it is slowed down, by address.

An address that has lately sent the right one is asked nothing more than that, so that an operator's programs may send
many requests at once.
"""

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Final

import structlog

from gateway.accounts.brute_force import LoginGuard
from gateway.accounts.recent import Recent
from gateway.client_block import client_block

ACQUAINTANCE: Final = 900.0
"""Seconds for which an address that sent the key is known."""
MOST_KNOWN: Final = 1_000
"""Addresses that are known; they all hold the key."""

_log: Final = structlog.get_logger("gateway.accounts")


class OperatorKey:
    """Knows the operator key; an empty one is nobody's."""

    def __init__(self, key: str, guard: LoginGuard | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._key = key.encode()
        self._guard = guard or LoginGuard()
        self._known: Recent[str, bool] = Recent(MOST_KNOWN, ACQUAINTANCE, now)
        self._one_by_one = asyncio.Lock()

    @property
    def is_set(self) -> bool:
        """Tell whether there is an operator key at all: without one nobody comes in."""
        return bool(self._key)

    async def is_held(self, given: str, address: str) -> bool:
        """Tell whether this is the key; raises ``TooManyAttempts`` where the address has guessed too often.

        From elsewhere the operator comes in all the same.
        """
        if not self.is_set:
            return False
        if hmac.compare_digest(self._key, given.encode("utf-8", "surrogatepass")):
            async with self._one_by_one:  # many at once are no guesses
                await self._let_in(address)
            return True
        async with self._guard.attempt(_account(address), address) as attempt:
            attempt.failed()
            _log.warning("operator key refused", client=address)
        return False

    async def _let_in(self, address: str) -> None:
        place = client_block(address)
        if self._known.get(place):
            return
        async with self._guard.attempt(_account(address), address) as attempt:
            attempt.succeeded()
        self._known.put(place, value=True, ticket=self._known.ticket())


def _account(address: str) -> str:
    return f"operator from {client_block(address)}"
