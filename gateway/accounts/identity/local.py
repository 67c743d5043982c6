"""Users whose passwords and sessions the gateway keeps itself."""

import time
import uuid
from collections.abc import Callable

import msgspec
from sqlalchemy import ColumnElement, delete, select, update

from gateway.accounts.brute_force import Attempt, LoginGuard
from gateway.accounts.errors import AccountBlocked, AccountExists, InvalidCredentials, InvalidToken, SamePassword
from gateway.accounts.identity.protocol import Tokens, Verified
from gateway.accounts.identity.sessions import Begun, Sessions
from gateway.accounts.identity.tokens import LIFETIME, AccessTokens
from gateway.accounts.passwords import Passwords, Verdict, check_strength
from gateway.accounts.profiles import Profile, has_email, insert_profile
from gateway.accounts.secrets import Secrets
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import passwords, user_profiles
from gateway.storage.text import fits
from gateway.storage.upsert import upsert


class Stored(msgspec.Struct, frozen=True):
    """A user as their login finds them; no hash: they have no password here. ``changed_at`` is in UTC seconds."""

    user_id: str
    email: str
    is_blocked: bool
    hash: str | None
    changed_at: float | None


class LocalIdentity:
    """An ``IdentityProvider`` that needs nobody else."""

    def __init__(
        self,
        database: Database,
        secrets: Secrets,
        *,
        hashes: Passwords | None = None,
        guard: LoginGuard | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._hashes = hashes or Passwords()
        self._guard = guard or LoginGuard()
        self._now = now
        self._tokens = AccessTokens(secrets.signing_key, now)
        self._sessions = Sessions(database, secrets, now)

    async def register(self, email: str, password: str, address: str | None) -> Tokens:
        """Make a user with their profile, or log in the one who has this e-mail and password."""
        check_strength(password, email)
        async with self._hashes.place():
            if address is not None:
                await self._guard.registration(address)
            async with self._guard.attempt(email, address) as attempt:
                begun = await self._registered(email, password, attempt)
        return self._given(begun)

    async def login(self, email: str, password: str, address: str) -> Tokens:
        """Begin a session."""
        async with self._hashes.place(), self._guard.attempt(email, address) as attempt:
            stored = await self._by_email(email)
            verdict = await self._verdict(stored, password)
            if stored is None or not verdict.is_right:
                attempt.failed()
                raise InvalidCredentials
            begun = await self._begin(stored, verdict)
            attempt.succeeded()
        return self._given(begun)

    async def refresh(self, refresh_token: str, address: str) -> Tokens:
        """Change a refresh token for a new pair."""
        begun = await self._sessions.refresh(refresh_token)
        await self._guard.knows(begun.email, address)
        return self._given(begun)

    async def logout(self, token: str, verified: Verified, *, everywhere: bool) -> None:
        """End the session of this access token, or all of its user's."""
        _ = token
        if everywhere:
            await self._end_all(verified.user_id)
        elif verified.session_id is not None:
            await self._sessions.end(verified.session_id, verified.user_id)

    async def verify(self, access_token: str) -> Verified:
        """Return whose access token this is; raises ``AccountBlocked`` too."""
        claims = self._tokens.claims(access_token)
        match await self._sessions.state(claims.sid, claims.sub):
            case "live":
                return Verified(claims.sub, claims.sid, None)
            case "blocked":
                raise AccountBlocked
            case "ended":
                raise InvalidToken

    async def change_password(self, token: str, verified: Verified, current: str, new: str) -> Tokens:
        """Change the password, end all sessions and begin a new one."""
        _ = token
        stored = await self._by_id(verified.user_id)
        if stored is None:
            raise InvalidToken
        async with self._hashes.place():
            await self._check_password(stored, current, verified)
            check_strength(new, stored.email, param="new_password")
            if new == current:
                raise SamePassword
            begun = await self._replace(stored, await self._hashes.hash(new))
        return self._given(begun)

    async def set_password(self, user_id: str, new: str) -> bool:
        """Give a user a password by the operator's will, and end their sessions; False where there is no such user.

        Raises ``WeakPassword``, ``PasswordsBusy`` and ``StorageUnavailable``.
        """
        stored = await self._by_id(user_id)
        if stored is None:
            return False
        check_strength(new, stored.email)
        async with self._hashes.place():
            hashed = await self._hashes.hash(new)
        try:
            async with self._database.write() as connection:
                await self._write_password(connection, user_id, hashed)
                await self._sessions.end_all(connection, user_id)
        finally:
            self._sessions.forget(user_id)
        return True

    async def delete(self, user_id: str) -> None:
        """Forget the user's password and sessions."""
        try:
            async with self._database.write() as connection:
                await connection.execute(delete(passwords).where(passwords.c.user_id == user_id))
                await self._sessions.end_all(connection, user_id)
        finally:
            self._sessions.forget(user_id)

    async def set_blocked(self, user_id: str, *, is_blocked: bool) -> None:
        """End the user's sessions and refuse new ones, or allow them again."""
        statement = update(user_profiles).where(user_profiles.c.id == user_id)
        try:
            async with self._database.write() as connection:
                await connection.execute(statement.values(is_blocked=is_blocked, updated_at=self._now()))
                if is_blocked:
                    await self._sessions.end_all(connection, user_id)
        finally:
            self._sessions.forget(user_id)

    async def purge(self, now: float) -> None:
        """Delete the sessions that are over by ``now``, in UTC seconds; raises ``StorageUnavailable``."""
        await self._sessions.purge(now)

    def jwks(self) -> bytes:
        """Return the key by which others can check access tokens."""
        return self._tokens.jwks()

    async def close(self) -> None:
        """Check no more passwords."""
        self._hashes.close()

    async def _registered(self, email: str, password: str, attempt: Attempt) -> Begun:
        """Make a user with their first session, or begin another one of who has this e-mail and password."""
        stored = await self._by_email(email)
        if stored is None:
            begun = await self._make(email, await self._hashes.hash(password))
            if begun is not None:
                attempt.succeeded()
                return begun
            stored = await self._by_email(email)
        verdict = await self._verdict(stored, password)
        if stored is None or not verdict.is_right:
            attempt.failed()
            raise AccountExists
        begun = await self._begin(stored, verdict)
        attempt.succeeded()
        return begun

    async def _check_password(self, stored: Stored, password: str, verified: Verified) -> None:
        """Refuse a wrong password of who has a session already."""
        async with self._guard.session(stored.email, verified.session_id) as attempt:
            if not (await self._verdict(stored, password)).is_right:
                attempt.failed()
                raise InvalidCredentials("The current password is wrong. Check it, then try again.")
            attempt.succeeded()

    async def _verdict(self, stored: Stored | None, password: str) -> Verdict:
        """Look at a password; it takes as long for a user who is not there."""
        return await self._hashes.verify(None if stored is None else stored.hash, password)

    async def _by_email(self, email: str) -> Stored | None:
        return await self._find(has_email(email)) if fits(email) else None

    async def _by_id(self, user_id: str) -> Stored | None:
        return await self._find(user_profiles.c.id == user_id) if fits(user_id) else None

    async def _find(self, who: ColumnElement[bool]) -> Stored | None:
        columns = (user_profiles.c.id, user_profiles.c.email, user_profiles.c.is_blocked)
        statement = (
            select(*columns, passwords.c.hash, passwords.c.changed_at)
            .select_from(user_profiles.outerjoin(passwords, passwords.c.user_id == user_profiles.c.id))
            .where(who)
        )
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else Stored(row.id, row.email, row.is_blocked, row.hash, row.changed_at)

    async def _make(self, email: str, hashed: str) -> Begun | None:
        """Make a user and their first session, all or nothing; None where the e-mail was registered meanwhile."""
        now = self._now()
        profile = Profile(id=str(uuid.uuid4()), email=email, created_at=now, updated_at=now)
        async with self._database.write() as connection:
            if not await insert_profile(connection, profile):
                return None
            await self._write_password(connection, profile.id, hashed)
            return await self._sessions.begin(connection, profile.id, email)

    async def _begin(self, stored: Stored, verdict: Verdict) -> Begun:
        """Begin a session by a password that was found to be right, if it still is."""
        async with self._database.write() as connection:
            await self._check_current(connection, stored)
            if verdict.replacement is not None:
                of_user = passwords.c.user_id == stored.user_id
                await connection.execute(update(passwords).where(of_user).values(hash=verdict.replacement))
            return await self._sessions.begin(connection, stored.user_id, stored.email)

    async def _replace(self, stored: Stored, hashed: str) -> Begun:
        """Write a new password, end all sessions and begin one, all or nothing."""
        try:
            async with self._database.write() as connection:
                await self._check_current(connection, stored)
                await self._write_password(connection, stored.user_id, hashed)
                await self._sessions.end_all(connection, stored.user_id)
                return await self._sessions.begin(connection, stored.user_id, stored.email)
        finally:
            self._sessions.forget(stored.user_id)

    async def _check_current(self, connection: Connection, stored: Stored) -> None:
        """Refuse a password that was changed while its hash was looked at, and a user who was blocked or deleted."""
        statement = (
            select(user_profiles.c.is_blocked, passwords.c.changed_at)
            .join(passwords, passwords.c.user_id == user_profiles.c.id)
            .where(user_profiles.c.id == stored.user_id)
            .with_for_update()
        )
        row = (await connection.execute(statement)).one_or_none()
        if row is None or row.changed_at != stored.changed_at:
            raise InvalidCredentials
        if row.is_blocked:
            raise AccountBlocked

    async def _write_password(self, connection: Connection, user_id: str, hashed: str) -> None:
        row = {"user_id": user_id, "hash": hashed, "changed_at": self._now()}
        await connection.execute(upsert(connection.dialect, passwords), [row])

    async def _end_all(self, user_id: str) -> None:
        try:
            async with self._database.write() as connection:
                await self._sessions.end_all(connection, user_id)
        finally:
            self._sessions.forget(user_id)

    def _given(self, begun: Begun) -> Tokens:
        access_token = self._tokens.issue(begun.user_id, begun.id)
        return Tokens(access_token, begun.refresh_token, LIFETIME, begun.user_id, begun.email)
