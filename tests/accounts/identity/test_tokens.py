import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.accounts.errors import InvalidToken
from gateway.accounts.identity.tokens import AUDIENCE, ISSUER, LEEWAY, LIFETIME, MAX_TOKEN, AccessTokens
from gateway.accounts.secrets import Secrets
from tests.accounts.identities import SECRET_KEY, Clock

KEY = Secrets.from_key(SECRET_KEY).signing_key
USER = "11111111-1111-4111-8111-111111111111"
SESSION = "2" * 32
Claims = dict[str, Any]


@pytest.fixture
def tokens() -> AccessTokens:
    return AccessTokens(KEY)


def public_pem() -> bytes:
    return KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def kid() -> str:
    name: str = jwt.get_unverified_header(AccessTokens(KEY).issue(USER, SESSION))["kid"]
    return name


def claims(**changes: Any) -> Claims:
    """Return what a good token says, changed; ... leaves a claim out."""
    now = int(time.time())
    good = {
        "sub": USER,
        "sid": SESSION,
        "iat": now,
        "exp": now + LIFETIME,
        "iss": ISSUER,
        "aud": AUDIENCE,
        "jti": "3" * 32,
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


def signed(payload: Claims | None = None, *, key: Any = KEY, algorithm: str = "EdDSA", **header: Any) -> str:
    merged = {"kid": kid(), "typ": "at+jwt", **header}
    return jwt.encode(payload or claims(), key, algorithm, {name: value for name, value in merged.items() if value})


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def by_hmac(secret: bytes, **header: Any) -> str:
    """Sign as those do who take the public key for an HMAC secret: PyJWT refuses to help."""
    text = f"{part({'alg': 'HS256', 'typ': 'at+jwt', 'kid': kid(), **header})}.{part(claims())}"
    digest = hmac.digest(secret, text.encode(), hashlib.sha256)
    return f"{text}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def unsigned(alg: str) -> str:
    return f"{part({'alg': alg, 'typ': 'at+jwt', 'kid': kid()})}.{part(claims())}."


def with_signature_of_another(**changes: Any) -> str:
    head, _, signature = signed().split(".")
    return f"{head}.{part(claims(**changes))}.{signature}"


def raw_key() -> bytes:
    return KEY.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


NOW = time.time()
FORGED: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "no token": lambda: "token",
    "dots": lambda: "..",
    "algorithm none": lambda: unsigned("none"),
    "algorithm None": lambda: unsigned("None"),
    "algorithm nOnE": lambda: unsigned("nOnE"),
    "no algorithm": lambda: unsigned(""),
    "EdDSA without a signature": lambda: unsigned("EdDSA"),
    "HS256 by the public key as PEM": lambda: by_hmac(public_pem()),
    "HS256 by the raw public key": lambda: by_hmac(raw_key()),
    "HS256 by the published x": lambda: by_hmac(base64.urlsafe_b64encode(raw_key()).rstrip(b"=")),
    "HS256 by nothing": lambda: by_hmac(b""),
    "HS256 by SECRET_KEY": lambda: by_hmac(SECRET_KEY.encode()),
    "RS256 by another key": lambda: signed(
        key=rsa.generate_private_key(public_exponent=65_537, key_size=2_048), algorithm="RS256"
    ),
    "EdDSA by another key": lambda: signed(key=Ed25519PrivateKey.generate()),
    "another kid": lambda: signed(kid="another"),
    "kid that is a path": lambda: signed(kid="../../../../dev/null"),
    "kid that is SQL": lambda: signed(kid="x' UNION SELECT 'key"),
    "no kid": lambda: signed(kid=None),
    "jku": lambda: signed(jku="http://169.254.169.254/jwks.json"),
    "x5u": lambda: signed(x5u="http://169.254.169.254/cert.pem"),
    "jwk of its own": lambda: signed(jwk={"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}),
    "crit": lambda: signed(crit=["exp"]),
    "type JWT": lambda: signed(typ="JWT"),
    "type refresh": lambda: signed(typ="rt+jwt"),
    "no type": lambda: signed(typ=None),
    "no exp": lambda: signed(claims(exp=...)),
    "exp in the past": lambda: signed(claims(exp=int(NOW) - LEEWAY - 2)),
    "exp that is no number": lambda: signed(claims(exp="never")),
    "exp that is null": lambda: signed(claims(exp=None)),
    "exp that is a fraction": lambda: signed(claims(exp=NOW + 900.5)),
    "nbf in the future": lambda: signed(claims(nbf=int(NOW) + 3_600)),
    "iat in the future": lambda: signed(claims(iat=int(NOW) + 3_600, exp=int(NOW) + 7_200)),
    "no iat": lambda: signed(claims(iat=...)),
    "wrong aud": lambda: signed(claims(aud="another")),
    "aud among others": lambda: signed(claims(aud=[AUDIENCE, "another"])),
    "no aud": lambda: signed(claims(aud=...)),
    "wrong iss": lambda: signed(claims(iss="https://another.example.com")),
    "no iss": lambda: signed(claims(iss=...)),
    "no sub": lambda: signed(claims(sub=...)),
    "sub that is a number": lambda: signed(claims(sub=7)),
    "no sid": lambda: signed(claims(sid=...)),
    "sid that is null": lambda: signed(claims(sid=None)),
    "no jti": lambda: signed(claims(jti=...)),
    "claims of another user": lambda: with_signature_of_another(sub="0" * 36),
    "8 kB": lambda: signed(claims(more="x" * 8_192)),
    "8 kB of nothing": lambda: "x" * 8_192,
    "1 MB of dots": lambda: "." * 1_000_000,
    "a blank behind it": lambda: signed() + " ",
    "another part": lambda: signed() + ".x",
    "not ASCII": lambda: signed()[:-1] + "ä",
    "half a surrogate": lambda: "\ud800.\ud800.\ud800",
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_token_that_is_none_of_ours(tokens: AccessTokens, forge: Callable[[], str]) -> None:
    forged = forge()
    for _ in range(2):  # nor is it taken because it was seen before
        with pytest.raises(InvalidToken):
            tokens.claims(forged)


def test_our_own_token_is_taken(tokens: AccessTokens) -> None:
    before = int(time.time())
    found = tokens.claims(tokens.issue(USER, SESSION))
    assert (found.sub, found.sid, found.iss, found.aud) == (USER, SESSION, ISSUER, AUDIENCE)
    assert before <= found.iat <= time.time()
    assert found.exp == found.iat + 900


def test_token_made_by_hand_as_ours_are_is_taken(tokens: AccessTokens) -> None:
    """So the forged ones are refused for what is wrong with them."""
    assert tokens.claims(signed()).sub == USER
    assert tokens.claims(signed(claims(nbf=int(time.time())))).sub == USER


def test_clocks_of_replicas_may_differ_a_little(tokens: AccessTokens) -> None:
    now = int(time.time())
    assert LEEWAY <= 60
    assert tokens.claims(signed(claims(iat=now + LEEWAY - 5, exp=now + 900))).sub == USER
    assert tokens.claims(signed(claims(exp=now - LEEWAY + 5))).sub == USER


def test_replica_with_the_same_secret_takes_it() -> None:
    replica = AccessTokens(Secrets.from_key(SECRET_KEY).signing_key)
    assert replica.claims(AccessTokens(KEY).issue(USER, SESSION)).sub == USER
    stranger = AccessTokens(Secrets.from_key(SECRET_KEY + "!").signing_key)
    with pytest.raises(InvalidToken):
        stranger.claims(AccessTokens(KEY).issue(USER, SESSION))


def test_token_that_was_seen_before_expires_all_the_same() -> None:
    clock = Clock(time.time())
    tokens = AccessTokens(KEY, clock)
    token = tokens.issue(USER, SESSION)
    assert tokens.claims(token).sub == USER
    clock.now += LIFETIME + LEEWAY
    with pytest.raises(InvalidToken):
        tokens.claims(token)


def test_no_two_tokens_are_alike(tokens: AccessTokens) -> None:
    made = {tokens.issue(USER, SESSION) for _ in range(100)}
    assert len({tokens.claims(token).jti for token in made}) == len(made) == 100
    assert max(map(len, made)) < MAX_TOKEN / 2


def test_nothing_secret_is_in_a_token(tokens: AccessTokens) -> None:
    found = jwt.decode(tokens.issue(USER, SESSION), options={"verify_signature": False})
    assert found.keys() == {"sub", "sid", "iat", "exp", "iss", "aud", "jti"}


def test_others_check_tokens_by_the_published_key(tokens: AccessTokens) -> None:
    published = json.loads(tokens.jwks())
    assert [set(key) for key in published["keys"]] == [{"kty", "crv", "x", "kid", "use", "alg"}]
    token = tokens.issue(USER, SESSION)
    key = jwt.PyJWKSet.from_dict(published)[jwt.get_unverified_header(token)["kid"]]
    assert jwt.decode(token, key, algorithms=["EdDSA"], audience=AUDIENCE, issuer=ISSUER)["sub"] == USER


def test_name_of_the_key_is_its_thumbprint(tokens: AccessTokens) -> None:
    """RFC 8037, appendix A.3, computed apart."""
    (key,) = json.loads(tokens.jwks())["keys"]
    text = f'{{"crv":"Ed25519","kty":"OKP","x":"{key["x"]}"}}'
    expected = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    assert key["kid"] == expected
