import time

import pytest

from gateway import keys
from gateway.accounts.operator_sessions import COOKIE, LIFETIME, OperatorSessions
from gateway.server.routes import PAGE
from gateway.storage.tables import ended_operator_sessions
from tests.server.running import serving, settings
from tests.ui.operator_page import API_KEY, OPERATOR_KEY, Page, cookie_of, page, sign_in, signed_in

PATHS = [(route.method, route.path) for route in PAGE if route.access == "page"]


def target(path: str) -> str:
    """Return a path with something in the place of its names."""
    return (
        path.replace("{model:.+}", "friend").replace("{name}", "LOG_LEVEL").replace("{user}", "u").replace("{key}", "k")
    )


def test_all_but_the_page_and_the_sign_in_need_a_session() -> None:
    assert {route.path for route in PAGE if route.access == "open"} == {"/ui", "/ui/", "/ui/{file}", "/ui/api/sign-in"}
    assert all(route.path.startswith("/ui/api/") for route in PAGE if route.access == "page")


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_nobody_without_a_session_gets_anything(method: str, path: str) -> None:
    async with page() as operator:
        stranger = Page(operator.gateway)
        credentials: tuple[dict[str, str], ...] = (
            {},
            {"Authorization": f"Bearer {OPERATOR_KEY}"},
            {"Authorization": f"Bearer {API_KEY}"},
            {"X-Api-Key": OPERATOR_KEY},
            {"Cookie": f"{COOKIE}="},
            {"Cookie": f"{COOKIE}={OPERATOR_KEY}"},
            {"Cookie": f"{COOKIE}={operator.cookie[:-1]}"},
            {"Cookie": f"{COOKIE}={operator.cookie}0"},
            {"Cookie": f"{COOKIE}=x.99999999999.{'0' * 64}"},
            {"Cookie": f"other={operator.cookie}"},
        )
        for headers in credentials:
            answer = await stranger.ask(method, target(path).removeprefix("/ui/api/"), {"value": "DEBUG"}, **headers)
            assert (answer.status, answer.code) == (401, "invalid_api_key"), headers
            assert "/ui" in answer.error["message"]
        assert operator.gateway.backend.turns == []
        assert operator.gateway.app[keys.LIVE].changes == {}


@pytest.mark.parametrize(("method", "path"), [one for one in PATHS if one[0] != "GET"])
async def test_change_without_the_csrf_token_is_refused(method: str, path: str) -> None:
    async with page() as operator:
        for token in ("", "0" * 64, operator.csrf_token[:-1], operator.cookie):
            forged = Page(operator.gateway, operator.cookie, token)
            answer = await forged.ask(method, target(path).removeprefix("/ui/api/"), {"value": "DEBUG"})
            assert (answer.status, answer.code) == (403, "forbidden")
        assert operator.gateway.app[keys.LIVE].changes == {}
        assert (await operator.ask("GET", "session")).status == 200


async def test_cookie_is_for_the_page_alone() -> None:
    async with serving(settings(operator_key=OPERATOR_KEY)) as gateway:
        answer = await sign_in(gateway, OPERATOR_KEY)
        attributes = {part.strip() for part in (answer.header("set-cookie") or "").split(";")[1:]}
        assert attributes == {"HttpOnly", f"Max-Age={LIFETIME:.0f}", "Path=/ui", "SameSite=Strict"}
        assert 0 < answer.json()["expires_in"] <= LIFETIME
        behind_tls = await sign_in(gateway, OPERATOR_KEY, X_Forwarded_Proto="https", X_Forwarded_For="127.0.0.1")
        assert "; Secure" in (behind_tls.header("set-cookie") or "")
        assert OPERATOR_KEY not in (answer.header("set-cookie") or "") + answer.body.decode()


@pytest.mark.parametrize("key", ["", "wrong", OPERATOR_KEY + "x", OPERATOR_KEY[:-1], "ключ", API_KEY])
async def test_wrong_key(key: str) -> None:
    async with serving(settings(operator_key=OPERATOR_KEY, api_keys=(API_KEY,))) as gateway:
        answer = await sign_in(gateway, key)
        assert (answer.status, answer.header("set-cookie")) == (401, None)


