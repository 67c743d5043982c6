"""Sessions that ended here before their access tokens expire: elsewhere's tokens are checked without asking anybody."""

import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import delete, select

from gateway.accounts.recent import Recent
from gateway.storage.engine import Database
from gateway.storage.tables import ended_sessions
from gateway.storage.text import fits
from gateway.storage.upsert import upsert

REMEMBERED: Final = 5.0
"""Seconds after which a session is looked at again: so long another gateway's logout may go unnoticed."""
HELD: Final = 20_000
"""Sessions that are remembered."""


class EndedSessions:
    """What has ended, for as long as a token of it could hold; ``lifetime`` is in seconds.

    Every method raises ``StorageUnavailable``.
    """

    def __init__(self, database: Database, lifetime: float, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._lifetime = lifetime
        self._now = now
        self._known: Recent[tuple[str, str | None], float] = Recent(HELD, REMEMBERED)
        """From when on tokens hold, by their user and session, and by the clock of who issues them."""

    async def end(self, user_id: str, session_id: str) -> None:
        """Note that a session ended."""
        if fits(session_id):
            await self._note(session_id, user_id, 0.0)

    async def end_all(self, user_id: str, ended_at: float) -> None:
        """Note that a user's sessions ended, at UTC seconds by the clock of who issues tokens."""
        await self._note(user_id, user_id, ended_at)

    async def goes_on(self, user_id: str, session_id: str | None, issued_at: float) -> bool:
        """Tell whether a token's session goes on, as far as is known here."""
        since = self._known.get((user_id, session_id))
        if since is None:
            ticket = self._known.ticket()
            since = await self._since(user_id, session_id)
            self._known.put((user_id, session_id), since, ticket)
        # Both are whole seconds of one clock: a token of the very second may be the one that comes after.
        return issued_at >= since

    async def purge(self, now: float) -> None:
        """Forget what no token can hold any more by ``now``, in UTC seconds."""
        async with self._database.write() as connection:
            await connection.execute(delete(ended_sessions).where(ended_sessions.c.expires_at <= now))

    async def _since(self, user_id: str, session_id: str | None) -> float:
        names = [name for name in (user_id, session_id) if name is not None and fits(name)]
        columns = ended_sessions.c.id, ended_sessions.c.ended_at
        async with self._database.read() as connection:
            rows = (await connection.execute(select(*columns).where(ended_sessions.c.id.in_(names)))).all()
        ended = {row.id: row.ended_at for row in rows}
        return float("inf") if session_id in ended else float(int(ended.get(user_id, 0.0)))

    async def _note(self, name: str, user_id: str, ended_at: float) -> None:
        row = {"id": name, "user_id": user_id, "ended_at": ended_at, "expires_at": self._now() + self._lifetime}
        try:
            async with self._database.write() as connection:
                await connection.execute(upsert(connection.dialect, ended_sessions), [row])
        finally:
            self._known.forget(lambda known, _: known[0] == user_id)
