"""Nobody sees or changes what is another's: every route by every caller, generated from the router."""

import hashlib
from typing import Final

import msgspec
import pytest
from aiohttp import web
from sqlalchemy import select

from gateway import keys
from gateway.errors import UpstreamUnavailable
from gateway.keys import Access
from gateway.server.routes import PAGE, ROUTES
from gateway.storage.tables import metadata
from tests.server.people import API_KEY, OPERATOR_KEY, PASSWORD, Person, Town, town
from tests.server.rules import RULES, Rule
from tests.server.wire import Answer

CALLERS: Final = (
    "anonymous",
    "garbage",
    "user",
    "ended",
    "expired",
    "blocked",
    "personal key",
    "blocked key",
    "api key",
    "operator",
)

SERVED: Final = 0
"""In the table below: the route does what it is for."""

STATUSES: Final[dict[Access, dict[str, int]]] = {
    "open": dict.fromkeys(CALLERS, SERVED),
    "user": {**dict.fromkeys(CALLERS, 401), "user": SERVED, "blocked": 403},
    "api": {**dict.fromkeys(CALLERS, 401), "personal key": SERVED, "blocked key": 403, "api key": SERVED},
    "admin": {**dict.fromkeys(CALLERS, 403), "anonymous": 401, "operator": SERVED},
    "operator": {**dict.fromkeys(CALLERS, 403), "operator": SERVED},
}


def test_every_route_has_its_rule() -> None:
    assert {(route.method, route.path): route.access for route in ROUTES} == {
        named: rule.access for named, rule in RULES.items()
    }


