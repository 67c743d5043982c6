"""Users whose passwords and sessions Supabase Auth keeps: an ``IdentityProvider`` over its REST API.

Requests and answers as supabase/auth has them (``internal/api``, August 2026), below ``/auth/v1``. Access tokens are
checked here, so a session that is ended elsewhere holds until its token expires.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final
from urllib.parse import quote

import msgspec
import structlog

from gateway.accounts.brute_force import Attempt, LoginGuard
from gateway.accounts.errors import AccountExists, InvalidCredentials, InvalidToken, PasswordElsewhere
from gateway.accounts.identity.ended_sessions import EndedSessions
from gateway.accounts.identity.protocol import NewUser, Tokens, Verified
from gateway.accounts.identity.supabase_failures import Asked, code_of, refusal
from gateway.accounts.identity.supabase_tokens import KeySet, SupabaseTokens, TokenConfig
from gateway.accounts.profiles import canonical
from gateway.accounts.remote import RemoteConfig, RemoteService, Reply
from gateway.errors import BackendError
from gateway.storage.engine import Database

API_VERSION: Final = "2024-01-01"
LONGEST_TOKEN: Final = 604_800.0
"""Seconds that an access token lasts at most: what Supabase lets a project choose."""
FOREVER: Final = "876000h"
"""A hundred years, in Go's notation: Supabase Auth has bans that end."""
SECRET_KEY_PREFIX: Final = "sb_secret_"  # noqa: S105 - what such keys begin with
ENDED: Final = frozenset({"bad_jwt", "no_authorization", "session_not_found", "user_banned", "user_not_found"})
"""Refusals of a logout that say that there is nothing to log out of."""

_log: Final = structlog.get_logger("gateway.accounts")


class SupabaseConfig(msgspec.Struct, frozen=True):
    """Which project, and the gateway's keys of it; ``service_key`` is needed to delete and to ban users."""

    url: str
    anon_key: str
    service_key: str = ""
    jwt_secret: str = ""
    jwt_issuer: str = ""
    answer: float = 15.0
    """Seconds for an answer."""

    def __repr__(self) -> str:
        """Show no key."""
        return f"SupabaseConfig(url={self.url!r})"


class _Credentials(msgspec.Struct):
    email: str
    password: str


class _ConfirmedUser(msgspec.Struct):
    email: str
    password: str
    email_confirm: bool = True


class _Refresh(msgspec.Struct):
    refresh_token: str


class _NewPassword(msgspec.Struct):
    password: str
    current_password: str


class _GivenPassword(msgspec.Struct):
    password: str


class _Ban(msgspec.Struct):
    ban_duration: str


class _User(msgspec.Struct):
    id: str
    email: str = ""


class _Session(msgspec.Struct):
    access_token: str
    refresh_token: str
    expires_in: int
    user: _User


class _SignUp(msgspec.Struct):
    """A session; or, where the address is to be confirmed first, a user, who is made up where there is one already."""

    access_token: str | None = None
    id: str | None = None
    identities: list[msgspec.Raw] | None = None


