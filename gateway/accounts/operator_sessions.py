"""Sessions of the operator's page: a signed cookie for who knows the operator key.

A session needs no row of its own: whatever gateway shares ``SECRET_KEY`` and the operator key knows it by its
signature, and another operator key ends all of them. One that is ended before its time is written down, and other
gateways see that when they next look.
"""

import hmac
import secrets as chance
import time
from collections.abc import Callable
from typing import Final

import msgspec
from sqlalchemy import bindparam, delete, select

from gateway.accounts.operator_key import OperatorKey
from gateway.audit_log import audit_log
from gateway.errors import AuthenticationFailed, Forbidden
from gateway.storage.engine import Database
from gateway.storage.tables import ended_operator_sessions
from gateway.storage.upsert import upsert

COOKIE: Final = "letta_gateway_operator"
LIFETIME: Final = 43_200.0
"""Seconds after which the key is asked for again: twelve hours, a long day's work."""

_PARTS: Final = 3
_PURGE: Final = delete(ended_operator_sessions).where(ended_operator_sessions.c.expires_at < bindparam("now"))

_log: Final = audit_log()


class OperatorSession(msgspec.Struct, frozen=True):
    """A session that stands; ``csrf_token`` is what its page sends with everything that changes anything."""

    id: str
    csrf_token: str
    expires_at: float


class OperatorSessions:
    """Gives out sessions, and knows them again; ``secret`` is derived from ``SECRET_KEY``."""

    def __init__(
        self,
        database: Database,
        secret: bytes,
        operator_key: str,
        *,
        held: OperatorKey | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._held = held or OperatorKey(operator_key)
        self._key = hmac.digest(secret, operator_key.encode(), "sha256")
        self._now = now
        self._ended: frozenset[str] = frozenset()

    @property
    def has_key(self) -> bool:
        """Tell whether there is an operator key at all: without one nobody comes in."""
        return self._held.is_set

    async def begin(self, given: str, address: str) -> tuple[OperatorSession, str]:
        """Return a new session and its cookie for who knows the key.

        Raises ``Forbidden`` where there is no key, ``AuthenticationFailed`` for another one, ``TooManyAttempts``.
        """
        if not self.has_key:
            raise Forbidden(
                "The page is closed: set LETTA_GATEWAY_OPERATOR_KEY, start the gateway again, then sign in with it."
            )
        if not await self._held.is_held(given, address):
            raise AuthenticationFailed("This is not the operator key. Send that of LETTA_GATEWAY_OPERATOR_KEY.")
        session_id, expires_at = chance.token_urlsafe(18), int(self._now() + LIFETIME)
        _log.info("operator signed in", client=address)
        cookie = f"{session_id}.{expires_at}.{self._signature('session', session_id, str(expires_at))}"
        return self._session(session_id, expires_at), cookie

    def find(self, cookie: str | None) -> OperatorSession | None:
        """Return the session of a cookie; None where it is none of ours, or over."""
        parts = (cookie or "").split(".")
        if len(parts) != _PARTS or not self.has_key:
            return None
        session_id, expires_at, signature = parts
        wanted = self._signature("session", session_id, expires_at)
        if not hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "surrogateescape")):
            return None
        if float(expires_at) <= self._now() or session_id in self._ended:
            return None
        return self._session(session_id, float(expires_at))

    def is_token_of(self, session: OperatorSession, given: str) -> bool:
        """Tell whether a CSRF token is the session's own."""
        return hmac.compare_digest(session.csrf_token.encode(), given.encode("utf-8", "surrogateescape"))

    async def end(self, session: OperatorSession, address: str = "") -> None:
        """End a session before its time; raises ``StorageUnavailable``, and then it has ended here alone."""
        self._ended |= {session.id}
        row = {"id": session.id, "expires_at": session.expires_at}
        async with self._database.write() as connection:
            await connection.execute(_PURGE, {"now": self._now()})
            await connection.execute(upsert(connection.dialect, ended_operator_sessions), [row])
        _log.info("operator signed out", client=address)

    async def load(self) -> None:
        """Look which sessions were ended elsewhere, or before the start; raises ``StorageUnavailable``."""
        async with self._database.read() as connection:
            rows = await connection.execute(select(ended_operator_sessions.c.id))
            self._ended |= frozenset(row.id for row in rows)

    def _session(self, session_id: str, expires_at: float) -> OperatorSession:
        return OperatorSession(session_id, self._signature("csrf", session_id), expires_at)

    def _signature(self, *parts: str) -> str:
        return hmac.digest(self._key, "\n".join(parts).encode("utf-8", "surrogateescape"), "sha256").hex()
