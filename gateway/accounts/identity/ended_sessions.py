"""Sessions that ended here before their access tokens expire: elsewhere's tokens are checked without asking anybody."""

import time
from collections.abc import Callable
from typing import Final, TypeAlias

MOST: Final = 100_000
"""Sessions, and users, that are remembered: over this, those that ended first are forgotten."""

_Entries: TypeAlias = dict[str, tuple[float, float]]
"""When something ended, by the clock of who issues tokens, and until when that matters, by ours; oldest first."""


class EndedSessions:
    """What has ended in this process, for as long as a token of it could hold; ``lifetime`` is in seconds."""

    def __init__(self, lifetime: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime = lifetime
        self._clock = clock
        self._sessions: _Entries = {}
        self._users: _Entries = {}

    def end(self, session_id: str) -> None:
        """Note that a session ended."""
        self._note(self._sessions, session_id, 0.0)

    def end_all(self, user_id: str, ended_at: float) -> None:
        """Note that a user's sessions ended, at UTC seconds by the clock of who issues tokens."""
        self._note(self._users, user_id, ended_at)

    def goes_on(self, user_id: str, session_id: str | None, issued_at: float) -> bool:
        """Tell whether a token's session goes on, as far as is known here."""
        if session_id is not None and session_id in self._sessions:
            return False
        ended_at, _ = self._users.get(user_id, (0.0, 0.0))
        # Both are whole seconds of one clock: a token of the very second may be the one that comes after.
        return issued_at >= int(ended_at)

    def _note(self, entries: _Entries, key: str, ended_at: float) -> None:
        now = self._clock()
        entries.pop(key, None)
        while entries and (len(entries) >= MOST or next(iter(entries.values()))[1] <= now):
            del entries[next(iter(entries))]
        entries[key] = (ended_at, now + self._lifetime)
