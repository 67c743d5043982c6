"""Users register, log in, go on and log out, and everything that somebody else tries meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import jwt
import msgspec
import pytest

from gateway import keys
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.tokens import AUDIENCE, ISSUER
from gateway.accounts.passwords import Passwords
from gateway.storage.engine import Database
from tests.accounts.faults import Faults, FaultyIdentity
from tests.accounts.identities import CHEAP, EMAIL, PASSWORD, SECRET_KEY
from tests.accounts.identity.test_tokens import FORGED
from tests.server.running import JSON, Running, serving, settings
from tests.server.wire import Answer, Headers

ADA: Final = {"email": EMAIL, "password": PASSWORD}
NEW_PASSWORD: Final = "another fine password"
MALLORY: Final = "127.0.0.66"
"""An address of this machine that is not where Ada logs in."""


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    """Serve with API keys, as on a network, and no proxy that is trusted."""
    chosen = settings(
        api_keys=("sk-one",),
        operator_key="sk-operator",
        trusted_networks=(),
        registration="open",
        secret_key=SECRET_KEY,
    )
    async with serving(chosen) as running:
        hash_cheaply(running)
        yield running


def hash_cheaply(gateway: Running) -> None:
    identity = gateway.app[keys.IDENTITY]
    assert isinstance(identity, LocalIdentity)
    identity._hashes = Passwords(CHEAP)


async def post(
    gateway: Running, path: str, body: object, headers: Headers = (), *, source: str | None = None
) -> Answer:
    given = dict(headers)
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return await gateway.ask("POST", f"/api/v1/auth/{path}", {**JSON, **given}, content, source=source)


async def register(gateway: Running, email: str = EMAIL, **more: Any) -> dict[str, Any]:
    answer = await post(gateway, "register", {"email": email, "password": PASSWORD, **more})
    assert answer.status == 201
    session: dict[str, Any] = answer.json()
    return session


def bearer(session: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {session['access_token']}"}


async def me(gateway: Running, session: dict[str, Any]) -> Answer:
    return await gateway.ask("GET", "/api/v1/auth/me", bearer(session))


# The way of a user ---------------------------------------------------------------------------------------------------


async def test_registration_begins_a_session(gateway: Running) -> None:
    answer = await post(gateway, "register", {**ADA, "name": "Ada"})
    assert (answer.status, answer.header("content-type")) == (201, "application/json")
    assert answer.header("cache-control") == "no-store"
    session = answer.json()
    assert session.keys() == {"user", "access_token", "refresh_token", "token_type", "expires_in"}
    assert (session["token_type"], session["expires_in"]) == ("bearer", 900)
    user = session["user"]
    assert user.keys() == {"id", "email", "name", "metadata", "agent", "created_at"}
    assert (user["email"], user["name"], user["metadata"]) == (EMAIL, "Ada", {})
    again = await me(gateway, session)
    assert (again.status, again.json()) == (200, user)


async def test_login_and_refresh_answer_as_registration_does(gateway: Running) -> None:
    first = await register(gateway)
    login = await post(gateway, "login", ADA)
    refreshed = await post(gateway, "refresh", {"refresh_token": login.json()["refresh_token"]})
    assert login.status == refreshed.status == 200
    sessions = [first, login.json(), refreshed.json()]
    for session in sessions:
        assert session.keys() == first.keys()
        assert session["user"] == first["user"]
        assert (await me(gateway, session)).status == 200
    for token in ("access_token", "refresh_token"):
        assert len({session[token] for session in sessions}) == 3


async def test_same_registration_again_is_a_login(gateway: Running) -> None:
    first, again = await register(gateway), await register(gateway)
    assert again["user"] == first["user"]
    assert (await me(gateway, first)).status == 200


async def test_address_is_the_same_however_it_is_written(gateway: Running) -> None:
    first = await register(gateway)
    again = await post(gateway, "login", {"email": "  ADA@Example.com ", "password": PASSWORD})
    assert again.json()["user"] == first["user"]


async def test_logout(gateway: Running) -> None:
    one, other = await register(gateway), (await post(gateway, "login", ADA)).json()
    answer = await post(gateway, "logout", {}, bearer(one))
    assert (answer.status, answer.body) == (204, b"")
    await is_over(gateway, one)
    assert (await me(gateway, other)).status == 200


@pytest.mark.parametrize("body", [b"", b"{}", b'{"everywhere": false}'])
async def test_logout_needs_no_body(gateway: Running, body: bytes) -> None:
    one = await register(gateway)
    headers = {**bearer(one), **(JSON if body else {})}
    assert (await gateway.ask("POST", "/api/v1/auth/logout", headers, body)).status == 204
    await is_over(gateway, one)


async def test_logout_everywhere(gateway: Running) -> None:
    one, other = await register(gateway), (await post(gateway, "login", ADA)).json()
    bob = await register(gateway, "bob@example.com")
    assert (await post(gateway, "logout", {"everywhere": True}, bearer(one))).status == 204
    await is_over(gateway, one)
    await is_over(gateway, other)
    assert (await me(gateway, bob)).status == 200


async def test_changed_password(gateway: Running) -> None:
    one, other = await register(gateway), (await post(gateway, "login", ADA)).json()
    change = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    answer = await post(gateway, "password", change, bearer(one))
    assert answer.status == 200
    assert answer.json()["user"] == one["user"]
    await is_over(gateway, one)
    await is_over(gateway, other)
    assert (await me(gateway, answer.json())).status == 200
    assert (await post(gateway, "login", ADA)).code == "invalid_credentials"
    assert (await post(gateway, "login", {**ADA, "password": NEW_PASSWORD})).status == 200


async def is_over(gateway: Running, session: dict[str, Any]) -> None:
    """See that neither token of a session is good for anything."""
    for path in ("auth/me", "user/profile", "chat/history", "agent/status"):
        answer = await gateway.ask("GET", f"/api/v1/{path}", bearer(session))
        assert (answer.status, answer.code) == (401, "invalid_token"), path
        assert answer.header("www-authenticate") == "Bearer"
    refreshed = await post(gateway, "refresh", {"refresh_token": session["refresh_token"]})
    assert (refreshed.status, refreshed.code) == (401, "invalid_refresh_token")


async def test_blocked_user_is_told_so(gateway: Running) -> None:
    one = await register(gateway)
    assert (await me(gateway, one)).status == 200
    operator = {"Authorization": "Bearer sk-operator"}
    user = f"/api/v1/admin/users/{one['user']['id']}"
    assert (await gateway.ask("POST", f"{user}/block", operator)).status == 200
    for answer in (await me(gateway, one), await post(gateway, "login", ADA), await post(gateway, "register", ADA)):
        assert (answer.status, answer.code) == (403, "account_blocked")
    assert (await gateway.ask("POST", f"{user}/unblock", operator)).status == 200
    await is_over(gateway, one)
    assert (await post(gateway, "login", ADA)).status == 200


async def test_others_check_tokens_by_the_published_keys(gateway: Running) -> None:
    answer = await gateway.ask("GET", "/.well-known/jwks.json")
    assert (answer.status, answer.header("cache-control")) == (200, "public, max-age=600")
    token = (await register(gateway))["access_token"]
    key = jwt.PyJWKSet.from_dict(answer.json())[jwt.get_unverified_header(token)["kid"]]
    assert jwt.decode(token, key, algorithms=["EdDSA"], audience=AUDIENCE, issuer=ISSUER)["sub"]
    assert b'"d"' not in answer.body


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("register", {}, "email"),
        ("register", {"email": EMAIL}, "password"),
        ("register", {"email": None, "password": PASSWORD}, "email"),
        ("register", {"email": [EMAIL], "password": PASSWORD}, "email"),
        ("register", {"email": EMAIL, "password": 12345678}, "password"),
        ("register", {"email": EMAIL, "password": "short"}, "password"),
        ("register", {"email": EMAIL, "password": "x" * 1_025}, "password"),
        ("register", {"email": EMAIL, "password": EMAIL}, "password"),
        ("register", {"email": "nobody", "password": PASSWORD}, "email"),
        ("register", {"email": "a@b\r\nBcc: all@example.com", "password": PASSWORD}, "email"),
        ("register", {"email": "\u202eada@example.com", "password": PASSWORD}, "email"),
        ("register", {"email": "x" * 300 + "@example.com", "password": PASSWORD}, "email"),
        ("register", {"email": "x" * 1_000_000, "password": PASSWORD}, "email"),
        ("register", {**ADA, "name": "Ada\nLovelace"}, "name"),
        ("register", {**ADA, "name": "x" * 1_000_000}, "name"),
        ("register", {**ADA, "name": 7}, "name"),
        ("login", {"email": EMAIL}, "password"),
        ("login", {"email": "", "password": ""}, "email"),
        ("login", {"email": EMAIL, "password": True}, "password"),
        ("refresh", {}, "refresh_token"),
        ("refresh", {"refresh_token": None}, "refresh_token"),
        ("refresh", {"refresh_token": 7}, "refresh_token"),
    ],
)
async def test_field_that_is_missing_or_wrong(gateway: Running, path: str, body: object, param: str) -> None:
    answer = await post(gateway, path, body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert PASSWORD.encode() not in answer.body
    assert len(answer.body) < 1_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("logout", {"everywhere": "yes"}, "everywhere"),
        ("password", {"current_password": PASSWORD}, "new_password"),
        ("password", {"new_password": NEW_PASSWORD}, "current_password"),
        ("password", {"current_password": PASSWORD, "new_password": "short"}, "new_password"),
        ("password", {"current_password": PASSWORD, "new_password": "x" * 1_025}, "new_password"),
    ],
)
async def test_field_of_a_user_that_is_missing_or_wrong(gateway: Running, path: str, body: object, param: str) -> None:
    session = await register(gateway)
    answer = await post(gateway, path, body, bearer(session))
    assert (answer.status, answer.error["param"]) == (400, param)
    assert (await me(gateway, session)).status == 200


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"x"', b"{", b'{"email":"a@b","email":"c@d"}', b"\xff"])
@pytest.mark.parametrize("path", ["register", "login", "refresh"])
async def test_body_that_is_no_object(gateway: Running, path: str, body: bytes) -> None:
    answer = await post(gateway, path, body)
    assert (answer.status, answer.code) == (400, "invalid_json")


async def test_more_than_is_asked_for_is_ignored(gateway: Running) -> None:
    """S4: nobody makes themselves somebody else, or more than they are."""
    grabbed: dict[str, Any] = {
        "id": "00000000-0000-4000-8000-000000000000",
        "user_id": "00000000-0000-4000-8000-000000000000",
        "role": "admin",
        "is_admin": True,
        "is_blocked": False,
        "budget": {"amount": "1000000", "period": "total"},
        "budget_micros": 10**12,
        "letta_agent_id": "agent-00000000-0000-4000-8000-000000000001",
        "litellm_key": "sk-mine",
        "metadata": {"role": "admin"},
        "created_at": 0,
    }
    session = await register(gateway, **grabbed)
    user = session["user"]
    assert user["id"] != grabbed["id"]
    assert (user["metadata"], user["created_at"] > 1_700_000_000) == ({}, True)
    assert (user["agent"] or {}).get("id") != grabbed["letta_agent_id"]
    profile = await gateway.app[keys.PROFILES].find(user["id"])
    assert profile is not None
    assert (profile.budget, profile.litellm_key, profile.is_blocked) == (None, None, False)
    answer = await gateway.ask("GET", "/api/v1/auth/me", {**bearer(session), "X-User-Id": grabbed["user_id"]})
    assert answer.json() == user


@pytest.mark.parametrize("word", ["' OR '1'='1", "'; DROP TABLE user_profiles; --", "%", "_", "\\", '"', "$1", ":p"])
async def test_words_of_sql_are_words(gateway: Running, word: str) -> None:
    """B15."""
    await register(gateway)
    address = f"a{word}b@example.com".replace(" ", "")
    assert (await post(gateway, "login", {"email": address, "password": PASSWORD})).status == 401
    assert (await post(gateway, "login", {"email": EMAIL, "password": word})).status == 401
    assert (await post(gateway, "refresh", {"refresh_token": word})).status == 401
    answer = await gateway.ask("GET", "/api/v1/auth/me", {"Authorization": f"Bearer {word}"})
    assert (answer.status, answer.code) == (401, "invalid_token")
    hostile = await post(gateway, "register", {"email": address, "password": PASSWORD})
    assert hostile.status == 201
    assert (await post(gateway, "login", ADA)).status == 200


async def test_address_that_is_taken(gateway: Running) -> None:
    first = await register(gateway)
    answer = await post(gateway, "register", {"email": EMAIL, "password": NEW_PASSWORD, "name": "Mallory"})
    assert (answer.status, answer.code, answer.error["param"]) == (409, "account_exists", "email")
    assert first["user"]["id"].encode() not in answer.body
    assert (await me(gateway, first)).json() == first["user"]


async def test_wrong_password_and_unknown_user_get_the_same_answer(gateway: Running) -> None:
    await register(gateway)
    wrong = await post(gateway, "login", {"email": EMAIL, "password": "a wrong password"})
    unknown = await post(gateway, "login", {"email": "nobody@example.com", "password": PASSWORD})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    assert wrong.body == unknown.body
    headers = [{name for name, _ in answer.headers} for answer in (wrong, unknown)]
    assert headers[0] == headers[1]


async def test_wrong_current_password(gateway: Running) -> None:
    session = await register(gateway)
    change = {"current_password": "a wrong password", "new_password": NEW_PASSWORD}
    answer = await post(gateway, "password", change, bearer(session))
    assert (answer.status, answer.code) == (401, "invalid_credentials")
    assert (await me(gateway, session)).status == 200
    assert (await post(gateway, "login", ADA)).status == 200


async def test_closed_registration() -> None:
    async with serving(settings(registration="closed")) as gateway:
        answer = await post(gateway, "register", ADA)
        assert (answer.status, answer.code) == (403, "registration_closed")
        assert (await post(gateway, "login", ADA)).code == "invalid_credentials"


async def test_registration_that_is_to_be_confirmed_first(gateway: Running) -> None:
    gateway.app[keys.REGISTRATION]._identity = FaultyIdentity(Faults(), confirms=True)
    answer = await post(gateway, "register", ADA)
    assert answer.status == 202
    assert answer.json().keys() == {"message"}


async def test_dead_database_is_never_a_401(gateway: Running) -> None:
    session = await register(gateway)
    profile = await gateway.ask("GET", "/api/v1/auth/me", bearer(session))
    assert profile.status == 200
    await Database.close(gateway.app[keys.DATABASE])  # and its folder is left for its own end
    refresh = {"refresh_token": session["refresh_token"]}
    for answer in (
        await post(gateway, "login", ADA),
        await post(gateway, "register", {**ADA, "email": "bob@example.com"}),
        await post(gateway, "refresh", refresh),
        await me(gateway, session),
    ):
        assert (answer.status, answer.code) == (503, "storage_unavailable")
        assert answer.header("retry-after")
    assert (await gateway.ask("GET", "/.well-known/jwks.json")).status == 200


# Who comes by what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
async def test_token_that_is_none_of_ours(gateway: Running, forge: Any) -> None:
    """S6, by the wire."""
    forged = forge().encode("utf-8", "surrogatepass")
    answer = await gateway.ask("GET", "/api/v1/auth/me", [("Authorization", b"Bearer " + forged)])
    if len(forged) < 8_000:
        assert (answer.status, answer.code) == (401, "invalid_token" if forged else "invalid_api_key")
    else:
        assert answer.status == 400, "it is no head of a request"


async def test_no_credential_but_a_users_token_opens_the_platform(gateway: Running) -> None:
    """S19, one way round."""
    session = await register(gateway)
    created = await gateway.ask(
        "POST", "/api/v1/user/keys", {**JSON, **bearer(session)}, msgspec.json.encode({"name": "laptop"})
    )
    personal = created.json()["key"]
    for credential in ("sk-one", "sk-operator", personal, session["refresh_token"], session["user"]["id"]):
        answer = await gateway.ask("GET", "/api/v1/auth/me", {"Authorization": f"Bearer {credential}"})
        assert (answer.status, answer.code) == (401, "invalid_token")
    assert (await gateway.ask("GET", "/api/v1/auth/me")).status == 401


async def test_users_token_opens_nothing_else(gateway: Running) -> None:
    """S19, the other way round."""
    session = await register(gateway)
    assert (await gateway.ask("GET", "/v1/models", bearer(session))).status == 401
    for path in ("/api/v1/admin/users", "/api/v1/admin/usage", "/metrics"):
        answer = await gateway.ask("GET", path, bearer(session))
        assert (answer.status, answer.code) == (403, "forbidden")


# Guessing ------------------------------------------------------------------------------------------------------------


async def guess(gateway: Running, number: int, **headers: str) -> Answer:
    wrong = {"email": EMAIL, "password": f"a wrong guess {number}"}
    return await post(gateway, "login", wrong, headers, source=MALLORY)


async def test_address_that_is_made_up_changes_nothing(gateway: Running) -> None:
    """S8, S9: a client that is no trusted proxy may write what it likes."""
    await register(gateway)
    found = []
    for number in range(500):
        hop = f"10.{number >> 8}.{number & 255}.1"
        found.append(await guess(gateway, number, **{"X-Forwarded-For": hop, "X-Real-IP": hop, "Forwarded": hop}))
    assert [answer.status for answer in found[:5]] == [401] * 5
    assert {answer.status for answer in found[5:]} <= {401, 429}
    assert sum(answer.status == 401 for answer in found) <= 5 + 4, "four more in the first fifteen seconds"
    refused = [answer for answer in found if answer.status == 429]
    assert {answer.code for answer in refused} == {"too_many_attempts"}
    assert all(int(answer.header("retry-after") or 0) >= 1 for answer in refused)


async def test_user_is_not_locked_out_by_who_guesses(gateway: Running) -> None:
    await register(gateway)
    while (await guess(gateway, 0)).status == 401:
        pass
    right = await post(gateway, "login", ADA, source=MALLORY)
    assert right.status == 429, "from there, even the right password has to wait"
    assert (await post(gateway, "login", ADA)).status == 200


async def test_guesses_at_once_are_no_more_than_one_by_one(gateway: Running) -> None:
    await register(gateway)
    found = await asyncio.gather(*(guess(gateway, number) for number in range(40)))
    assert sum(answer.status == 401 for answer in found) == 5
    assert sum(answer.status == 429 for answer in found) == 35


async def test_unknown_user_is_slowed_down_just_so(gateway: Running) -> None:
    found = []
    for number in range(8):
        wrong = {"email": "nobody@example.com", "password": f"a wrong guess {number}"}
        found.append((await post(gateway, "login", wrong)).status)
    assert found == [401] * 5 + [429] * 3


async def test_registrations_from_one_address_are_limited(gateway: Running) -> None:
    found = [
        (await post(gateway, "register", {"email": f"user{number}@example.com", "password": PASSWORD})).status
        for number in range(102)
    ]
    assert found == [201] * 100 + [429] * 2
    elsewhere = await post(gateway, "register", {"email": "x@example.com", "password": PASSWORD}, source=MALLORY)
    assert elsewhere.status == 201
