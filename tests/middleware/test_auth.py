import hmac
from collections.abc import AsyncIterator

import pytest

from gateway import keys
from gateway.errors import AuthenticationFailed, StorageUnavailable
from middleware.auth import OPERATOR, KeyRing
from tests.handlers.platforms import ANN, BEN, KnownCallers, Platform, agent_of, key, platform, token
from tests.server.running import FRIEND, Running, serving, settings
from tests.server.wire import Headers

EVERY_ROUTE = ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/friend", "/v1/nothing", "/")
NOBODY = "127.0.0.9"
"""An address of this machine that is in none of the networks trusted here."""
PROXY = "127.0.0.1"


@pytest.fixture
async def guarded() -> AsyncIterator[Running]:
    """Serve with keys; one proxy is trusted."""
    chosen = settings(
        api_keys=("sk-one", "sk-two"), operator_key="sk-operator", trusted_networks=(f"{PROXY}/32", "10.0.0.0/8")
    )
    async with serving(chosen) as running:
        yield running


@pytest.fixture
async def local() -> AsyncIterator[Running]:
    """Serve without keys."""
    async with serving(settings(cors_origins=("https://chat.example.com",))) as running:
        yield running


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-one"},
        {"Authorization": "Bearer sk-two"},
        {"Authorization": "bearer sk-one"},
        {"Authorization": "Bearer   sk-one"},
        {"X-Api-Key": "sk-two"},
        {"Authorization": "Basic dXNlcjpwYXNz", "X-Api-Key": "sk-one"},
        {"Authorization": "", "X-Api-Key": "sk-one"},
    ],
)
async def test_known_key(guarded: Running, headers: dict[str, str]) -> None:
    answer = await guarded.ask("GET", "/v1/models", headers)
    assert answer.status == 200
    assert answer.json()["data"][0]["id"] == FRIEND.name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer sk-on"},
        {"Authorization": "Bearer sk-one2"},
        {"Authorization": "Bearer SK-ONE"},
        {"Authorization": "Bearer sk-one sk-two"},
        {"Authorization": "Bearer sk-one,sk-two"},
        {"Authorization": "sk-one"},
        {"Authorization": "Basic sk-one"},
        {"Authorization": "Token sk-one"},
        {"Authorization": "Bearer sk-operator"},
        {"X-Api-Key": "wrong"},
        {"X-Api-Key": "Bearer sk-one"},
        {"Cookie": "key=sk-one"},
        {"Authorization": "Bearer wrong", "X-Api-Key": "sk-one"},
        [("Authorization", "Bearer schlüssel".encode())],
        [("Authorization", b"Bearer \xff\xfe\x80")],
        [("X-Api-Key", b"\xc3\x28")],
        {"Authorization": "Bearer ' OR '1'='1"},
        {"Authorization": "Bearer " + "x" * 8_000},
    ],
)
async def test_no_known_key(guarded: Running, headers: Headers) -> None:
    answer = await guarded.ask("GET", "/v1/models", headers)
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert answer.header("www-authenticate") == "Bearer"
    assert b"sk-" not in answer.body
    assert guarded.backend.listings == 0


async def test_key_in_the_url(guarded: Running) -> None:
    answer = await guarded.ask("GET", "/v1/models?api_key=sk-one&key=sk-one")
    assert answer.status == 401


async def test_key_by_which_a_browser_would_be_tricked(guarded: Running) -> None:
    """With keys, any page may ask as long as it has one: it cannot have one."""
    headers = {"Authorization": "Bearer sk-one", "Host": "evil.example.com", "Origin": "https://evil.example.com"}
    answer = await guarded.ask("GET", "/v1/models", headers)
    assert answer.status == 200
    assert answer.header("access-control-allow-origin") is None


async def test_stranger_on_a_path_that_is_none(guarded: Running) -> None:
    assert (await guarded.ask("GET", "/v1/nothing")).code == "unknown_url"
    assert (await guarded.ask("DELETE", "/v1/models")).code == "method_not_allowed"