class SupabaseIdentity:
    """An ``IdentityProvider`` by Supabase Auth; ``close`` frees its connections."""

    def __init__(
        self,
        config: SupabaseConfig,
        database: Database,
        *,
        guard: LoginGuard | None = None,
        service: RemoteService | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._now = now
        self._service = service or RemoteService(
            RemoteConfig("Supabase Auth", "identity", f"{config.url.rstrip('/')}/auth/v1", answer=config.answer)
        )
        self._tokens = SupabaseTokens(TokenConfig(config.jwt_secret, config.jwt_issuer), self._key_set)
        self._guard = guard or LoginGuard()
        self._ended = EndedSessions(database, LONGEST_TOKEN, now)

    async def close(self) -> None:
        """Close all connections."""
        await self._service.close()

    async def register(self, email: str, password: str, address: str | None) -> Tokens | NewUser:
        """Sign up, or log in the one who has this e-mail and password; the operator's users need not confirm theirs.

        ``NewUser`` where the address is to be confirmed first; Supabase Auth does not say then whether it was known.
        """
        if address is not None:
            await self._guard.registration(address)
        try:
            if address is None and self._config.service_key:
                await self._administrate("POST", "admin/users", _ConfirmedUser(email, password))
                return await self._login(email, password, "")
            reply = await self._ask("register", "POST", "signup", _Credentials(email, password), address or "")
        except AccountExists:
            try:
                async with _noticing(self._guard.attempt(email, address)):
                    return await self._login(email, password, address or "")
            except InvalidCredentials:
                raise AccountExists from None
        made = self._service.decoded(reply, _SignUp)
        if made.access_token is None:
            return NewUser(made.id if made.identities else None, email)
        return self._session(reply, email)

    async def login(self, email: str, password: str, address: str) -> Tokens:
        """Begin a session; raises ``InvalidCredentials``, ``EmailNotConfirmed``, ``AccountBlocked``."""
        async with _noticing(self._guard.attempt(email, address)):
            return await self._login(email, password, address)

    async def _login(self, email: str, password: str, address: str) -> Tokens:
        asked = _Credentials(email, password)
        return self._session(await self._ask("login", "POST", "token?grant_type=password", asked, address), email)

    async def refresh(self, refresh_token: str, address: str) -> Tokens:
        """Change a refresh token for a new pair; raises ``InvalidRefreshToken`` and ``AccountBlocked``."""
        asked = _Refresh(refresh_token)
        tokens = self._session(await self._ask("refresh", "POST", "token?grant_type=refresh_token", asked, address))
        await self._guard.knows(tokens.email, address)
        return tokens

    async def logout(self, token: str, verified: Verified, *, everywhere: bool) -> None:
        """End the session of this access token, or all of its user's; one that is over already is no error."""
        scope = "global" if everywhere else "local"
        reply = await self._service.ask("POST", f"logout?scope={scope}", headers=self._headers(token=token))
        if not _succeeded(reply) and code_of(reply) not in ENDED:
            raise refusal("session", reply)
        await self._end(verified, everywhere=everywhere, at=reply.date)

    async def verify(self, access_token: str) -> Verified:
        """Return whose access token this is; raises ``InvalidToken``, ``UpstreamUnavailable`` for want of keys."""
        claims = await self._tokens.verify(access_token)
        if not await self._ended.goes_on(claims.sub, claims.session_id, claims.iat):
            raise InvalidToken
        return Verified(claims.sub, claims.session_id, claims.email or None, claims.iat)

    async def change_password(self, token: str, verified: Verified, current: str, new: str) -> Tokens:
        """Change the password in a new session, which ends all other ones."""
        email = verified.email or await self._email_of(token)
        async with _noticing(self._guard.session(email, verified.session_id)):
            tokens = await self._login(email, current, "")
        reply = await self._service.ask(
            "PUT", "user", headers=self._headers(token=tokens.access_token), body=_NewPassword(new, current)
        )
        if not _succeeded(reply):
            await self._end_sessions(tokens, "local")
            raise refusal("session", reply)
        await self._end_sessions(tokens, "others")  # as it does by itself, where it is Supabase Auth
        if verified.session_id is not None:
            await self._ended.end(verified.user_id, verified.session_id)
        return tokens

    async def set_password(self, user_id: str, new: str) -> bool:
        """Give a user a password, and end their sessions; raises ``PasswordElsewhere`` without a service key."""
        if not self._config.service_key:
            raise PasswordElsewhere
        reply = await self._administrate("PUT", _user_path(user_id), _GivenPassword(new))
        if not _succeeded(reply):
            return False
        await self._end_all(user_id, reply.date)
        return True

    async def delete(self, user_id: str) -> None:
        """Delete the user; without a service key their account stays at Supabase Auth."""
        if self._config.service_key:
            await self._administrate("DELETE", _user_path(user_id), None)
        else:
            _log.warning("user not deleted at Supabase Auth: SUPABASE_SERVICE_KEY is not set", user=user_id)

    async def set_blocked(self, user_id: str, *, is_blocked: bool) -> None:
        """Refuse the user sessions, or allow them again; without a service key, the gateway alone refuses its own."""
        at = None
        if self._config.service_key:
            ban = _Ban(FOREVER if is_blocked else "none")
            at = (await self._administrate("PUT", _user_path(user_id), ban)).date
        else:
            _log.warning("user not blocked at Supabase Auth: SUPABASE_SERVICE_KEY is not set", is_blocked=is_blocked)
        if is_blocked:
            await self._end_all(user_id, at)

    async def purge(self, now: float) -> None:
        """Forget ended sessions of which no token can hold by ``now``; raises ``StorageUnavailable``."""
        await self._ended.purge(now)

    def jwks(self) -> bytes:
        """Return the empty key set: tokens are Supabase's, and so are the keys."""
        return b'{"keys":[]}'

    async def _administrate(self, method: str, path: str, body: msgspec.Struct | None) -> Reply:
        key = self._config.service_key
        headers = {"apikey": key, "Authorization": f"Bearer {key}", "X-Supabase-Api-Version": API_VERSION}
        reply = await self._service.ask(method, path, headers=headers, body=body)
        if not _succeeded(reply) and code_of(reply) != "user_not_found":
            raise refusal("admin", reply)
        return reply

    async def _ask(self, asked: Asked, method: str, path: str, body: msgspec.Struct, address: str) -> Reply:
        reply = await self._service.ask(method, path, headers=self._headers(address=address), body=body)
        if not _succeeded(reply):
            raise refusal(asked, reply)
        return reply

    async def _key_set(self) -> KeySet:
        reply = await self._service.ask("GET", ".well-known/jwks.json", headers={"apikey": self._config.anon_key})
        if not _succeeded(reply):
            raise self._service.invalid()
        return self._service.decoded(reply, KeySet)

    async def _email_of(self, token: str) -> str:
        reply = await self._service.ask("GET", "user", headers=self._headers(token=token))
        if not _succeeded(reply):
            raise refusal("session", reply)
        return self._service.decoded(reply, _User).email

    async def _end_sessions(self, tokens: Tokens, scope: str) -> None:
        """End this session, which nobody gets, or the user's others; where that fails, they end in their time."""
        headers = self._headers(token=tokens.access_token)
        try:
            reply = await self._service.ask("POST", f"logout?scope={scope}", headers=headers)
        except BackendError as error:
            _log.warning("sessions not ended at Supabase Auth", code=error.code)
            return
        if not _succeeded(reply):
            _log.warning("sessions not ended at Supabase Auth", status=reply.status)

    def _session(self, reply: Reply, email: str | None = None) -> Tokens:
        begun = self._service.decoded(reply, _Session)
        return Tokens(
            access_token=begun.access_token,
            refresh_token=begun.refresh_token,
            expires_in=begun.expires_in,
            user_id=begun.user.id,
            email=email or (canonical(begun.user.email) if begun.user.email else ""),
        )

    async def _end(self, verified: Verified, *, everywhere: bool, at: float | None) -> None:
        if verified.session_id is not None:
            await self._ended.end(verified.user_id, verified.session_id)
        if everywhere:
            await self._end_all(verified.user_id, at)

    async def _end_all(self, user_id: str, at: float | None) -> None:
        """Let nothing count that was issued by then; ``at`` is by Supabase Auth's clock, where it told."""
        await self._ended.end_all(user_id, self._now() if at is None else at)

    def _headers(self, *, address: str = "", token: str = "") -> Mapping[str, str]:
        """Return the headers of a request for a user, who has an access token or comes from an address.

        By the address Supabase Auth limits logins: the first of ``X-Forwarded-For`` where it is told to, of
        ``Sb-Forwarded-For`` where a project allows that, which a project in the cloud takes with a secret key alone.
        """
        key = self._config.anon_key
        headers = {"X-Supabase-Api-Version": API_VERSION}
        if address:
            headers |= {"X-Forwarded-For": address, "Sb-Forwarded-For": address}
            if self._config.service_key.startswith(SECRET_KEY_PREFIX):
                key = self._config.service_key
        return headers | {"apikey": key, "Authorization": f"Bearer {token or key}"}


@asynccontextmanager
async def _noticing(attempting: AbstractAsyncContextManager[Attempt]) -> AsyncIterator[None]:
    """Let an attempt be made, and tell the guard whether the password was right."""
    async with attempting as attempt:
        try:
            yield
        except InvalidCredentials:
            attempt.failed()
            raise
        attempt.succeeded()


def _user_path(user_id: str) -> str:
    return f"admin/users/{quote(user_id, safe='')}"


def _succeeded(reply: Reply) -> bool:
    return 200 <= reply.status < 300  # noqa: PLR2004 - HTTP's own numbers
