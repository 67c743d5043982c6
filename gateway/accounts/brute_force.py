"""Slows down whoever guesses passwords: by account, by address, and all of them together.

After some failures each further one has to wait twice as long as the one before. An address from which the user has
logged in lately has a count of its own: failures from elsewhere do not hold it up, so that nobody can lock a user out.
Counts are kept in memory: each gateway has its own, and begins anew with every start.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import msgspec

from gateway.accounts.errors import TooManyAttempts
from gateway.client_block import client_block

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


class GuardConfig(msgspec.Struct, frozen=True):
    """The paces, and how much is kept."""

    account: Pace = Pace(free=5, first_delay=1.0, longest_delay=900.0, forget=3_600.0)
    known: Pace = Pace(free=10, first_delay=1.0, longest_delay=900.0, forget=3_600.0)
    """For an account from an address that is known to be its user's."""
    address: Pace = Pace(free=30, first_delay=1.0, longest_delay=900.0, forget=3_600.0)
    everybody: Pace = Pace(free=300, first_delay=0.0625, longest_delay=0.25, forget=60.0)
    """For all together, when a thousand machines guess: four each second still get through, users from a new address
    among them."""
    registration: Pace = Pace(free=20, first_delay=2.0, longest_delay=900.0, forget=3_600.0)
    """For users that are made from one address."""
    entries: int = 20_000
    """Accounts and addresses that are counted; those that failed longest ago are forgotten first."""
    acquaintance: float = 2_592_000.0
    """Seconds for which an address is known to be a user's."""


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
    """Who may try a password now."""

    def __init__(self, config: GuardConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config or GuardConfig()
        self._clock = clock
        self._pairs = self._counts(self._config.known)
        self._accounts = self._counts(self._config.account)
        self._addresses = self._counts(self._config.address)
        self._everybody = self._counts(self._config.everybody)
        self._registrations = self._counts(self._config.registration)
        self._known: OrderedDict[Key, float] = OrderedDict()

    @contextmanager
    def attempt(self, account: str, address: str | None) -> Iterator[Attempt]:
        """Let an attempt be made; raises ``TooManyAttempts``. With no address it is the operator's, and not counted.

        It counts as a failure from its begin, so that a thousand at once are no more than a thousand one by one; what
        was none is taken back at the end.
        """
        if address is None:
            yield Attempt()
            return
        pair = (account, client_block(address))
        counts = self._begin(self._counts_of(pair))
        attempt = Attempt()
        try:
            yield attempt
        finally:
            self._end(counts, is_failure=attempt.is_failure)
            if attempt.is_success:
                self._forgive(pair, counts)
                self.knows(account, address)

    def registration(self, address: str) -> None:
        """Count a registration; raises ``TooManyAttempts``."""
        self._end(self._begin([(self._registrations, (client_block(address),))]), is_failure=True)

    def knows(self, account: str, address: str) -> None:
        """Remember that a user has been let in from this address."""
        if not address:
            return  # behind a proxy that does not say for whom it asks
        pair = (account, client_block(address))
        self._known.pop(pair, None)
        self._known[pair] = self._clock() + self._config.acquaintance
        while len(self._known) > self._config.entries:
            self._known.popitem(last=False)

    def _counts_of(self, pair: tuple[str, str]) -> "Shares":
        """Return what an attempt is counted under."""
        if self._known.get(pair, 0.0) > self._clock():
            return [(self._pairs, pair)]
        account, place = pair
        return [
            (self._pairs, pair),
            (self._accounts, (account,)),
            (self._addresses, (place,)),
            (self._everybody, ()),
        ]

    def _begin(self, counts: "Shares") -> "Shares":
        now = self._clock()
        wait = max(counted.wait(key, now) for counted, key in counts)
        if wait > 0:
            raise TooManyAttempts(wait)
        for counted, key in counts:
            counted.begin(key, now)
        return counts

    def _end(self, counts: "Shares", *, is_failure: bool) -> None:
        for counted, key in counts:
            counted.end(key, self._clock(), is_failure=is_failure)

    def _forgive(self, pair: Key, counts: "Shares") -> None:
        """Forget the failures that were the user's own, and leave those from elsewhere."""
        own = self._pairs.failed(pair)
        for counted, key in counts:
            counted.forgive(key, own)

    def _counts(self, pace: Pace) -> Counts:
        return Counts(pace, self._config.entries)


Shares: TypeAlias = list[tuple[Counts, Key]]
