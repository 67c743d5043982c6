"""The errors that were answered lately: what the log says of each, and nothing that a client wrote."""

from collections import deque
from typing import Final

import msgspec

MOST: Final = 100
"""Errors of each kind that are kept."""
_REFUSED: Final = range(400, 500)


class RecentError(msgspec.Struct, frozen=True, kw_only=True):
    """An error that was answered, as a status or in-band; ``at`` is in UTC seconds, ``route`` the router's pattern."""

    at: float
    code: str
    status: int
    method: str
    route: str
    request_id: str | None
    owner: str | None


class RecentErrors:
    """The newest errors of this gateway, in memory: failures apart from refusals, of which anybody makes many."""

    def __init__(self, most: int = MOST) -> None:
        self._failures: deque[RecentError] = deque(maxlen=most)
        self._refusals: deque[RecentError] = deque(maxlen=most)

    def add(self, error: RecentError) -> None:
        """Keep an error, in the place of the oldest of its kind where there are too many."""
        (self._refusals if error.status in _REFUSED else self._failures).append(error)

    def newest(self) -> tuple[RecentError, ...]:
        """Return the errors, the newest first."""
        return tuple(sorted((*self._failures, *self._refusals), key=lambda error: error.at, reverse=True))
