"""Access tokens: JWTs (RFC 7519, 9068) signed with Ed25519 (RFC 8037), for a quarter of an hour."""

import base64
import hashlib
import time
import uuid
from collections.abc import Callable
from typing import Final

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.accounts.errors import InvalidToken
from gateway.accounts.recent import Recent

LIFETIME: Final = 900
"""Seconds that a token holds."""
LEEWAY: Final = 30
"""Seconds that the clocks of replicas may differ."""
MAX_TOKEN: Final = 2_048
"""Characters: ours have less than 500."""
ISSUER: Final = "letta-gateway"
AUDIENCE: Final = "letta-gateway/api/v1"
TYPE: Final = "at+jwt"
"""What tells an access token from every other JWT (RFC 9068, 2.1)."""
VERIFIED: Final = 10_000
"""Tokens that were found good and are not checked again."""

_ALGORITHM: Final = "EdDSA"


class Claims(msgspec.Struct, frozen=True):
    """What a token says; times are UTC seconds."""

    sub: str
    sid: str
    iat: int
    exp: int
    iss: str
    aud: str
    jti: str


class Jwk(msgspec.Struct, frozen=True, kw_only=True):
    """A public key by which others check tokens (RFC 8037, 2)."""

    kty: str = "OKP"
    crv: str = "Ed25519"
    x: str
    kid: str
    use: str = "sig"
    alg: str = _ALGORITHM


class JwkSet(msgspec.Struct, frozen=True):
    """The public keys (RFC 7517, 5)."""

    keys: tuple[Jwk, ...]


class AccessTokens:
    """Makes and checks access tokens; whether their sessions still stand is somebody else's to say."""

    def __init__(self, key: Ed25519PrivateKey, now: Callable[[], float] = time.time) -> None:
        self._key = key
        self._public = key.public_key()
        self._now = now
        raw = self._public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        self._x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
        self._header = {"alg": _ALGORITHM, "kid": _thumbprint(self._x), "typ": TYPE}
        self._verified: Recent[str, Claims] = Recent(VERIFIED, LIFETIME + LEEWAY)

    def issue(self, user_id: str, session_id: str) -> str:
        """Return a new token of a session."""
        now = int(self._now())
        claims = Claims(user_id, session_id, now, now + LIFETIME, ISSUER, AUDIENCE, uuid.uuid4().hex)
        return jwt.encode(msgspec.structs.asdict(claims), self._key, _ALGORITHM, self._header)

    def claims(self, token: str) -> Claims:
        """Return what a token of ours says; raises ``InvalidToken``."""
        found = self._verified.get(token)
        if found is None:
            ticket = self._verified.ticket()
            found = self._checked(token)
            self._verified.put(token, found, ticket)
        if found.exp + LEEWAY <= self._now():
            raise InvalidToken
        return found

    def jwks(self) -> bytes:
        """Return the public key as a JWK set."""
        return msgspec.json.encode(JwkSet((Jwk(x=self._x, kid=self._header["kid"]),)))

    def _checked(self, token: str) -> Claims:
        if len(token) > MAX_TOKEN or not token.isascii():
            raise InvalidToken
        try:
            # Key, algorithm and header are ours alone: nothing that a token says of them is followed.
            found = jwt.decode_complete(
                token,
                self._public,
                algorithms=[_ALGORITHM],
                issuer=ISSUER,
                audience=AUDIENCE,
                leeway=LEEWAY,
                options={"require": list(Claims.__struct_fields__), "strict_aud": True},
            )
            if found["header"] != self._header:
                raise InvalidToken
            return msgspec.convert(found["payload"], Claims)
        except (jwt.PyJWTError, msgspec.ValidationError):
            raise InvalidToken from None


def _thumbprint(x: str) -> str:
    """Return a key's name (RFC 7638, with RFC 8037, 2): other keys have other names."""
    canonical = msgspec.json.encode({"crv": "Ed25519", "kty": "OKP", "x": x})
    return base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()
