import asyncio
import base64
import hmac
import itertools
import json
import time
from typing import Any, Final

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.accounts.errors import InvalidToken
from gateway.accounts.identity.supabase_tokens import (
    KEEP,
    MAX_TOKEN,
    PAUSE,
    Claims,
    KeySet,
    SupabaseTokens,
    TokenConfig,
)
from gateway.errors import UpstreamUnavailable
from tests.accounts.identity.signed_tokens import (
    ED25519,
    P256,
    RSA,
    SECRET,
    SESSION,
    USER,
    by_key,
    by_secret,
    claims,
    published,
)


class Project:
    """A project's key set, as it is served."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.fetched = 0
        self.is_down = False
        self.now = 1_000.0

    def clock(self) -> float:
        return self.now

    async def fetch(self) -> KeySet:
        self.fetched += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise UpstreamUnavailable
        return msgspec.json.decode(json.dumps({"keys": self.keys}), type=KeySet)

    def tokens(self, config: TokenConfig | None = None) -> SupabaseTokens:
        return SupabaseTokens(config or TokenConfig(), self.fetch, self.clock)


PEM: Final = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def of_a_secret(config: TokenConfig | None = None) -> SupabaseTokens:
    return Project().tokens(config or TokenConfig(SECRET))


async def test_token_by_the_shared_secret() -> None:
    said = await of_a_secret().verify(by_secret())
    assert (said.sub, said.session_id, said.email, said.role) == (USER, SESSION, "ann@example.com", "authenticated")


@pytest.mark.parametrize(
    ("key", "algorithm", "key_id"), [(P256, "ES256", "a"), (RSA, "RS256", "b"), (ED25519, "EdDSA", "c")]
)
async def test_token_by_each_kind_of_key(key: Any, algorithm: str, key_id: str) -> None:
    project = Project(published(RSA, "RS256", "other"), published(key, algorithm, key_id))
    assert (await project.tokens().verify(by_key(key, algorithm, key_id))).sub == USER


YESTERDAY: Final = 1_000_000_000
SOME_DAY: Final = 4_000_000_000


@pytest.mark.parametrize(
    "changed",
    [
        {"exp": None},
        {"iat": None},
        {"sub": None},
        {"aud": None},
        {"role": None},
        {"sub": ""},
        {"sub": 7},
        {"exp": YESTERDAY},
        {"exp": "soon"},
        {"nbf": SOME_DAY},
        {"iat": SOME_DAY},
        {"aud": "anon"},
        {"aud": ["other"]},
        {"role": "anon"},
        {"role": "service_role"},
        {"is_anonymous": True},
        {"session_id": 7},
    ],
    ids=str,
)
async def test_claims_that_do_not_hold(changed: dict[str, Any]) -> None:
    said = {**claims(), **changed}
    token = jwt.encode({name: value for name, value in said.items() if value is not None}, SECRET, "HS256")
    with pytest.raises(InvalidToken):
        await of_a_secret().verify(token)


async def test_api_keys_of_the_project_are_no_access_tokens() -> None:
    for role in ("anon", "service_role"):
        key = jwt.encode({"iss": "supabase", "ref": "project", "role": role, "iat": 1, "exp": 4_000_000_000}, SECRET)
        with pytest.raises(InvalidToken):
            await of_a_secret().verify(key)


async def test_clocks_may_differ_a_little() -> None:
    now = int(time.time())
    assert (await of_a_secret().verify(by_secret(exp=now - 10))).sub == USER
    assert (await of_a_secret().verify(by_secret(iat=now + 10))).sub == USER


@pytest.mark.parametrize(
    ("issuer", "holds"), [("https://project.supabase.co/auth/v1", True), ("https://x", False), (None, False)]
)
async def test_issuer_where_one_is_configured(issuer: str | None, *, holds: bool) -> None:
    tokens = of_a_secret(TokenConfig(SECRET, "https://project.supabase.co/auth/v1"))
    if holds:
        assert (await tokens.verify(by_secret(iss=issuer))).sub == USER
    else:
        with pytest.raises(InvalidToken):
            await tokens.verify(by_secret(iss=issuer))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "a.b.c",
        "sk-lg-something",
        f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims())}.",
        f"{part({'alg': 'None'})}.{part(claims())}.",
        f"{part({'alg': 'HS256'})}.{part(claims())}.",
        by_secret("another-secret-of-the-right-length-of-32"),
        jwt.encode(claims(), SECRET, "HS384"),
        jwt.encode(claims(), SECRET, "HS256", headers={"crit": ["exp"]}),
        by_key(),
        by_secret()[:-2],
        by_secret(user_metadata={"x": "y" * MAX_TOKEN}),
        f"{part([])}.{part(claims())}.x",
        "\ud800.\ud800.\ud800",
        by_secret() + "\n",
    ],
    ids=itertools.count(),  # workers that run tests side by side must call a test the same
)
async def test_what_is_no_token_of_a_secret(token: str) -> None:
    with pytest.raises(InvalidToken):
        await of_a_secret().verify(token)


async def test_public_key_is_no_shared_secret() -> None:
    """The confusion of RS256 with HS256: the attacker signs with what everybody may know."""
    shown = published(RSA, "RS256", "rsa")
    project = Project(shown)
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'})}.{part(claims())}"
    forged = [hmac.digest(secret, signed.encode(), "sha256") for secret in (json.dumps(shown).encode(), PEM, b"")]
    signatures = [base64.urlsafe_b64encode(digest).rstrip(b"=").decode() for digest in forged]
    for token in (*(f"{signed}.{signature}" for signature in signatures), by_secret()):
        with pytest.raises(InvalidToken):
            await project.tokens().verify(token)


async def test_key_is_bound_to_its_own_algorithm() -> None:
    project = Project(published(RSA, "RS256", "rsa"))
    for algorithm in ("RS384", "PS256"):
        with pytest.raises(InvalidToken):
            await project.tokens().verify(by_key(RSA, algorithm, "rsa"))


@pytest.mark.parametrize("key_id", ["../../etc/passwd", "https://evil.example/keys", "' OR 1=1 --", "\x00", ""])
async def test_key_id_is_a_name_and_nothing_else(key_id: str) -> None:
    project = Project(published())
    with pytest.raises(InvalidToken):
        await project.tokens().verify(by_key(key_id=key_id))


async def test_token_says_nothing_of_where_keys_are() -> None:
    project = Project(published())
    evil = {
        "kid": "p256",
        "jku": "https://evil.example/keys",
        "x5u": "https://evil.example",
        "jwk": published(RSA, "RS256"),
    }
    with pytest.raises(InvalidToken):
        await project.tokens().verify(jwt.encode(claims(), RSA, "RS256", headers=evil))


async def test_keys_that_sign_nothing_are_passed_over() -> None:
    unusable: list[Any] = [
        {"kty": "oct", "k": "AAAA", "kid": "shared", "alg": "HS256"},
        {**published(RSA, "RS256", "enc"), "use": "enc"},
        {"kty": "EC", "crv": "P-521", "kid": "odd"},
        {"kty": "??"},
        {},
        "text",
        7,
    ]
    project = Project(*unusable, published())
    tokens = project.tokens()
    assert (await tokens.verify(by_key())).sub == USER
    with pytest.raises(InvalidToken):
        await tokens.verify(by_key(RSA, "RS256", "enc"))


async def test_key_without_an_id_where_it_is_the_only_one() -> None:
    assert (await Project(published(key_id=None)).tokens().verify(by_key(key_id=None))).sub == USER
    assert (await Project(published()).tokens().verify(by_key(key_id=None))).sub == USER
    with pytest.raises(InvalidToken):
        await Project(published(), published(RSA, "RS256", "rsa")).tokens().verify(by_key(key_id=None))


async def test_key_set_is_fetched_once_for_many() -> None:
    project = Project(published())
    tokens = project.tokens()
    await asyncio.gather(*(tokens.verify(by_key()) for _ in range(20)))
    assert project.fetched == 1


async def test_new_key_is_fetched_when_a_token_names_it() -> None:
    project = Project(published())
    tokens = project.tokens()
    await tokens.verify(by_key())
    project.keys.append(published(RSA, "RS256", "new"))
    project.now += PAUSE
    assert (await tokens.verify(by_key(RSA, "RS256", "new"))).sub == USER
    assert project.fetched == 2


async def test_made_up_key_ids_do_not_hammer_the_project() -> None:
    project = Project(published())
    tokens = project.tokens()
    for number in range(50):
        with pytest.raises(InvalidToken):
            await tokens.verify(by_key(key_id=f"made-up-{number}"))
    assert project.fetched == 1


async def test_key_that_is_withdrawn_holds_until_the_set_is_old() -> None:
    project = Project(published())
    tokens = project.tokens()
    await tokens.verify(by_key())
    project.keys.clear()
    project.now += KEEP - 1
    assert (await tokens.verify(by_key())).sub == USER
    project.now += 1
    with pytest.raises(InvalidToken):
        await tokens.verify(by_key())


async def test_project_that_is_down_is_503_and_never_401() -> None:
    project = Project(published())
    project.is_down = True
    tokens = project.tokens()
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable):
            await tokens.verify(by_key())
    assert project.fetched == 1
    project.is_down = False
    project.now += PAUSE
    assert (await tokens.verify(by_key())).sub == USER


async def test_known_keys_outlive_a_project_that_is_down() -> None:
    project = Project(published())
    tokens = project.tokens()
    await tokens.verify(by_key())
    project.is_down = True
    project.now += 10 * KEEP
    assert (await tokens.verify(by_key())).sub == USER
    with pytest.raises(UpstreamUnavailable):
        await tokens.verify(by_key(key_id="unknown"))


def test_secret_is_not_shown() -> None:
    assert SECRET not in repr(TokenConfig(SECRET))
    assert Claims("u", "authenticated", 1, 2).is_anonymous is False
