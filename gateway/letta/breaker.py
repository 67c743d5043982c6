"""What keeps a struggling upstream from being hammered: a circuit breaker and a retry budget.

After Envoy's outlier detection (consecutive gateway failures, ejection time that grows) and its retry budget
(20 % of what is under way, never fewer than three).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from gateway.errors import UpstreamUnavailable

FAILURES_TO_OPEN: Final = 5
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0
RETRY_SHARE: Final = 0.2
LEAST_RETRIES: Final = 3


class Breaker:
    """Refuses requests to an upstream that failed several times in a row, and probes it with one at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._open_until = 0.0
        self._probe_until = 0.0
        self._was_silent = False

    @property
    def is_open(self) -> bool:
        """Tell whether the upstream is taken to be down, until a request succeeds."""
        return self._failures >= FAILURES_TO_OPEN

    @property
    def refuses(self) -> bool:
        """Tell whether a request that came now would be refused."""
        return self._wait() > 0

    def check(self) -> None:
        """Let a request through, or raise ``UpstreamUnavailable`` with the time to wait."""
        if not self.is_open:
            return
        wait = self._wait()
        if wait > 0:
            raise UpstreamUnavailable(retry_after=wait, should_retry=True)
        # This one is the probe: others wait for its outcome, or for as long as a probe may take.
        self._probe_until = self._clock() + FIRST_PAUSE

    def pinged(self, *, answered: bool) -> None:
        """Note how a question fared that was asked past the breaker: an answer after none ends the pause.

        An answer alone does not, as an upstream may answer those and fail at everything else.
        """
        if answered and self._was_silent:
            self._open_until = self._probe_until = 0.0
        self._was_silent = not answered

    def _wait(self) -> float:
        return max(self._open_until, self._probe_until) - self._clock() if self.is_open else 0.0

    def succeeded(self) -> None:
        """Note that the upstream answered."""
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._open_until = self._probe_until = 0.0

    def failed(self) -> None:
        """Note that the upstream could not be reached, or did not answer."""
        if self.is_open and not self._probe_until:
            return  # it was under way when the breaker opened, and says nothing new
        self._failures += 1
        if self._failures > FAILURES_TO_OPEN:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        if self.is_open:
            self._open_until = self._clock() + self._pause
            self._probe_until = 0.0


class RetryBudget:
    """Allows retries up to a share of the requests under way."""

    def __init__(self) -> None:
        self.requests = 0
        self.retries = 0

    def allows(self) -> bool:
        """Tell whether one more retry may be under way."""
        return self.retries < max(LEAST_RETRIES, RETRY_SHARE * self.requests)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as under way."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def retry(self) -> Iterator[None]:
        """Count a retry as under way."""
        self.retries += 1
        try:
            yield
        finally:
            self.retries -= 1
