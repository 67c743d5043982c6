"""Slows down whoever guesses passwords: by account, by address, and all of them together.

After some failures each further one has to wait twice as long as the one before. An address from which the user has
logged in lately has a count of its own: failures from elsewhere do not hold it up, so that nobody can lock a user out.
Gateways that share a Redis count together; one that is alone counts in memory, and begins anew with every start.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec

from gateway.accounts.errors import TooManyAttempts
from gateway.client_block import client_block
from gateway.shared_state.tally import Key, MemoryTally, Pace, Share, Tally, Ticket


class GuardConfig(msgspec.Struct, frozen=True):
    """The paces, and how much is kept."""

    account: Pace = Pace(free=5, first_delay=1.0, longest_delay=900.0, forget=3_600.0)
    known: Pace = Pace(free=10, first_delay=1.0, longest_delay=900.0, forget=3_600.0)
    """For an account from an address that is known to be its user's."""
    address: Pace = Pace(free=30, first_delay=1.0, longest_delay=900.0, forget=3_600.0)
    everybody: Pace = Pace(free=300, first_delay=0.0625, longest_delay=0.25, forget=60.0)
    """For all together, when a thousand machines guess: four each second still get through, users from a new address
    among them."""
    registration: Pace = Pace(free=100, first_delay=2.0, longest_delay=900.0, forget=3_600.0)
    """For users that are made from one address; none free: as many as there come."""
    entries: int = 20_000
    """Accounts and addresses that are counted; those that failed longest ago are forgotten first."""
    acquaintance: float = 2_592_000.0
    """Seconds for which an address is known to be a user's."""


class Attempt:
    """One attempt to log in: a failure until the password is known to be right, or was not looked at."""

    def __init__(self) -> None:
        self.is_failure = False
        self.is_success = False

    def failed(self) -> None:
        """Note that the password was wrong."""
        self.is_failure = True

    def succeeded(self) -> None:
        """Note that it was right."""
        self.is_success = True


class LoginGuard:
    """Who may try a password now; guards of the same ``whose`` and tally count together."""

    def __init__(
        self,
        config: GuardConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        tally: Tally | None = None,
        whose: str = "user",
    ) -> None:
        self._whose = whose
        self._config = config or GuardConfig()
        self._tally = tally or MemoryTally(self._config.entries, clock)

    @asynccontextmanager
    async def attempt(self, account: str, address: str | None) -> AsyncIterator[Attempt]:
        """Let an attempt be made; raises ``TooManyAttempts``. With no address it is the operator's, and not counted.

        It counts as a failure from its begin, so that a thousand at once are no more than a thousand one by one; what
        was none is taken back at the end.
        """
        if address is None:
            yield Attempt()
            return
        ticket = await self._begin(await self._shares_of(account, client_block(address)))
        attempt = Attempt()
        try:
            yield attempt
        finally:
            await ticket.end(is_failure=attempt.is_failure, is_success=attempt.is_success)
            if attempt.is_success:
                await self.knows(account, address)

    async def registration(self, address: str) -> None:
        """Count a registration; raises ``TooManyAttempts``."""
        if not self._config.registration.free or not address:
            return
        share = self._share("registration", (client_block(address),), self._config.registration)
        await (await self._begin([share])).end(is_failure=True)

    def session(self, account: str, session_id: str | None) -> AbstractAsyncContextManager[Attempt]:
        """Let who has a session try the account's password; raises ``TooManyAttempts``.

        Who holds a stolen access token is counted apart from where the user logs in.
        """
        return self.attempt(account, f"session {session_id}")

    async def knows(self, account: str, address: str) -> None:
        """Remember that a user has been let in from this address."""
        if address:  # none: behind a proxy that does not say for whom it asks
            await self._tally.knows((account, client_block(address)), self._config.acquaintance)

    async def _shares_of(self, account: str, place: str) -> list[Share]:
        """Return what an attempt is counted under, the user's own first."""
        config, pair = self._config, self._share("pair", (account, place), self._config.known)
        if await self._tally.is_known(pair.key):
            return [pair]
        return [
            pair,
            self._share("account", (account,), config.account),
            self._share("address", (place,), config.address),
            self._share("everybody", (), config.everybody),
        ]

    def _share(self, kind: str, key: Key, pace: Pace) -> Share:
        return Share(f"{self._whose} {kind}", key, pace)

    async def _begin(self, shares: list[Share]) -> Ticket:
        ticket = await self._tally.begin(shares)
        if ticket.wait > 0:
            raise TooManyAttempts(ticket.wait)
        return ticket
