import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias

import pytest

from gateway.errors import (
    AgentGone,
    ConversationBusy,
    GatewayError,
    UpstreamAuthFailed,
    UpstreamInvalid,
    UpstreamQuotaExceeded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.letta import rest
from gateway.letta.backend import Agent, AgentDetails, always_ready
from gateway.letta.breaker import FAILURES_TO_OPEN, FIRST_PAUSE, Breaker
from gateway.letta.deadlines import Limits
from gateway.letta.rest import PAGE, RestBackend, RestConfig
from gateway.letta.wire import AgentProfile
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import Text
from tests.letta.recording_server import (
    AGENT,
    CONVERSATION,
    HEALTH,
    Answer,
    Exchange,
    Kind,
    RecordingServer,
    garbage,
    silence,
    status,
)
from tests.said import said_to

MakeBackend: TypeAlias = Callable[..., RestBackend]

BOTH: Final = ("health", "listing", "turn", "cancel")
"""What the two clients ask: letta-client all but the turn, aiohttp the turn."""


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def make(server: RecordingServer) -> AsyncIterator[MakeBackend]:
    """Return a maker of backends that are closed after the test."""
    made: list[RestBackend] = []

    def make(url: str | None = None, **config: Any) -> RestBackend:
        made.append(RestBackend(RestConfig(url or server.url, **config), Metrics(), TaskSet()))
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
async def backend(make: MakeBackend) -> RestBackend:
    return make()


async def ask_everything(backend: RestBackend) -> None:
    """Ask by both clients, in the order of ``BOTH``."""
    await backend.ping()
    await backend.agents()
    running = backend.turn(said_to(AGENT, Text("Hi")))
    await running.open()
    await running.deliver(lambda _: True, always_ready)
    running.close()
    await backend.cancel_run(AGENT, "run-1")


def row(number: int) -> dict[str, Any]:
    return {"id": f"agent-{number:04}", "name": f"friend {number}", "created_at": "2026-01-01T00:00:00Z", "tools": []}


def listing(rows: list[dict[str, Any]]) -> Answer:
    """List agents page by page; as Letta does, start from the top where the cursor is unknown."""

    async def answer(exchange: Exchange) -> None:
        query = exchange.request.query
        ids = [row["id"] for row in rows]
        start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
        await status(200, rows[start : start + int(query["limit"])])(exchange)

    return answer


# What goes out -------------------------------------------------------------------------------------------------------


async def test_key_and_project_go_out_by_both_clients(server: RecordingServer, make: MakeBackend) -> None:
    await ask_everything(make(api_key="sk-let-1", project="my-project"))
    assert [request.kind for request in server.requests] == list(BOTH)
    for request in server.requests:
        assert request.header("Authorization") == "Bearer sk-let-1"
        assert request.header("X-Project") == "my-project"
        assert request.header("X-Project-Id") is None


async def test_nothing_of_either_goes_out_unless_set(server: RecordingServer, backend: RestBackend) -> None:
    await ask_everything(backend)
    for request in server.requests:
        for name in ("Authorization", "X-Project", "X-Project-Id", "Cookie"):
            assert request.header(name) is None, request


async def test_letta_clients_own_environment_does_not_leak_in(
    server: RecordingServer, make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LETTA_API_KEY", "sk-of-the-environment")
    monkeypatch.setenv("LETTA_CUSTOM_HEADERS", "X-Leak: 1\nX-Project: other\nAuthorization: Bearer leaked")
    monkeypatch.setenv("LETTA_BASE_URL", "http://127.0.0.1:1")
    await ask_everything(make())
    await ask_everything(make(api_key="sk-let-1", project="my-project"))
    assert [request.kind for request in server.requests] == [*BOTH, *BOTH]
    for number, request in enumerate(server.requests):
        assert request.header("X-Leak") is None
        assert request.header("Authorization") == (None if number < len(BOTH) else "Bearer sk-let-1")
        assert request.header("X-Project") == (None if number < len(BOTH) else "my-project")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
async def test_proxies_of_the_environment_are_not_used(
    server: RecordingServer, make: MakeBackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    await ask_everything(make())
    assert len(server.requests) == len(BOTH)


@pytest.mark.parametrize("prefix", ["", "/", "/letta", "/letta/", "/a/b%20c/"])
async def test_base_url_with_and_without_a_path(server: RecordingServer, make: MakeBackend, prefix: str) -> None:
    await ask_everything(make(server.url + prefix))
    base = prefix.rstrip("/")
    assert [(request.method, request.path) for request in server.requests] == [
        ("GET", f"{base}/v1/health/"),
        ("GET", f"{base}/v1/agents/"),
        ("POST", f"{base}/v1/agents/{AGENT}/messages/stream"),
        ("POST", f"{base}/v1/agents/{AGENT}/messages/cancel"),
    ]


async def test_cancel_names_exactly_one_run(server: RecordingServer, backend: RestBackend) -> None:
    await backend.cancel_run(AGENT, "run-7")
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", f"/v1/agents/{AGENT}/messages/cancel")
    assert request.json() == {"run_ids": ["run-7"]}


async def test_cookies_of_a_stream_are_not_kept(server: RecordingServer, backend: RestBackend) -> None:
    server.on("turn", status(409, {}, {"Set-Cookie": "session=1"}))
    for _ in range(2):
        with pytest.raises(ConversationBusy):
            await backend.turn(said_to(AGENT)).open()
    assert server.requests[1].header("Cookie") is None


async def test_control_plane_keeps_its_connection(server: RecordingServer, backend: RestBackend) -> None:
    for _ in range(3):
        await backend.ping()
    assert {request.connection for request in server.requests} == {1}


# The listing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "pages"), [(0, 1), (1, 1), (99, 1), (100, 2), (101, 2), (250, 3)])
async def test_every_agent_page_by_page(server: RecordingServer, backend: RestBackend, count: int, pages: int) -> None:
    server.on("listing", listing([row(number) for number in range(count)]))
    agents = await backend.agents()
    assert [agent.id for agent in agents] == [f"agent-{number:04}" for number in range(count)]
    asked = [request.query for request in server.requests]
    assert [query.pop("after", None) for query in asked] == [
        None,
        *(f"agent-{PAGE * page - 1:04}" for page in range(1, pages)),
    ]
    light = {"limit": "100", "order": "asc", "order_by": "created_at", "include": "agent.tags"}
    assert all(query == light for query in asked)


async def test_listing_is_light(server: RecordingServer, backend: RestBackend) -> None:
    """letta 0.16.8 leaves an agent's tools and blocks out for whoever sends this header (``is_1_0_sdk_version``)."""
    await backend.agents()
    await backend.find_agents(AGENT)
    for request in server.requests:
        assert re.fullmatch(r"[0-9.]+", request.header("X-Stainless-Package-Version") or ""), request.headers
        assert request.query["include"] == "agent.tags"


async def test_listing_ends_where_every_cursor_is_unknown(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(200, [row(number) for number in range(PAGE)]))
    assert len(await backend.agents()) == PAGE
    assert len(server.requests) == 2


async def test_listing_goes_on_where_one_cursor_was_deleted(server: RecordingServer, backend: RestBackend) -> None:
    rows = [row(number) for number in range(150)]
    server.on("listing", listing(rows), listing([*rows[:99], *rows[100:]]))
    agents = await backend.agents()
    assert [agent.id for agent in agents] == [row["id"] for row in rows]


async def test_server_that_knows_no_limit(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(200, [row(number) for number in range(2 * PAGE + 1)]))
    assert len(await backend.agents()) == 2 * PAGE + 1
    assert len(server.requests) == 2


async def test_odd_agents(server: RecordingServer, backend: RestBackend) -> None:
    names = ["", " ", "a\u0000b", "\n", "\u202e", "😀", "é" * 500, "a/b?c#d&e=f%20", "agent-x", "null"]
    rows = [{"id": f"agent-{number}", "name": name} for number, name in enumerate(names)]
    rows[1]["created_at"] = "1969-12-31T23:59:59+00:00"
    server.on("listing", status(200, rows))
    agents = await backend.agents()
    assert [agent.name for agent in agents] == names
    assert [agent.created for agent in agents[:3]] == [0, -1, 0]


async def test_failure_in_a_later_page_is_the_listings(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(200, [row(number) for number in range(PAGE)]), status(500))
    with pytest.raises(UpstreamInvalid):
        await backend.agents()


# Finding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["friend", "a b&c=d/é?#%20+", "😀\u202e", "a\u0000\n", "../../health", "agent", "x" * 512]
)
async def test_find_by_name(server: RecordingServer, backend: RestBackend, name: str) -> None:
    rows = [{"id": "agent-1", "name": name}, {"id": "agent-2", "name": name}, {"id": "agent-3", "name": name + "r"}]
    server.on("listing", status(200, rows))
    assert await backend.find_agents(name) == [Agent("agent-1", name, 0), Agent("agent-2", name, 0)]
    (request,) = server.requests
    assert request.path == "/v1/agents/"
    assert request.query["name"] == name


async def test_find_matches_case(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(200, [{"id": "agent-1", "name": "Friend"}]))
    assert await backend.find_agents("friend") == []


async def test_find_by_id(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent", status(200, {"id": AGENT, "name": "friend", "created_at": "2026-01-01T00:00:00Z"}))
    assert await backend.find_agents(AGENT) == [Agent(AGENT, "friend", 1_767_225_600)]
    assert [request.path for request in server.requests] == ["/v1/agents/", f"/v1/agents/{AGENT}"]


async def test_find_by_a_name_that_is_another_agents_id(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(200, [{"id": "agent-2", "name": AGENT}]))
    server.on("agent", status(200, {"id": AGENT, "name": "friend"}))
    assert [agent.id for agent in await backend.find_agents(AGENT)] == ["agent-2", AGENT]


@pytest.mark.parametrize("number", [404, 422, 400])
async def test_find_what_is_not_there(server: RecordingServer, backend: RestBackend, number: int) -> None:
    server.on("agent", status(number, {"detail": "no such agent"}))
    assert await backend.find_agents("agent-nobody") == []
    assert server.requests[-1].path == "/v1/agents/agent-nobody"


@pytest.mark.parametrize(
    "name", ["agent-", f"{AGENT}/export", "agent-1/../../x", "agent-%2e%2e/x", "agent-a?b", "agent-\u0000", "agent-é"]
)
async def test_what_cannot_be_an_id_is_no_path(server: RecordingServer, backend: RestBackend, name: str) -> None:
    assert await backend.find_agents(name) == []
    assert [request.path for request in server.requests] == ["/v1/agents/"]


@pytest.mark.parametrize("number", [401, 500, 503])
async def test_find_does_not_hide_failures(server: RecordingServer, backend: RestBackend, number: int) -> None:
    server.on("agent", status(number))
    with pytest.raises(GatewayError):
        await backend.find_agents(AGENT)


# Failures ------------------------------------------------------------------------------------------------------------

STATUSES: Final = [
    (status(400), UpstreamRejected, "upstream_rejected"),
    (status(401), UpstreamAuthFailed, "upstream_auth_failed"),
    (status(402), UpstreamQuotaExceeded, "insufficient_quota"),
    (status(403), UpstreamAuthFailed, "upstream_auth_failed"),
    (status(408), UpstreamTimeout, "upstream_timeout"),
    (status(409), ConversationBusy, "conversation_busy"),
    (status(418), UpstreamInvalid, "upstream_error"),
    (status(422, {"detail": []}), UpstreamRejected, "upstream_rejected"),
    (status(429), UpstreamRateLimited, "upstream_rate_limited"),
    (status(500, "<html>secret</html>"), UpstreamInvalid, "upstream_error"),
    (status(502), UpstreamInvalid, "upstream_error"),
    (status(503), UpstreamUnavailable, "upstream_unavailable"),
    (status(504), UpstreamTimeout, "upstream_timeout"),
    (status(301, "", {"Location": "/v1/elsewhere"}), UpstreamInvalid, "upstream_error"),
    (status(307, "", {"Location": "/v1/elsewhere"}), UpstreamInvalid, "upstream_error"),
    (garbage(), UpstreamUnavailable, "upstream_unavailable"),
    (garbage(b""), UpstreamUnavailable, "upstream_unavailable"),
    (garbage(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n["), UpstreamUnavailable, "upstream_unavailable"),
]
UNREADABLE: Final = [
    status(200, "<html>Welcome</html>", {"Content-Type": "text/html"}),
    status(200, b""),
    status(204),
    status(200, b"\xff\xfe"),
    status(200, b"[" * 100_000),
    status(200, "null"),
    status(200, '{"id":'),
    status(200, [{"id": 1}]),
    status(200, {"data": []}),
]
BROKEN: Final = [(answer, UpstreamInvalid, "upstream_invalid_response") for answer in UNREADABLE]


# A listing says nothing that could be wrong: who rejects it is no Letta.
LISTED: Final = [
    (answer, UpstreamInvalid, "upstream_invalid_response") if kind is UpstreamRejected else (answer, kind, code)
    for answer, kind, code in STATUSES
]


@pytest.mark.parametrize(("answer", "kind", "code"), [*LISTED, *BROKEN])
async def test_listing_that_fails(
    server: RecordingServer, backend: RestBackend, answer: Answer, kind: type[GatewayError], code: str
) -> None:
    server.on("listing", answer)
    with pytest.raises(kind) as raised:
        await backend.agents()
    assert raised.value.code == code
    assert "secret" not in raised.value.message
    assert len(server.requests) == 1  # neither retried nor followed elsewhere


@pytest.mark.parametrize(("answer", "kind", "code"), [*STATUSES, *BROKEN, (status(404), AgentGone, "agent_gone")])
async def test_health_that_fails(
    server: RecordingServer, backend: RestBackend, answer: Answer, kind: type[GatewayError], code: str
) -> None:
    server.on("health", answer)
    with pytest.raises(kind) as raised:
        await backend.ping()
    assert raised.value.code == code
    assert len(server.requests) == 1


@pytest.mark.parametrize(("answer", "kind", "code"), STATUSES)
async def test_cancel_that_fails(
    server: RecordingServer, backend: RestBackend, answer: Answer, kind: type[GatewayError], code: str
) -> None:
    server.on("cancel", answer)
    with pytest.raises(kind) as raised:
        await backend.cancel_run(AGENT, "run-1")
    assert raised.value.code == code
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", UNREADABLE)
async def test_what_a_cancel_answers_does_not_matter(
    server: RecordingServer, backend: RestBackend, answer: Answer
) -> None:
    server.on("cancel", answer)
    await backend.cancel_run(AGENT, "run-1")


async def test_404_for_the_listing_is_no_letta(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(404, {"detail": "Not Found"}))
    for asking in (backend.agents(), backend.find_agents("friend")):
        with pytest.raises(UpstreamInvalid) as raised:
            await asking
        assert (raised.value.status, raised.value.code) == (502, "upstream_invalid_response")


async def test_nobody_listens(server: RecordingServer, backend: RestBackend) -> None:
    await server.stop()
    for asking in (backend.agents(), backend.find_agents("friend"), backend.ping(), backend.cancel_run(AGENT, "run-1")):
        with pytest.raises(UpstreamUnavailable) as raised:
            await asking
        assert (raised.value.status, raised.value.should_retry) == (503, True)
        assert raised.value.retry_after


async def drip(exchange: Exchange) -> None:
    """Begin an answer that goes on byte by byte."""
    await exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not exchange.left:
        await exchange.raw(b" ")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("ending", [silence(), drip])
async def test_server_that_does_not_come_to_an_end(
    server: RecordingServer, backend: RestBackend, monkeypatch: pytest.MonkeyPatch, ending: Answer
) -> None:
    monkeypatch.setattr(rest, "CONTROL_TIMEOUT", 0.2)
    monkeypatch.setattr(rest, "PING_TIMEOUT", 0.2)
    for kind in ("listing", "health", "cancel"):
        server.on(kind, ending)
    for asking in (backend.agents(), backend.ping(), backend.cancel_run(AGENT, "run-1")):
        async with asyncio.timeout(1):
            with pytest.raises(UpstreamTimeout) as raised:
                await asking
        assert raised.value.status == 504


# The breaker ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def timed(backend: RestBackend) -> Clock:
    """Give the backend's breaker a clock of the test's."""
    clock = Clock()
    backend._breaker = Breaker(clock)
    return clock


async def fail(asking: Callable[[], Awaitable[object]], times: int = FAILURES_TO_OPEN) -> None:
    for _ in range(times):
        with pytest.raises(GatewayError):
            await asking()


@pytest.mark.parametrize("answer", [status(502), status(503), status(504), garbage()])
async def test_breaker_opens_and_recovers(server: RecordingServer, backend: RestBackend, answer: Answer) -> None:
    clock = timed(backend)
    server.on("listing", answer)
    await fail(backend.agents)
    assert backend.metrics.breaker_open._value.get() == 1
    for asking in (backend.agents(), backend.find_agents("friend"), backend.turn(said_to(AGENT)).open()):
        with pytest.raises(UpstreamUnavailable) as raised:
            await asking
        assert raised.value.retry_after == pytest.approx(FIRST_PAUSE)
    assert len(server.requests) == FAILURES_TO_OPEN

    server.on("listing", status(200, []))
    clock.now += FIRST_PAUSE
    assert await backend.agents() == []
    assert backend.metrics.breaker_open._value.get() == 0
    assert await backend.agents() == []


async def test_breaker_opens_where_nobody_listens(server: RecordingServer, backend: RestBackend) -> None:
    clock = timed(backend)
    await server.stop()
    await fail(backend.agents)
    assert backend.metrics.breaker_open._value.get() == 1
    clock.now += FIRST_PAUSE
    await fail(backend.agents, 1)  # the probe
    with pytest.raises(UpstreamUnavailable) as raised:
        await backend.agents()
    assert raised.value.retry_after == pytest.approx(2 * FIRST_PAUSE)
    async with server:
        clock.now += 2 * FIRST_PAUSE
        assert await backend.agents() == []


@pytest.mark.parametrize("answer", [*UNREADABLE, *(status(number) for number in (400, 401, 404, 409, 422, 429, 500))])
async def test_breaker_stays_shut_while_something_answers(
    server: RecordingServer, backend: RestBackend, answer: Answer
) -> None:
    server.on("listing", answer)
    await fail(backend.agents, 2 * FAILURES_TO_OPEN)
    assert len(server.requests) == 2 * FAILURES_TO_OPEN
    assert backend.metrics.breaker_open._value.get() == 0


async def test_an_answer_between_failures_counts(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(503))
    await fail(backend.agents, FAILURES_TO_OPEN - 1)
    server.on("listing", status(200, "<html>"))
    await fail(backend.agents, 1)
    server.on("listing", status(503))
    await fail(backend.agents, FAILURES_TO_OPEN - 1)
    assert backend.metrics.breaker_open._value.get() == 0


async def test_ping_shows_that_the_breaker_refuses_no_more(server: RecordingServer, backend: RestBackend) -> None:
    """Nobody asks for anything but how Letta fares: it was down, and is well again."""
    server.on("listing", status(503))
    server.on("health", status(503))
    await fail(backend.agents)
    await fail(backend.ping, 1)
    assert backend.metrics.breaker_open._value.get() == 1
    server.on("listing", status(200, []))
    server.on("health", status(200, HEALTH))
    await backend.ping()
    assert backend.metrics.breaker_open._value.get() == 0
    assert await backend.agents() == []


async def test_ping_lets_the_breaker_be_while_only_other_questions_fail(
    server: RecordingServer, backend: RestBackend
) -> None:
    clock = timed(backend)
    await backend.ping()
    server.on("listing", status(503))
    await fail(backend.agents)
    await backend.ping()
    assert backend.metrics.breaker_open._value.get() == 1
    clock.now += FIRST_PAUSE
    await backend.ping()
    assert backend.metrics.breaker_open._value.get() == 0, "the next one would be let through"
    await fail(backend.agents, 1)
    assert backend.metrics.breaker_open._value.get() == 1


async def test_ping_and_cancel_pass_by_the_breaker(server: RecordingServer, backend: RestBackend) -> None:
    timed(backend)
    server.on("health", status(503))
    server.on("cancel", status(503))
    await fail(backend.ping, FAILURES_TO_OPEN)
    await fail(lambda: backend.cancel_run(AGENT, "run-1"))
    assert backend.metrics.breaker_open._value.get() == 0

    server.on("listing", status(503))
    await fail(backend.agents)
    server.on("health", status(200, HEALTH))
    server.on("cancel", status(200, {}))
    await backend.ping()
    await backend.cancel_run(AGENT, "run-1")
    with pytest.raises(UpstreamUnavailable):  # readiness says what is; the breaker finds out by itself
        await backend.agents()


# Conversations and what an agent is ----------------------------------------------------------------------------------

PROFILE: Final = {
    "agent_type": "letta_v1_agent",
    "description": "A friend.",
    "model": "openai/gpt",
    "tools": [{"id": "tool-1", "name": "memory", "tags": []}],
    "blocks": [],
}


async def test_new_conversation(server: RecordingServer, backend: RestBackend) -> None:
    assert await backend.new_conversation(AGENT) == CONVERSATION
    (request,) = server.requests
    assert (request.kind, request.query) == ("new conversation", {"agent_id": AGENT})


async def test_deleted_conversation_is_deleted_whether_or_not_it_is_there(
    server: RecordingServer, backend: RestBackend
) -> None:
    server.on("delete conversation", status(200, b"null"), status(404, {"detail": "Conversation not found"}))
    for _ in range(2):
        await backend.delete_conversation(CONVERSATION)
    assert [request.kind for request in server.requests] == ["delete conversation"] * 2
    assert CONVERSATION in server.requests[0].path


async def test_details_are_those_of_now_and_a_profile_is_kept(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent", status(200, PROFILE))
    assert await backend.details(AGENT) == AgentDetails("A friend.", "openai/gpt", ("memory",))
    await backend.profile(AGENT)
    assert len(server.asked("agent")) == 1
    await backend.details(AGENT)
    assert len(server.asked("agent")) == 2
    assert server.requests[0].query == {"include": "agent.tools"}


@pytest.mark.parametrize("question", ["details", "new_conversation"])
async def test_agent_that_is_gone(server: RecordingServer, backend: RestBackend, question: str) -> None:
    server.on("new conversation", status(404, {"detail": "Agent not found"}))
    with pytest.raises(AgentGone):
        await getattr(backend, question)(AGENT)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("details", "agent"),
        ("new_conversation", "new conversation"),
        ("delete_conversation", "delete conversation"),
        ("clean_up", "tools"),
    ],
)
async def test_every_question_has_a_deadline(
    server: RecordingServer, backend: RestBackend, monkeypatch: pytest.MonkeyPatch, question: str, kind: Kind
) -> None:
    monkeypatch.setattr(rest, "CONTROL_TIMEOUT", 0.05)
    server.on(kind, silence())
    asked = getattr(backend, question)
    async with asyncio.timeout(2):
        with pytest.raises(UpstreamTimeout):
            await (asked() if question == "clean_up" else asked(AGENT))


@pytest.mark.parametrize(
    ("version", "agent_type", "way", "bridge"),
    [
        ("0.16.8", "letta_v1_agent", "auto", False),
        ("0.16.2", "letta_v1_agent", "auto", False),
        ("0.16.1", "letta_v1_agent", "auto", True),
        ("0.9", "letta_v1_agent", "auto", True),
        ("1.0.0rc1", "letta_v1_agent", "auto", False),
        ("0.16.8", "memgpt_v2_agent", "auto", True),
        ("0.16.8", "memgpt_v2_agent", "native", True),
        ("0.16.1", "letta_v1_agent", "native", False),
        ("0.16.8", "letta_v1_agent", "bridge", True),
    ],
)
async def test_who_needs_the_bridge(
    server: RecordingServer, make: MakeBackend, version: str, agent_type: str, way: str, *, bridge: bool
) -> None:
    server.on("health", status(200, {"version": version, "status": "ok"}))
    backend = make(client_tools=way)
    for _ in range(2):
        assert await backend.needs_bridge(AgentProfile(agent_type)) is bridge
    assert len(server.asked("health")) <= 1


@pytest.mark.parametrize(("version", "takes"), [("0.16.6", False), ("0.16.7", True), ("0.16.8", True), ("1.0", True)])
async def test_which_servers_take_overlays(
    server: RecordingServer, backend: RestBackend, version: str, *, takes: bool
) -> None:
    server.on("health", status(200, {"version": version, "status": "ok"}))
    for _ in range(2):
        assert await backend.takes_overlays() is takes
    assert len(server.asked("health")) == 1


async def test_server_that_tells_no_version_is_no_old_one(server: RecordingServer, backend: RestBackend) -> None:
    server.on("health", status(404))
    assert await backend.takes_overlays() is True
    assert await backend.needs_bridge(AgentProfile("letta_v1_agent")) is False


# The end -------------------------------------------------------------------------------------------------------------


async def test_close_closes_both(server: RecordingServer, make: MakeBackend) -> None:
    backend = make()
    await ask_everything(backend)
    assert server.open
    await backend.close()
    async with asyncio.timeout(2):
        while server.open:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert backend.session.closed
    assert backend._control.is_closed()
    await backend.close()


async def test_question_that_is_given_up_frees_its_connection(server: RecordingServer, make: MakeBackend) -> None:
    backend = make(limits=Limits(connect=1))
    server.on("listing", silence())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await backend.agents()
    async with asyncio.timeout(2):
        while server.open:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