async def test_rules_are_those_of_the_router_itself() -> None:
    """What is served is what the table of routes says, and HEAD beside GET; tests/ui looks at the page's own."""
    async with town(talks=False) as gateway:
        resources = {
            (route.method, route.resource.canonical)
            for route in gateway.app.router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
        assert isinstance(gateway.app, web.Application)
    page = {(route.method, route.path) for route in PAGE}
    assert resources == {(method, path.replace(":.+", "")) for method, path in {*RULES, *page}}


def filled(text: str, who: Person) -> str:
    """Return a path or a body with a user's own objects in it."""
    for name, value in (
        ("{key}", who.key_id),
        ("{response}", who.response_id),
        ("{model:.+}", who.agent_id),
        ("{model}", who.agent_id),
        ("{user}", who.id),
        ("{label}", "human"),
    ):
        text = text.replace(name, value)
    return text


def body_of(rule: Rule, who: Person) -> object:
    return None if rule.body is None else msgspec.json.decode(filled(msgspec.json.encode(rule.body).decode(), who))


async def credentials(gateway: Town) -> dict[str, str | None]:
    carl = await gateway.settle_down("carl")
    blocked = await gateway.admin("POST", f"/users/{carl.id}/block")
    assert blocked.status == 200
    return {
        "anonymous": None,
        "garbage": "eyJhbGciOiJub25lIn0.e30.",
        "user": gateway.ann.token,
        "ended": await gateway.ended_token(gateway.ann),
        "expired": gateway.expired_token(gateway.ann),
        "blocked": carl.token,
        "personal key": gateway.ann.key,
        "blocked key": carl.key,
        "api key": API_KEY,
        "operator": OPERATOR_KEY,
    }


async def everything(gateway: Town) -> str:
    """Return a digest of all that is kept, but for the times when keys and sessions were used last."""
    found = hashlib.sha256()
    async with gateway.app[keys.DATABASE].read() as connection:
        for table in metadata.sorted_tables:
            columns = [column for column in table.columns if column.name not in ("last_used_at", "seen_at")]
            rows = sorted(repr(tuple(row)) for row in await connection.execute(select(*columns)))
            found.update("\n".join([table.name, *rows]).encode())
    found.update(repr(sorted(agent.id for agent in gateway.backend.listed)).encode())
    found.update(repr(gateway.backend.memories).encode())
    return found.hexdigest()


@pytest.mark.parametrize(("method", "path"), RULES)
async def test_route_by_every_caller(method: str, path: str) -> None:
    """Whoever may not is refused and changes nothing, then whoever may is served."""
    rule = RULES[method, path]
    expected = STATUSES[rule.access]
    async with town() as gateway:
        given = await credentials(gateway)
        target, body = filled(path, gateway.ann), body_of(rule, gateway.ann)
        before = await everything(gateway)
        for caller in (caller for caller in CALLERS if expected[caller] != SERVED):
            answer = await gateway.send(method, target, given[caller], body)
            assert answer.status == expected[caller], (caller, answer)
            assert not leaked(answer, gateway.ann) | leaked(answer, gateway.ben), caller
        assert await everything(gateway) == before
        caller = next(caller for caller in CALLERS if expected[caller] == SERVED)
        answer = await gateway.send(method, target, given[caller], body)
        assert answer.status == rule.served, (caller, answer)
        if rule.access != "admin":
            assert not leaked(answer, gateway.ben)


def leaked(answer: Answer, who: Person) -> set[str]:
    """Return which of a user's secrets an answer holds."""
    text = answer.body.decode() + repr(answer.headers)
    return {secret for secret in who.secrets if secret in text}


# Objects -------------------------------------------------------------------------------------------------------------

WITH_OBJECT: Final = [named for named in RULES if "{" in named[1] and "{label}" not in named[1]]
OF_USERS: Final = [named for named in WITH_OBJECT if RULES[named].access != "admin"]
OF_OPERATOR: Final = [named for named in WITH_OBJECT if RULES[named].access == "admin"]


@pytest.mark.parametrize(("method", "path"), OF_USERS)
async def test_object_of_another_is_as_one_that_is_not(method: str, path: str) -> None:
    rule = RULES[method, path]
    async with town() as gateway:
        before = await everything(gateway)
        credential = gateway.ben.key if rule.access == "api" else gateway.ben.token
        body = body_of(rule, gateway.ann)
        others = filled(path, gateway.ann)
        nobodys = filled(path, unknown(gateway.ann))
        answers = [await gateway.send(method, target, credential, body) for target in (others, nobodys)]
        assert [answer.status for answer in answers] == [404, 404]
        assert not leaked(answers[1], gateway.ann)
        first, second = (without_ids(answer, gateway.ann) for answer in answers)
        assert first == second, "the same words for what is another's and what is not there"
        assert await everything(gateway) == before


@pytest.mark.parametrize(("method", "path"), OF_OPERATOR)
@pytest.mark.parametrize(
    "user", ["00000000-0000-4000-8000-000000000000", "nobody", "%00", "'; DROP TABLE turns; --", "%25"]
)
async def test_operator_asks_for_somebody_who_is_not(method: str, path: str, user: str) -> None:
    async with town(talks=False) as gateway:
        before = await everything(gateway)
        target = path.replace("{user}", user.replace(" ", "%20"))
        answer = await gateway.send(method, target, OPERATOR_KEY, RULES[method, path].body)
        assert (answer.status, answer.code) == (404, "user_not_found")
        assert await everything(gateway) == before


def unknown(like: Person) -> Person:
    """Return somebody who is not, with names of the same kind."""
    return msgspec.structs.replace(
        like,
        key_id="00000000-0000-4000-8000-000000000000",
        response_id=f"resp_{'0' * 32}",
        agent_id="agent-nobody-s",
        id="00000000-0000-4000-8000-000000000000",
    )


def without_ids(answer: Answer, who: Person) -> str:
    text = answer.body.decode()
    for name in ("key_id", "response_id", "agent_id", "id"):
        text = text.replace(getattr(who, name), "ID").replace(getattr(unknown(who), name), "ID")
    return text


@pytest.mark.parametrize("cursor", ["other's", "nobody's"])
async def test_cursor_of_another(cursor: str) -> None:
    async with town() as gateway:
        given = gateway.ann.message_id if cursor == "other's" else f"msg_{'0' * 32}"
        answer = await gateway.api("GET", f"/chat/history?cursor={given}", gateway.ben)
        assert (answer.status, answer.code) == (404, "message_not_found")
        assert given not in answer.body.decode()


async def test_response_of_another_is_no_previous_one() -> None:
    async with town() as gateway:
        turns = len(gateway.backend.turns)
        answers = [
            await gateway.send(
                "POST",
                "/v1/responses",
                gateway.ben.key,
                {"model": gateway.ben.agent_id, "input": "Go on", "previous_response_id": given},
            )
            for given in (gateway.ann.response_id, unknown(gateway.ann).response_id)
        ]
        assert [answer.status for answer in answers] == [404, 404]
        assert without_ids(answers[0], gateway.ann) == without_ids(answers[1], gateway.ann)
        assert len(gateway.backend.turns) == turns


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
    ],
)
async def test_agent_of_another_answers_to_nobody_else(path: str, body: dict[str, object]) -> None:
    async with town() as gateway:
        turns = len(gateway.backend.turns)
        for credential in (gateway.ben.key, API_KEY):
            names = [agent.name for agent in gateway.backend.listed if agent.id == gateway.ann.agent_id]
            for model in (gateway.ann.agent_id, *names, "agent-nobody-s"):
                answer = await gateway.send("POST", path, credential, {**body, "model": model})
                assert (answer.status, answer.code) == (404, "model_not_found")
        assert (await gateway.send("POST", path, gateway.ben.key, {**body, "model": "friend"})).status == 404
        assert len(gateway.backend.turns) == turns
        listed = await gateway.send("GET", "/v1/models", API_KEY)
        assert [model["id"] for model in listed.json()["data"]] == ["friend"]
        own = await gateway.send("GET", "/v1/models", gateway.ben.key)
        assert len(own.json()["data"]) == 1


