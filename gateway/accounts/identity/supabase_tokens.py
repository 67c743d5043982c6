"""Supabase Auth's access tokens, checked here: by the project's key set, or by its shared secret.

Claims as supabase/auth writes them (``internal/tokens``, August 2026). A key set is fetched as RFC 7517 has it, from
where the project serves it; nothing in a token says where to look for keys.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import jwt
import msgspec

from gateway.accounts.errors import InvalidToken
from gateway.errors import GatewayError

AUDIENCE: Final = "authenticated"
ROLE: Final = "authenticated"
ALGORITHMS: Final = ("ES256", "RS256", "EdDSA")
SHARED: Final = ("HS256",)
MAX_TOKEN: Final = 8_192
LEEWAY: Final = 30.0
"""Seconds by which clocks may differ."""
KEEP: Final = 600.0
"""Seconds for which a key set is good, as Supabase Auth says in ``Cache-Control``."""
PAUSE: Final = 15.0
"""Seconds between two fetches: a token that names an unknown key cannot make the gateway ask for each of it."""


class KeySet(msgspec.Struct, frozen=True):
    """A JWK set as it is served."""

    keys: tuple[msgspec.Raw, ...]


Fetch: TypeAlias = Callable[[], Awaitable[KeySet]]


class TokenConfig(msgspec.Struct, frozen=True):
    """How tokens are checked: by ``secret`` where there is one, else by the key set."""

    secret: str = ""
    issuer: str = ""

    def __repr__(self) -> str:
        """Show no secret."""
        return f"TokenConfig(secret='***', issuer={self.issuer!r})"


class Claims(msgspec.Struct, frozen=True):
    """What a token says, as far as it counts here."""

    sub: str
    role: str
    iat: float
    exp: float
    session_id: str | None = None
    email: str | None = None
    is_anonymous: bool = False


class SupabaseTokens:
    """Checks access tokens; ``fetch`` returns the project's key set, and raises where it cannot be had."""

    def __init__(self, config: TokenConfig, fetch: Fetch, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._fetch = fetch
        self._clock = clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_at = -KEEP
        self._tried_at = -PAUSE
        self._failure: GatewayError | None = None
        self._fetching = asyncio.Lock()

    async def verify(self, token: str) -> Claims:
        """Return what a token says; raises ``InvalidToken``, and what ``fetch`` raises where its key is not known."""
        if len(token) > MAX_TOKEN or not token.isascii():
            raise InvalidToken
        key_id = _key_id(token)
        if self._config.secret:
            return self._checked(token, self._config.secret, SHARED)
        key = await self._key(key_id)
        return self._checked(token, key, (key.algorithm_name,))

    def _checked(self, token: str, key: str | jwt.PyJWK, algorithms: tuple[str, ...]) -> Claims:
        try:
            said = jwt.decode(
                token,
                key,
                algorithms=list(algorithms),
                audience=AUDIENCE,
                issuer=self._config.issuer or None,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "sub", "aud", *(["iss"] if self._config.issuer else [])]},
            )
            claims = msgspec.convert(said, Claims)
        except (jwt.InvalidTokenError, msgspec.ValidationError) as error:
            raise InvalidToken from error
        if claims.role != ROLE or claims.is_anonymous or not claims.sub:
            raise InvalidToken
        return claims

    async def _key(self, key_id: str | None) -> jwt.PyJWK:
        now = self._clock()
        is_known = key_id in self._keys
        if not is_known or now - self._fetched_at >= KEEP:
            await self._refresh(since=now, must=not is_known)
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))  # a key without an id, as a project with one may have it
        key = self._keys.get(key_id)
        if key is not None:
            return key
        if self._failure is not None:
            raise self._failure
        raise InvalidToken

    async def _refresh(self, *, since: float, must: bool) -> None:
        """Fetch the key set, unless that was tried a moment ago; keys that are known outlive a failure."""
        if self._fetching.locked() and not must:
            return
        async with self._fetching:
            if self._tried_at > since or self._clock() - self._tried_at < PAUSE:
                return
            self._tried_at = self._clock()
            try:
                self._keys = _usable(await self._fetch())
            except GatewayError as error:
                self._failure = error
                if must:
                    raise
            else:
                self._failure = None
                self._fetched_at = self._clock()


def _key_id(token: str) -> str | None:
    try:
        header = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError as error:
        raise InvalidToken from error
    key_id = header.get("kid")
    return key_id if isinstance(key_id, str) else None


def _usable(served: KeySet) -> dict[str | None, jwt.PyJWK]:
    """Return the keys that sign tokens by an algorithm of ours, by their ids; others are no business of ours."""
    found: dict[str | None, jwt.PyJWK] = {}
    for entry in served.keys:
        try:
            key = jwt.PyJWK.from_json(bytes(entry).decode())
        except (jwt.PyJWTError, AttributeError):  # what is no object at all has no fields to look for
            continue
        if key.algorithm_name in ALGORITHMS and key.public_key_use in (None, "sig"):
            found[key.key_id] = key
    return found