def test_all_keys_are_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time tells nothing of which key it was, or of how much of one was right."""
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(known: bytes, offered: bytes) -> bool:
        compared.append((known, offered))
        return compare(known, offered)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    ring = KeyRing(("sk-one", "sk-two", "sk-three"))
    assert ring.owner("sk-one") == KeyRing(("sk-one",)).owner("sk-one")
    assert [known for known, _ in compared[:3]] == [b"sk-one", b"sk-two", b"sk-three"]
    compared.clear()
    with pytest.raises(AuthenticationFailed):
        ring.owner("nothing")
    assert len(compared) == 3


def test_owner_is_named_without_the_key() -> None:
    ring = KeyRing(("sk-one", "sk-two"))
    assert ring.owner("sk-one") != ring.owner("sk-two")
    assert "sk-one" not in ring.owner("sk-one")


# Without keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_ROUTE)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example.com",
        "localhost.evil.example.com",
        "127.0.0.1.evil.example.com",
        "127.0.0.1.nip.io",
        "192.168.1.5:8080",
        "0.0.0.0",  # noqa: S104
        "[::2]:8080",
        "[::1",
        "evil.example.com:localhost",
        "localhost:80@evil.example.com",
    ],
)
async def test_foreign_host_without_keys(local: Running, path: str, host: str) -> None:
    answer = await local.ask("GET", path, {"Host": host})
    assert (answer.status, answer.code) == (403, "forbidden")


@pytest.mark.parametrize("path", EVERY_ROUTE)
@pytest.mark.parametrize(
    "origin", ["https://evil.example.com", "null", "http://localhost.evil.example.com", "https://chat.example.com.evil"]
)
async def test_foreign_origin_without_keys(local: Running, path: str, origin: str) -> None:
    answer = await local.ask("GET", path, {"Origin": origin})
    assert (answer.status, answer.code) == (403, "forbidden")
    assert answer.header("access-control-allow-origin") is None


@pytest.mark.parametrize("port", ["", ":8080", ":1"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "127.8.9.1", "LOCALHOST"])
async def test_own_host_without_keys(local: Running, host: str, port: str) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert (await local.ask("GET", path, {"Host": host + port})).status == 200


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:5173", "https://chat.example.com"]
)
async def test_own_origin_without_keys(local: Running, origin: str) -> None:
    assert (await local.ask("GET", "/v1/models", {"Origin": origin})).status == 200


async def test_no_host_at_all_without_keys(local: Running) -> None:
    assert (await local.raw(b"GET /health HTTP/1.0\r\n\r\n")).status == 403


async def test_any_key_does_where_none_is_configured(local: Running) -> None:
    """The SDKs insist on sending one."""
    assert (await local.ask("GET", "/v1/models", {"Authorization": "Bearer anything"})).status == 200


# The operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer sk-operator"}, {"X-Api-Key": "sk-operator"}])
async def test_operator_by_key(guarded: Running, headers: dict[str, str]) -> None:
    assert (await guarded.ask("GET", "/metrics", headers, source=NOBODY)).status == 200
    ready = await guarded.ask("GET", "/ready", headers, source=NOBODY)
    assert ready.json()["dependencies"]["letta"]["status"] == "ok"


async def test_operator_by_network(guarded: Running) -> None:
    assert (await guarded.ask("GET", "/metrics")).status == 200
    assert (await guarded.ask("GET", "/metrics", {"X-Forwarded-For": "10.1.2.3"})).status == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer sk-one"}, {"Authorization": "Bearer "}, {"X-Forwarded-For": PROXY}]
)
async def test_nobody_asks_for_metrics(guarded: Running, headers: dict[str, str]) -> None:
    answer = await guarded.ask("GET", "/metrics", headers, source=NOBODY)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert (await guarded.ask("GET", "/ready", headers, source=NOBODY)).json() == {"status": "ready"}
    assert (await guarded.ask("GET", "/health", headers, source=NOBODY)).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "203.0.113.7"},
        {"X-Forwarded-For": "10.1.1.1, 203.0.113.7"},
        {"X-Forwarded-For": "127.0.0.1, 203.0.113.7, 10.0.0.2"},
        [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-For", "203.0.113.7")],
        {"X-Forwarded-For": "203.0.113.7:41234"},
        {"X-Forwarded-For": "[2001:db8::1]:41234"},
        {"X-Forwarded-For": "unknown"},
        {"X-Forwarded-For": "127.0.0.1%eth0"},
        {"X-Forwarded-For": "127.0.0.1, _hidden"},
        {"X-Real-IP": "203.0.113.7"},
        {"Forwarded": "for=203.0.113.7"},
    ],
)
async def test_proxy_forwards_somebody_else(guarded: Running, headers: Headers) -> None:
    answer = await guarded.ask("GET", "/metrics", headers)
    assert (answer.status, answer.code) == (403, "forbidden")


async def test_operator_key_is_not_to_be_guessed(guarded: Running) -> None:
    """By /metrics neither; and whether the gateway is ready is said to whoever guesses, too."""
    wrong = {"Authorization": "Bearer sk-guess"}
    statuses = [(await guarded.ask("GET", "/metrics", wrong, source=NOBODY)).status for _ in range(7)]
    assert statuses[:5] == [403] * 5
    assert statuses[-1] == 429
    right = {"Authorization": "Bearer sk-operator"}
    over = await guarded.ask("GET", "/metrics", right, source=NOBODY)
    assert (over.status, over.code) == (429, "too_many_attempts")
    assert over.header("retry-after")
    assert (await guarded.ask("GET", "/ready", right, source=NOBODY)).json() == {"status": "ready"}
    assert (await guarded.ask("GET", "/metrics", wrong)).status == 200, "a trusted network needs no key"


async def test_no_operator_key_is_not_the_empty_key() -> None:
    chosen = settings(api_keys=("sk-one",), trusted_networks=())
    async with serving(chosen) as gateway:
        for headers in ({}, {"Authorization": "Bearer "}, {"X-Api-Key": ""}):
            assert (await gateway.ask("GET", "/metrics", headers)).status == 403


async def test_without_keys_a_proxy_on_this_machine_lets_nobody_in() -> None:
    async with serving() as gateway:
        for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded"):
            answer = await gateway.ask("GET", "/v1/models", {header: "203.0.113.9"})
            assert (answer.status, answer.code) == (403, "forbidden")
        assert (await gateway.ask("GET", "/v1/models", {"X-Forwarded-For": "127.0.0.1"})).status == 200


async def test_page_that_gave_its_name_our_address_is_no_operator() -> None:
    async with serving(settings(api_keys=("sk-one",))) as gateway:
        assert (await gateway.ask("GET", "/metrics")).status == 200
        assert (await gateway.ask("GET", "/metrics", {"Host": "evil.example"})).status == 403


# Users ---------------------------------------------------------------------------------------------------------------

ME = "/api/v1/auth/me"
USERS = "/api/v1/admin/users"


@pytest.fixture
async def users() -> AsyncIterator[Platform]:
    """Serve users beside the operator's keys; this machine's own network is trusted."""
    async with platform(api_keys=("sk-one",), operator_key="sk-operator") as running:
        yield running


@pytest.mark.parametrize("user", [ANN, BEN])
async def test_personal_key_opens_the_openai_surface(users: Platform, user: str) -> None:
    for headers in (key(user), {"X-Api-Key": f"{keys.PERSONAL_KEY}{user}"}):
        answer = await users.ask("GET", "/v1/models", headers)
        assert (answer.status, [model["id"] for model in answer.json()["data"]]) == (200, [agent_of(user).name])


@pytest.mark.parametrize(
    "given",
    [keys.PERSONAL_KEY, f"{keys.PERSONAL_KEY}nobody", f"{keys.PERSONAL_KEY}sk-one", f"{keys.PERSONAL_KEY}{ANN}x"],
)
async def test_personal_key_that_is_nobodys(users: Platform, given: str) -> None:
    answer = await users.ask("GET", "/v1/models", {"Authorization": f"Bearer {given}"})
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert given.encode() not in answer.body or given == keys.PERSONAL_KEY


async def test_personal_key_that_is_nobodys_where_anybody_may_ask() -> None:
    """Whoever says who they are is not somebody else because of a slip of the pen."""
    async with platform() as gateway:
        assert (await gateway.ask("GET", "/v1/models", {"X-Api-Key": "anything"})).status == 200
        assert (await gateway.ask("GET", "/v1/models", {"X-Api-Key": f"{keys.PERSONAL_KEY}nobody"})).status == 401
        answer = await gateway.ask("GET", "/v1/models", key(ANN))
        assert [model["id"] for model in answer.json()["data"]] == [agent_of(ANN).name]


@pytest.mark.parametrize("headers", [token(ANN), {"X-Api-Key": f"token-{ANN}"}])
async def test_access_token_opens_the_platform(users: Platform, headers: dict[str, str]) -> None:
    answer = await users.ask("GET", ME, headers)
    assert (answer.status, answer.json()["id"]) == (200, ANN)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "invalid_api_key"),
        ({"Authorization": "Bearer "}, "invalid_api_key"),
        ({"Authorization": "Basic YTpi"}, "invalid_api_key"),
        ({"Cookie": f"access_token=token-{ANN}"}, "invalid_api_key"),
        ({"Authorization": "Bearer sk-one"}, "invalid_token"),
        ({"Authorization": "Bearer sk-operator"}, "invalid_token"),
        (key(ANN), "invalid_token"),
        (token("nobody"), "invalid_token"),
        ({"X-User-Id": ANN, "Authorization": "Bearer sk-operator"}, "invalid_token"),
    ],
)
async def test_nothing_but_an_access_token_opens_the_platform(
    users: Platform, headers: dict[str, str], code: str
) -> None:
    for path in (ME, "/api/v1/user/profile", "/api/v1/chat/history"):
        answer = await users.ask("GET", path, headers)
        assert (answer.status, answer.code) == (401, code)
        assert answer.header("www-authenticate") == "Bearer"


async def test_access_token_in_the_url(users: Platform) -> None:
    assert (await users.ask("GET", f"{ME}?access_token=token-{ANN}&token=token-{ANN}")).status == 401


async def test_owner_comes_from_the_credential_alone(users: Platform) -> None:
    """S4."""
    others = {"X-User-Id": BEN, "X-OpenWebUI-User-Id": BEN, "X-Owner": BEN, "X-Forwarded-User": BEN}
    assert (await users.ask("GET", f"{ME}?user_id={BEN}", {**others, **token(ANN)})).json()["id"] == ANN
    answer = await users.ask("GET", f"/v1/models?user={BEN}", {**others, **key(ANN)})
    assert [model["id"] for model in answer.json()["data"]] == [agent_of(ANN).name]


async def test_users_credentials_open_nothing_of_the_operators(users: Platform) -> None:
    """S19."""
    for headers in (token(ANN), key(ANN), {"Authorization": "Bearer sk-one"}):
        answer = await users.ask("GET", USERS, headers)
        assert (answer.status, answer.code) == (403, "forbidden")
    assert (await users.ask("GET", "/v1/models", token(ANN))).status == 401


async def test_administration_is_opened_by_the_operator_key_alone(users: Platform) -> None:
    """A trusted network may read figures: it does not manage users."""
    assert (await users.ask("GET", "/metrics")).status == 200
    answer = await users.ask("GET", USERS)
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    for headers in ({"Authorization": "Bearer sk-operator"}, {"X-Api-Key": "sk-operator"}):
        for source in (None, NOBODY):
            found = await ask_from(users, USERS, headers, source)
            assert found == 200


async def ask_from(gateway: Platform, path: str, headers: dict[str, str], source: str | None) -> int:
    return (await gateway.ask("GET", path, headers, source=source)).status


async def test_administration_is_closed_without_an_operator_key() -> None:
    async with platform(api_keys=("sk-one",)) as gateway:
        for headers in ({}, {"Authorization": "Bearer sk-one"}, {"X-Api-Key": ""}, {"Authorization": "Bearer "}):
            answer = await gateway.ask("GET", USERS, headers)
            assert (answer.status, answer.code) == (403, "forbidden")


async def test_administration_without_api_keys_needs_the_operator_key_all_the_same() -> None:
    async with platform(operator_key="sk-operator") as gateway:
        assert (await gateway.ask("GET", USERS)).status == 401
        assert (await gateway.ask("GET", USERS, {"X-Api-Key": "sk-operator"})).status == 200


async def test_credentials_that_cannot_be_asked_for_are_no_401(
    users: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> keys.Caller:
        raise StorageUnavailable

    monkeypatch.setattr(KnownCallers, "caller_of_key", fail)
    monkeypatch.setattr(KnownCallers, "caller_of_token", fail)
    for path, headers in (("/v1/models", key(ANN)), (ME, token(ANN))):
        answer = await users.ask("GET", path, headers)
        assert (answer.status, answer.code) == (503, "storage_unavailable")


async def test_web_page_without_a_credential_gets_nowhere() -> None:
    """Without API keys: with a user's own credential it is the user who asks."""
    foreign = {"Host": "evil.example.com", "Origin": "https://evil.example.com"}
    async with platform() as gateway:
        assert (await gateway.ask("POST", "/api/v1/auth/login", foreign)).status == 403
        assert (await gateway.ask("GET", ME, foreign)).status == 401
        assert (await gateway.ask("GET", ME, {**foreign, **token(ANN)})).status == 200


def test_operators_caller_is_nobody_else() -> None:
    assert keys.Caller("operator") == OPERATOR
    assert OPERATOR.user_id is None