async def test_same_idempotency_key_of_two_users_is_two_requests() -> None:
    async with town() as gateway:
        answers = [
            await gateway.ask(
                "POST",
                "/api/v1/chat/message",
                {**who.bearer, "Idempotency-Key": "the same", "Content-Type": "application/json"},
                b'{"message": "Hello", "stream": false}',
            )
            for who in (gateway.ann, gateway.ben)
        ]
        assert [answer.status for answer in answers] == [200, 200]
        ids = {answer.json()["message"]["id"] for answer in answers}
        assert len(ids) == 2


# Who it is for, by the credential alone ------------------------------------------------------------------------------

CLAIMS: Final = ("user", "user_id", "owner", "sub", "id", "agent_id", "letta_agent_id", "email")


async def test_owner_is_never_what_a_request_says() -> None:
    async with town() as gateway:
        ann, ben = gateway.ann, gateway.ben
        headers = dict.fromkeys(
            ("X-User-Id", "X-OpenWebUI-User-Id", "X-OpenWebUI-User-Email", "X-Forwarded-User", "X-Letta-Agent"), ann.id
        )
        claims = {**dict.fromkeys(CLAIMS, ann.id), "agent_id": ann.agent_id, "email": ann.email}
        before = (await gateway.api("GET", "/chat/history", ann)).body
        body = {**claims, "message": "Whose am I?", "stream": False}
        answer = await gateway.ask(
            "POST",
            f"/api/v1/chat/message?user_id={ann.id}",
            {**headers, **ben.bearer, "Content-Type": "application/json"},
            msgspec.json.encode(body),
        )
        assert answer.status == 200
        assert gateway.backend.turns[-1].sent.agent_id == ben.agent_id
        assert (await gateway.api("GET", "/chat/history", ann)).body == before
        for path in ("/user/profile", "/user/usage", "/agent/memory", "/user/keys", "/chat/history", "/user/export"):
            seen = await gateway.ask("GET", f"/api/v1{path}?user_id={ann.id}&owner={ann.id}", {**headers, **ben.bearer})
            assert seen.status == 200
            assert not leaked(seen, ann), path