async def test_wrong_keys_are_slowed_down_and_only_where_they_come_from() -> None:
    async with serving(settings(operator_key=OPERATOR_KEY, api_keys=(API_KEY,))) as gateway:
        statuses = [(await sign_in(gateway, f"guess {n}", X_Forwarded_For="203.0.113.7")).status for n in range(12)]
        assert statuses[:5] == [401] * 5
        assert 429 in statuses
        late = await sign_in(gateway, OPERATOR_KEY, X_Forwarded_For="203.0.113.7")
        assert (late.status, late.code) == (429, "too_many_attempts")
        assert late.header("retry-after")
        assert (await sign_in(gateway, OPERATOR_KEY, X_Forwarded_For="198.51.100.9")).status == 200


async def test_other_site_cannot_sign_in() -> None:
    async with serving(settings(operator_key=OPERATOR_KEY)) as gateway:
        answer = await sign_in(gateway, OPERATOR_KEY, Sec_Fetch_Site="cross-site")
        assert (answer.status, answer.header("set-cookie")) == (403, None)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await gateway.ask("POST", "/ui/api/sign-in", form, f"key={OPERATOR_KEY}".encode())).status == 415


async def test_without_an_operator_key_nobody_comes_in() -> None:
    async with serving() as gateway:
        for key in ("", "anything"):
            answer = await sign_in(gateway, key)
            assert (answer.status, answer.header("set-cookie")) == (403, None)
            assert "LETTA_GATEWAY_OPERATOR_KEY" in answer.error["message"]
        assert (await Page(gateway).ask("GET", "overview")).status == 401


async def test_session_ends_with_the_sign_out() -> None:
    async with page() as operator:
        other = await signed_in(operator.gateway)
        answer = await operator.ask("DELETE", "session")
        assert answer.status == 204
        assert "Max-Age=0" in (answer.header("set-cookie") or "")
        for path in ("session", "overview", "settings"):
            assert (await operator.ask("GET", path)).status == 401
        assert (await other.ask("GET", "session")).status == 200


async def test_session_that_was_ended_elsewhere_or_before_a_restart() -> None:
    async with page() as operator:
        database = operator.gateway.app[keys.DATABASE]
        secret = operator.gateway.app[keys.OPERATOR_SESSIONS]._key
        replica = OperatorSessions(database, b"another", OPERATOR_KEY)
        replica._key = secret
        assert replica.find(operator.cookie) is not None
        await operator.ask("DELETE", "session")
        assert replica.find(operator.cookie) is not None, "until it looks"
        await replica.load()
        assert replica.find(operator.cookie) is None


async def test_session_is_over_after_twelve_hours() -> None:
    async with page() as operator:
        operator.gateway.app[keys.OPERATOR_SESSIONS]._now = lambda: time.time() + LIFETIME + 1
        assert (await operator.ask("GET", "session")).status == 401


async def test_another_operator_key_ends_all_sessions() -> None:
    async with page() as operator:
        cookie = operator.cookie
    async with page(operator_key="sk-another") as operator:
        assert (await Page(operator.gateway, cookie).ask("GET", "session")).status == 401
    async with page(secret_key="another secret of the tests, of 40 characters") as operator:
        assert (await Page(operator.gateway, cookie).ask("GET", "session")).status == 401
    async with page() as operator:
        assert (await Page(operator.gateway, cookie).ask("GET", "session")).status == 200, "a restart ends none"


async def test_ended_sessions_are_forgotten_when_they_would_be_over() -> None:
    async with page() as operator:
        sessions = operator.gateway.app[keys.OPERATOR_SESSIONS]
        await operator.ask("DELETE", "session")
        sessions._now = lambda: time.time() + LIFETIME + 1
        answer = await sign_in(operator.gateway, OPERATOR_KEY)
        session = sessions.find(cookie_of(answer))
        assert session is not None
        await sessions.end(session)
        async with operator.gateway.app[keys.DATABASE].read() as connection:
            rows = (await connection.execute(ended_operator_sessions.select())).all()
        assert [row.id for row in rows] == [session.id]
