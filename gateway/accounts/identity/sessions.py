"""Sessions of users, and the refresh tokens by which they go on.

A refresh token is 256 random bits with the session's id before them and a check part behind. Only the hashes of those
that may still be used are kept: what bears our check part, names a session that stands and is not kept has been used
before, and ends the session. Somebody has a copy of it, and who is the thief cannot be told.
"""

import hashlib
import secrets as chance
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import msgspec
import structlog
from sqlalchemy import ColumnElement, Row, and_, delete, insert, select, update

from gateway.accounts.errors import AccountBlocked, InvalidRefreshToken
from gateway.accounts.recent import Recent
from gateway.accounts.secrets import CHECK, Secrets
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import refresh_tokens, sessions, user_profiles

LIFETIME: Final = 2_592_000.0
"""Seconds that a session lasts, however often it is refreshed."""
REPEAT: Final = 10.0
"""Seconds within which a used refresh token may be sent again."""
REMEMBERED: Final = 5.0
"""Seconds after which a session is looked at again: so long another gateway's logout may go unnoticed."""
HELD: Final = 20_000
"""Sessions that are remembered."""
PREFIX: Final = "lgr_"
ID: Final = 32
SECRET: Final = 43
"""Characters of 32 random bytes."""

State: TypeAlias = Literal["live", "ended", "blocked"]

_log: Final = structlog.get_logger("gateway.accounts")


class Begun(msgspec.Struct, frozen=True):
    """A session that has begun or goes on, with the token for the next time."""

    id: str
    user_id: str
    email: str
    refresh_token: str


class Sessions:
    """The sessions that stand."""

    def __init__(self, database: Database, secrets: Secrets, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._secrets = secrets
        self._now = now
        self._states: Recent[str, tuple[str, State]] = Recent(HELD, REMEMBERED)

    async def begin(self, connection: Connection, user_id: str, email: str) -> Begun:
        """Begin a session within a transaction."""
        now, session_id = self._now(), uuid.uuid4().hex
        row = {"id": session_id, "user_id": user_id, "created_at": now, "expires_at": now + LIFETIME}
        await connection.execute(insert(sessions), [row])
        return Begun(session_id, user_id, email, await self._new_token(connection, session_id))

    async def refresh(self, token: str) -> Begun:
        """Use a refresh token; raises ``InvalidRefreshToken``, ``AccountBlocked`` and ``StorageUnavailable``.

        Within ``REPEAT`` seconds of its use a token may be sent again, by a client to which the answer was lost. Who
        stole it gains little by that: as soon as one of the new pairs is used all others are used up, and whoever
        sends one of those later ends the session. Two who hold tokens of one session are found out all the same.
        """
        if not self._is_token(token):
            raise InvalidRefreshToken
        session_id, begun = token[len(PREFIX) :][:ID], None
        async with self._database.write() as connection:
            session = await self._standing(connection, session_id)
            if session is not None and session.is_blocked:
                raise AccountBlocked
            if session is not None and await self._use(connection, session_id, token):
                new_token = await self._new_token(connection, session_id)
                begun = Begun(session_id, session.user_id, session.email, new_token)
            else:
                await end_sessions(connection, sessions.c.id == session_id)
        if begun is None:
            self._states.forget(lambda held, _: held == session_id)
            if session is not None:
                _log.warning("refresh token used twice, session ended", user=session.user_id)
            raise InvalidRefreshToken
        return begun

    async def state(self, session_id: str, user_id: str) -> State:
        """Tell how a session of this user stands; raises ``StorageUnavailable``."""
        held = self._states.get(session_id)
        if held is not None and held[0] == user_id:
            return held[1]
        ticket = self._states.ticket()
        state = await self._read_state(session_id, user_id)
        self._states.put(session_id, (user_id, state), ticket)
        return state

    async def end(self, session_id: str, user_id: str) -> None:
        """End a session of this user; that there is none is no error. Raises ``StorageUnavailable``."""
        try:
            async with self._database.write() as connection:
                await end_sessions(connection, and_(sessions.c.id == session_id, sessions.c.user_id == user_id))
        finally:
            self._states.forget(lambda held, _: held == session_id)

    async def end_all(self, connection: Connection, user_id: str) -> None:
        """End all sessions of a user within a transaction; when that is over, ``forget`` them."""
        await end_sessions(connection, sessions.c.user_id == user_id)

    def forget(self, user_id: str) -> None:
        """Look at the user's sessions again before the next answer."""
        self._states.forget(lambda _, held: held[0] == user_id)

    async def purge(self, before: float) -> None:
        """Delete the sessions that expired before that time, in UTC seconds; raises ``StorageUnavailable``."""
        async with self._database.write() as connection:
            await end_sessions(connection, sessions.c.expires_at < before)

    def _is_token(self, token: str) -> bool:
        is_whole = len(token) == len(PREFIX) + ID + SECRET + CHECK and token.startswith(PREFIX)
        return is_whole and self._secrets.is_ours(token)

    async def _new_token(self, connection: Connection, session_id: str) -> str:
        token = self._secrets.with_check(PREFIX + session_id + chance.token_urlsafe(32))
        row = {"hash": _digest(token), "session_id": session_id, "issued_at": self._now(), "used_at": None}
        await connection.execute(insert(refresh_tokens), [row])
        return token

    async def _standing(self, connection: Connection, session_id: str) -> Row[Any] | None:
        """Return a session with its user, and let nobody else refresh it meanwhile."""
        statement = (
            select(sessions.c.user_id, user_profiles.c.email, user_profiles.c.is_blocked)
            .join(user_profiles, user_profiles.c.id == sessions.c.user_id)
            .where(sessions.c.id == session_id, sessions.c.expires_at > self._now())
            .with_for_update(of=sessions)
        )
        return (await connection.execute(statement)).one_or_none()

    async def _use(self, connection: Connection, session_id: str, token: str) -> bool:
        """Use up a token, and all that were given out with it; False where it was used before."""
        now, of_session = self._now(), refresh_tokens.c.session_id == session_id
        statement = select(refresh_tokens.c.used_at).where(of_session, refresh_tokens.c.hash == _digest(token))
        row = (await connection.execute(statement)).one_or_none()
        if row is None:
            return False
        if row.used_at is not None:
            return bool(abs(now - row.used_at) <= REPEAT)
        used = refresh_tokens.c.used_at
        await connection.execute(delete(refresh_tokens).where(of_session, used < now - REPEAT))
        await connection.execute(update(refresh_tokens).where(of_session, used.is_(None)).values(used_at=now))
        return True

    async def _read_state(self, session_id: str, user_id: str) -> State:
        of_user = and_(
            sessions.c.id == session_id, sessions.c.user_id == user_profiles.c.id, sessions.c.expires_at > self._now()
        )
        statement = (
            select(user_profiles.c.is_blocked, sessions.c.id)
            .select_from(user_profiles.outerjoin(sessions, of_user))
            .where(user_profiles.c.id == user_id)
        )
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            return "ended"
        if row.is_blocked:
            return "blocked"
        return "ended" if row.id is None else "live"


async def end_sessions(connection: Connection, which: ColumnElement[bool]) -> None:
    """End sessions within a transaction."""
    # Sessions first, as a refresh takes them: in another order the two could wait for each other.
    await connection.execute(select(sessions.c.id).where(which).with_for_update())
    family = select(sessions.c.id).where(which).scalar_subquery()
    await connection.execute(delete(refresh_tokens).where(refresh_tokens.c.session_id.in_(family)))
    await connection.execute(delete(sessions).where(which))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