async def test_nothing_but_name_and_metadata_is_the_users_to_change() -> None:
    """Mass assignment: what a profile has besides is the operator's, or nobody's."""
    async with town() as gateway:
        ben = gateway.ben
        before = (await gateway.admin("GET", f"/users/{ben.id}")).json()
        greedy = {
            "id": gateway.ann.id,
            "email": "root@example.com",
            "role": "admin",
            "is_admin": True,
            "is_blocked": False,
            "balance": 1e9,
            "budget": {"amount": "1000000", "period": "total"},
            "budget_micros": 10**12,
            "letta_agent_id": gateway.ann.agent_id,
            "litellm_key": "sk-mine",
            "created_at": 0,
        }
        answer = await gateway.api("PATCH", "/user/profile", ben, {**greedy, "name": "Benjamin"})
        assert (answer.status, answer.json()["name"]) == (200, "Benjamin")
        after = (await gateway.admin("GET", f"/users/{ben.id}")).json()
        assert {**after, "name": "", "updated_at": 0} == {**before, "name": "", "updated_at": 0}
        registered = await gateway.send(
            "POST", "/api/v1/auth/register", None, {**greedy, "email": "eve@example.com", "password": "correct horse"}
        )
        assert registered.status == 201
        user = registered.json()["user"]
        eve = (await gateway.admin("GET", f"/users/{user['id']}")).json()
        assert (eve["is_blocked"], eve["budget"], eve["email"]) == (False, None, "eve@example.com")
        assert user["id"] != gateway.ann.id
        assert eve["agent"]["id"] != gateway.ann.agent_id


async def test_personal_key_makes_no_further_rights() -> None:
    """A chat key neither reads the platform nor makes sessions and keys; a session is no key of the OpenAI surface."""
    async with town() as gateway:
        for method, path in RULES:
            rule = RULES[method, path]
            if rule.access in ("user", "admin", "operator"):
                answer = await gateway.send(
                    method, filled(path, gateway.ann), gateway.ann.key, body_of(rule, gateway.ann)
                )
                assert answer.status in (401, 403, 429), path  # to administration it is a guess
            if rule.access == "api":
                answer = await gateway.send(
                    method, filled(path, gateway.ann), gateway.ann.token, body_of(rule, gateway.ann)
                )
                assert answer.status == 401, path


# What is never told --------------------------------------------------------------------------------------------------


ENDING: Final = {
    ("POST", "/api/v1/auth/logout"),
    ("POST", "/api/v1/auth/password"),
    ("DELETE", "/api/v1/user"),
    ("DELETE", "/api/v1/admin/users/{user}"),
    ("POST", "/api/v1/admin/users/{user}/password"),
    ("POST", "/api/v1/admin/users/{user}/block"),
}
"""After which Ann's token is worth nothing."""


@pytest.mark.parametrize("fault", ["letta", "database", "bug"])
async def test_failure_tells_nothing_of_what_is_behind(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where Letta or the database is, nor a path, a statement or a secret."""
    secrets = (
        "letta.invalid",
        "gateway-db-",
        "gateway.db",
        "SELECT",
        "Traceback",
        "site-packages",
        "a secret of the tests",
    )
    async with town() as gateway:
        given = {"user": gateway.ann.token, "api": gateway.ann.key, "admin": OPERATOR_KEY, "operator": OPERATOR_KEY}
        if fault == "letta":
            gateway.backend.down = UpstreamUnavailable(retry_after=1.0)
        elif fault == "database":
            await gateway.app[keys.DATABASE].close()
        else:
            monkeypatch.setattr(gateway.app[keys.PROFILES], "_database", None)
            monkeypatch.setattr(gateway.app[keys.RESPONSES], "_database", None)
            monkeypatch.setattr(gateway.backend, "find_agents", None)
        gateway.app[keys.CREDENTIALS].forget(gateway.ann.id)
        for (method, path), rule in RULES.items():
            if (method, path) in ENDING:
                continue
            body = body_of(rule, gateway.ann)
            answer = await gateway.send(method, filled(path, gateway.ann), given.get(rule.access), body)
            assert rule.access not in given or answer.status != 401, "a dead dependency is no wrong credential"
            text = answer.body.decode() + repr(answer.headers)
            assert not [word for word in (*secrets, OPERATOR_KEY, PASSWORD) if word in text], (path, text)
            assert answer.status < 500 or path == "/ready" or answer.error["message"], path
