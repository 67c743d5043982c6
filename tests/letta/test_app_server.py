import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import pytest

from gateway.errors import (
    AgentGone,
    GatewayError,
    UpstreamAuthFailed,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.letta import app_server, app_server_threads
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.backend import Agent, AgentDetails, Capabilities
from gateway.letta.breaker import FAILURES_TO_OPEN
from gateway.letta.deadlines import Limits
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import AgentEvent, Stop, TextDelta
from gateway.translation.agent_turn import Text
from tests.letta.batches import heard, next_batch
from tests.letta.fake_app_server import (
    AGENT,
    MODELS,
    NAMES,
    OTHER,
    SOON,
    THREADS,
    Answer,
    FakeAppServer,
    agent_row,
    close,
    conversation_row,
    cut_off,
    finished,
    hang,
    nothing_leaks,
    raw,
    replies,
    says,
    turn,
    until,
    wait,
)
from tests.said import said_to

NewBackend: TypeAlias = Callable[..., AppServerBackend]


@pytest.fixture(autouse=True)
async def clean() -> AsyncIterator[None]:
    async with nothing_leaks():
        yield


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        yield server


@pytest.fixture
async def new_backend(server: FakeAppServer) -> AsyncIterator[NewBackend]:
    made: list[AppServerBackend] = []

    def new_backend(**options: Any) -> AppServerBackend:
        config = AppServerConfig(options.pop("url", server.url), **options)
        made.append(AppServerBackend(config, Metrics(), TaskSet()))
        return made[-1]

    yield new_backend
    for backend in made:
        async with asyncio.timeout(SOON):
            await backend.close()
        assert not backend._readers
    await until(lambda: not server.open)


@pytest.fixture
async def backend(new_backend: NewBackend) -> AppServerBackend:
    return new_backend()


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_server, "CONTROL_TIMEOUT", 0.1)
    monkeypatch.setattr(app_server, "PING_TIMEOUT", 0.1)


async def said_by(backend: AppServerBackend, agent_id: str = AGENT) -> list[AgentEvent]:
    """Return all events of a turn."""
    running = backend.turn(said_to(agent_id, Text("Hi")))
    try:
        async with asyncio.timeout(SOON):
            await running.open()
            return await heard(running)
    finally:
        running.close()


async def lose_all(server: FakeAppServer, backend: AppServerBackend) -> None:
    """Break every socket, and wait until that is noticed."""
    server.cut()
    await until(lambda: all(slot.socket is None or slot.socket.is_lost for slot in backend._slots))


def is_open(backend: AppServerBackend) -> bool:
    return bool(backend.metrics.breaker_open._value.get())


# Agents --------------------------------------------------------------------------------------------------------------


async def test_agents(server: FakeAppServer, backend: AppServerBackend) -> None:
    assert await backend.agents() == [Agent(agent_id, name, 0) for agent_id, name in NAMES.items()]
    (command,) = server.asked("agent_list")
    assert command["query"] == {"limit": app_server.PAGE}


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_server, "PAGE", 10)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("count", [0, 9, 10, 11, 25])
async def test_agents_of_several_pages(server: FakeAppServer, backend: AppServerBackend, count: int) -> None:
    server.agents = {f"agent-{number}": agent_row(f"agent-{number}", "same") for number in range(count)}
    assert [agent.id for agent in await backend.agents()] == list(server.agents)
    assert len(server.asked("agent_list")) == count // 10 + 1


@pytest.mark.usefixtures("small_pages")
async def test_server_that_gives_the_same_page_again(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("agent_list", replies(agents=[agent_row(f"agent-{number}", "x") for number in range(10)]))
    assert len(await backend.agents()) == 10
    assert len(server.asked("agent_list")) == 2


@pytest.mark.usefixtures("small_pages")
async def test_server_that_has_no_last_page(
    server: FakeAppServer, backend: AppServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server, "MOST_PAGES", 2)
    server.agents = {f"agent-{number}": agent_row(f"agent-{number}", "x") for number in range(30)}
    with pytest.raises(UpstreamInvalid):
        await backend.agents()


async def test_agents_of_a_name(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.agents["agent-3"] = agent_row("agent-3", "friend")
    assert [agent.id for agent in await backend.find_agents("friend")] == [AGENT, "agent-3"]
    assert [agent.id for agent in await backend.find_agents(OTHER)] == [OTHER]
    assert await backend.find_agents("Friend") == []


async def test_agents_are_made_and_changed(server: FakeAppServer, backend: AppServerBackend) -> None:
    made = await backend.make_agent(wire.AgentBody(name="new", model=MODELS[1]))
    assert (made.name, made.model) == ("new", MODELS[1])
    changed = await backend.update_agent(made.id, wire.AgentBody(description="clever"))
    assert (changed.id, changed.name, changed.description) == (made.id, "new", "clever")
    assert [row.id for row in await backend.rows()] == [AGENT, OTHER, made.id]


async def test_agent_that_was_not_made(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("agent_create", replies(agent=None))
    with pytest.raises(UpstreamInvalid):
        await backend.make_agent(wire.AgentBody(name="new"))


async def test_what_an_agent_is(server: FakeAppServer, new_backend: NewBackend) -> None:
    server.agents[AGENT] |= {"description": "Knows much.", "model": None}
    backend = new_backend(server_tools={NAMES[AGENT]: ("Read", "Grep")})
    assert await backend.details(AGENT) == AgentDetails("Knows much.", None, ("Read", "Grep"))
    assert await backend.details(OTHER) == AgentDetails(None, MODELS[0], ())


async def test_what_an_agent_is_that_is_not_there(backend: AppServerBackend) -> None:
    with pytest.raises(AgentGone):
        await backend.details("agent-nobody")


async def test_what_the_server_can_do(backend: AppServerBackend) -> None:
    assert backend.capabilities == Capabilities(providers=False, parks=True)
    assert await backend.takes_overlays() is False


async def test_models(backend: AppServerBackend) -> None:
    assert await backend.models() == list(MODELS)


@pytest.mark.parametrize(
    "answer",
    [
        replies(success=False, error="no"),
        replies(agents="none"),
        replies(agents=[{"id": 7}]),
    ],
)
async def test_listing_that_fails(server: FakeAppServer, backend: AppServerBackend, answer: Answer) -> None:
    server.on("agent_list", answer)
    with pytest.raises(UpstreamInvalid):
        await backend.agents()


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("answer", [hang, raw('{"type":"agent_list_response"}'), raw("junk")])
async def test_listing_that_never_comes(server: FakeAppServer, backend: AppServerBackend, answer: Answer) -> None:
    server.on("agent_list", answer)
    with pytest.raises(UpstreamTimeout):
        await backend.agents()


@pytest.mark.parametrize("ending", [close, cut_off])
async def test_socket_that_is_lost_under_a_listing(
    server: FakeAppServer, backend: AppServerBackend, ending: Answer
) -> None:
    server.on("agent_list", ending, replies(agents=[]))
    with pytest.raises(UpstreamUnavailable):
        await backend.agents()
    assert await backend.agents() == []
    assert server.connections == 2


# The tools of the server's machine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "tools"),
    [
        ({}, {AGENT: (), OTHER: ()}),
        ({"*": ("Read",)}, {AGENT: ("Read",), OTHER: ("Read",)}),
        ({"friend": ("Bash",)}, {AGENT: ("Bash",), OTHER: ()}),
        ({AGENT: ("Bash", "Read"), "friend": ("Glob",), "*": ("Read",)}, {AGENT: ("Bash", "Read"), OTHER: ("Read",)}),
        ({"friend": (), "*": ("Read",)}, {AGENT: (), OTHER: ("Read",)}),
    ],
)
async def test_tools_that_an_agent_may_use(
    server: FakeAppServer,
    new_backend: NewBackend,
    allowed: dict[str, tuple[str, ...]],
    tools: dict[str, tuple[str, ...]],
) -> None:
    backend = new_backend(server_tools=allowed)
    await backend.agents()
    for agent_id, expected in tools.items():
        assert backend.tools_of(agent_id) == expected
        await said_by(backend, agent_id)
    for command in server.asked("input"):
        payload = command["payload"]
        allowed_there = list(tools[command["runtime"]["agent_id"]])
        assert payload["client_tool_allowlist"] == allowed_there
        assert payload["client_toolset"]["base"] == "none"
        assert payload["client_toolset"].get("include", []) == allowed_there


async def test_agent_whose_name_is_not_known_yet(new_backend: NewBackend) -> None:
    backend = new_backend(server_tools={"friend": ("Bash",), "*": ("Read",)})
    assert backend.tools_of(AGENT) == ("Read",)


# Threads -------------------------------------------------------------------------------------------------------------


async def test_thread_is_found_and_started_once(server: FakeAppServer, backend: AppServerBackend) -> None:
    for _ in range(3):
        assert (await said_by(backend))[-1] == Stop("end_turn")
    assert len(server.asked("conversation_list")) == 1
    (start,) = server.asked("runtime_start")
    assert (start["agent_id"], start["conversation_id"]) == (AGENT, THREADS[AGENT])


async def test_models_are_looked_up_before_the_first_turn(server: FakeAppServer, backend: AppServerBackend) -> None:
    """The server fails turns that come while it looks them up for another one."""
    for _ in range(2):
        await said_by(backend)
    kinds = [command["type"] for command in server.commands]
    assert kinds.count("list_models") == 1
    assert kinds.index("list_models") < kinds.index("input")
    await lose_all(server, backend)
    await said_by(backend)
    assert len(server.asked("list_models")) == 2, "it may be another server by now"


async def test_models_that_cannot_be_looked_up_stop_no_turn(
    server: FakeAppServer, backend: AppServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_threads, "MODELS_TIMEOUT", 0.1)
    server.on("list_models", hang)
    assert (await said_by(backend))[-1] == Stop("end_turn")


async def test_agent_without_a_thread_gets_one(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.conversations = [
        conversation_row("c-1", AGENT, "Something else"),
        conversation_row("c-2", AGENT, f"{wire.THREAD} and more"),
        conversation_row("c-3", OTHER, wire.THREAD),
        {"id": "c-4", "summary": wire.THREAD, "agent_id": None, "created_at": "2026"},
    ]
    for _ in range(2):
        assert (await said_by(backend))[-1] == Stop("end_turn")
    (creation,) = server.asked("conversation_create")
    assert creation["body"] == {"agent_id": AGENT, "summary": wire.THREAD}
    assert server.asked("runtime_start") == [], "an input starts it as well"
    made = server.conversations[-1]
    assert (made["agent_id"], made["summary"]) == (AGENT, wire.THREAD)
    assert {command["runtime"]["conversation_id"] for command in server.asked("input")} == {made["id"]}


async def test_new_thread_of_an_agent_that_may_use_tools(server: FakeAppServer, new_backend: NewBackend) -> None:
    """Only a started runtime lets them run without asking anybody."""
    backend = new_backend(server_tools={AGENT: ("Read",)})
    server.conversations.clear()
    for agent_id in (AGENT, OTHER, AGENT):
        assert (await said_by(backend, agent_id))[-1] == Stop("end_turn")
    made = {row["agent_id"]: row["id"] for row in server.conversations}
    (start,) = server.asked("runtime_start")
    assert (start["agent_id"], start["conversation_id"], start["mode"]) == (AGENT, made[AGENT], "unrestricted")
    kinds = [command["type"] for command in server.commands if command.get("agent_id") != OTHER]
    assert kinds.index("conversation_create") < kinds.index("runtime_start") < kinds.index("input")


async def test_new_thread_is_started_on_the_next_socket(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.conversations.clear()
    await said_by(backend)
    await lose_all(server, backend)
    assert (await said_by(backend))[-1] == Stop("end_turn")
    (start,) = server.asked("runtime_start")
    assert start["conversation_id"] == server.conversations[0]["id"]
    assert len(server.asked("conversation_create")) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (replies(success=False, conversation=None, error="no"), UpstreamRejected),
        (replies(success=False, error=f"Agent {AGENT} not found"), AgentGone),
        (replies(conversation=None), UpstreamRejected),
        (replies(conversation={"id": 7}), UpstreamInvalid),
    ],
)
async def test_thread_that_cannot_be_made(
    server: FakeAppServer, backend: AppServerBackend, answer: Answer, kind: type[GatewayError]
) -> None:
    server.conversations.clear()
    server.on("conversation_create", answer)
    with pytest.raises(kind):
        await said_by(backend)
    assert server.asked("input") == []


async def test_newest_of_several_threads(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.conversations = [
        conversation_row("c-1", AGENT, wire.THREAD, "2026-11-20T15:00:00Z"),
        conversation_row("c-2", AGENT, "Something else", "2026-11-20T13:00:00Z"),
        conversation_row("c-3", AGENT, None, "2026-11-20T13:00:00Z"),
        conversation_row("c-4", AGENT, wire.THREAD, "2026-11-20T14:00:00Z"),
        conversation_row("c-5", OTHER, wire.THREAD, "2026-11-20T13:00:00Z"),
    ]
    await said_by(backend)
    assert server.asked("input")[0]["runtime"]["conversation_id"] == "c-1"


async def test_one_listing_serves_all_agents(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.agents |= {f"agent-{number}": agent_row(f"agent-{number}", "x") for number in range(10)}
    said = await asyncio.gather(*(said_by(backend, agent_id) for agent_id in server.agents))
    assert all(events[-1] == Stop("end_turn") for events in said)
    assert len(server.asked("conversation_list")) == 1


async def test_thread_that_another_gateway_made_since(
    server: FakeAppServer, backend: AppServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_threads, "THREADS_TTL", 0.0)
    await said_by(backend)
    server.agents["agent-3"] = agent_row("agent-3", "x")
    server.conversations.append(conversation_row("c-3", "agent-3", wire.THREAD))
    await said_by(backend, "agent-3")
    assert server.asked("input")[-1]["runtime"]["conversation_id"] == "c-3"


async def test_thread_that_was_deleted(server: FakeAppServer, backend: AppServerBackend) -> None:
    await said_by(backend)
    server.conversations.clear()
    await lose_all(server, backend)
    assert (await said_by(backend))[-1] == Stop("end_turn")
    assert [row["agent_id"] for row in server.conversations] == [AGENT]


async def test_agent_that_is_not_there(server: FakeAppServer, backend: AppServerBackend) -> None:
    with pytest.raises(AgentGone):
        await said_by(backend, "agent-nope")


@pytest.mark.parametrize("error", ["busy for now", None])
async def test_thread_that_cannot_be_started_for_a_while_is_kept(
    server: FakeAppServer, backend: AppServerBackend, error: str | None
) -> None:
    started = replies(runtime={"agent_id": AGENT, "conversation_id": THREADS[AGENT]})
    server.on("runtime_start", replies(success=False, error=error), started)
    with pytest.raises(UpstreamRejected):
        await said_by(backend)
    assert server.asked("input") == []
    assert (await said_by(backend))[-1] == Stop("end_turn")
    assert server.asked("conversation_create") == []
    assert server.asked("input")[0]["runtime"]["conversation_id"] == THREADS[AGENT]


# Sockets -------------------------------------------------------------------------------------------------------------


async def test_turns_share_a_few_sockets(server: FakeAppServer, backend: AppServerBackend) -> None:
    agents = [f"agent-{number}" for number in range(40)]
    server.agents = {agent: agent_row(agent, "x") for agent in agents}
    gate = asyncio.Event()
    server.on("input", turn(says("Hi"), wait(gate), finished()))
    turns = [backend.turn(said_to(agent, Text("Hi"))) for agent in agents]
    await asyncio.gather(*(running.open() for running in turns))
    assert server.connections == app_server.SOCKETS
    gate.set()
    said = await asyncio.gather(*(heard(running) for running in turns))
    assert said == [[TextDelta("Hi"), Stop("end_turn")]] * len(agents)
    for running in turns:
        running.close()


async def test_who_comes_while_a_socket_is_opened_waits_for_it(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    server.door.clear()
    asked = [asyncio.get_running_loop().create_task(backend.agents()) for _ in range(20)]
    await asyncio.sleep(0.02)
    server.door.set()
    assert len({tuple(agents) for agents in await asyncio.gather(*asked)}) == 1
    assert server.connections == 1


async def test_key_goes_with_the_handshake(server: FakeAppServer, new_backend: NewBackend) -> None:
    server.token = "secret"
    assert len(await new_backend(api_key="secret").agents()) == 2


@pytest.mark.parametrize("url", ["{}", "{}/"])
async def test_url_with_and_without_a_slash(server: FakeAppServer, new_backend: NewBackend, url: str) -> None:
    await new_backend(url=url.format(server.url)).ping()


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_key_that_is_refused(server: FakeAppServer, new_backend: NewBackend, key: str | None) -> None:
    server.token = "secret"
    backend = new_backend(api_key=key)
    for ask in (backend.agents, backend.ping, lambda: said_by(backend)):
        with pytest.raises(UpstreamAuthFailed) as raised:
            await ask()
        assert raised.value.should_retry is False
    assert not is_open(backend)


@pytest.mark.parametrize(
    ("status", "kind"), [(403, UpstreamAuthFailed), (404, UpstreamInvalid), (501, UpstreamInvalid)]
)
async def test_handshake_that_is_refused(
    server: FakeAppServer, backend: AppServerBackend, status: int, kind: type[GatewayError]
) -> None:
    server.refuses = status
    with pytest.raises(kind):
        await backend.agents()
    server.refuses = None
    assert len(await backend.agents()) == 2
    assert backend._breaker._failures == 0


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_proxy_before_a_server_that_is_down(
    server: FakeAppServer, backend: AppServerBackend, status: int
) -> None:
    server.refuses = status
    with pytest.raises(UpstreamUnavailable) as raised:
        await backend.agents()
    assert (raised.value.should_retry, raised.value.retry_after) == (True, 2.0)
    assert backend._breaker._failures == 1
    server.refuses = None
    assert len(await backend.agents()) == 2


async def test_server_that_is_not_there(server: FakeAppServer, backend: AppServerBackend) -> None:
    await server.stop()
    for _ in range(FAILURES_TO_OPEN):
        assert not is_open(backend)
        with pytest.raises(UpstreamUnavailable) as raised:
            await backend.agents()
        assert raised.value.should_retry is True
    assert is_open(backend)
    async with server:
        with pytest.raises(UpstreamUnavailable) as raised:  # it is not even asked
            await said_by(backend)
        assert server.connections == 0
        assert (raised.value.retry_after or 0) > 0
        await backend.ping()  # asks what is, and closes the breaker
        assert not is_open(backend)
        assert (await said_by(backend, OTHER))[-1] == Stop("end_turn")
        await backend.close()


async def test_handshake_that_is_not_answered(server: FakeAppServer, new_backend: NewBackend) -> None:
    backend = new_backend(limits=Limits(connect=0.1))
    server.door.clear()
    with pytest.raises(UpstreamTimeout):
        await backend.agents()
    assert backend._breaker._failures == 1
    server.door.set()
    assert len(await backend.agents()) == 2
    assert backend._breaker._failures == 0


async def test_who_waits_for_a_handshake_that_fails_waits_for_few_others(
    server: FakeAppServer, new_backend: NewBackend
) -> None:
    backend = new_backend(limits=Limits(connect=0.1))
    server.door.clear()
    loop = asyncio.get_running_loop()
    started = loop.time()
    said = await asyncio.gather(*(backend.agents() for _ in range(12)), return_exceptions=True)
    server.door.set()
    assert loop.time() - started < 0.9, "as many tries as open the breaker, not one for each"
    failures = [UpstreamTimeout] * FAILURES_TO_OPEN
    assert [type(each) for each in said] == failures + [UpstreamUnavailable] * (12 - FAILURES_TO_OPEN)
    assert is_open(backend)


async def test_socket_that_is_lost_is_opened_again(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("input", turn(says("Hi"), finished()))
    for number in range(1, 4):
        assert await said_by(backend) == [TextDelta("Hi"), Stop("end_turn")]
        await lose_all(server, backend)
        assert len(server.asked("runtime_start")) == number


# Ping ----------------------------------------------------------------------------------------------------------------


async def test_ping(server: FakeAppServer, backend: AppServerBackend) -> None:
    for _ in range(3):
        await backend.ping()
    assert [command["type"] for command in server.commands] == ["app_server_info"] * 3
    assert server.connections == 1


async def test_ping_that_fails(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("app_server_info", replies(success=False))
    with pytest.raises(UpstreamInvalid):
        await backend.ping()


@pytest.mark.usefixtures("short_waits")
async def test_ping_that_is_not_answered(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("app_server_info", hang)
    with pytest.raises(UpstreamTimeout):
        await backend.ping()


@pytest.mark.usefixtures("short_waits")
async def test_ping_whose_handshake_is_not_answered(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.door.clear()
    with pytest.raises(UpstreamTimeout):
        await backend.ping()
    server.door.set()
    await backend.ping()


async def test_ping_of_a_server_that_is_not_there(server: FakeAppServer, backend: AppServerBackend) -> None:
    await server.stop()
    for number in range(FAILURES_TO_OPEN + 2):
        assert is_open(backend) is (number >= FAILURES_TO_OPEN)
        with pytest.raises(UpstreamUnavailable) as raised:
            await backend.ping()
        assert raised.value.__cause__ is not None, "it is asked, whatever the breaker says"
    async with server:
        await backend.ping()
        assert not is_open(backend)
        await backend.close()


# The end -------------------------------------------------------------------------------------------------------------


async def test_close_of_what_was_never_used(backend: AppServerBackend) -> None:
    await backend.close()


async def test_close_ends_what_is_under_way(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("input", turn(says("Hi"), hang))
    running = backend.turn(said_to(AGENT, Text("Hi")))
    await running.open()
    assert await next_batch(running) == [TextDelta("Hi")]
    await backend.close()
    with pytest.raises(GatewayError):
        await heard(running)
    assert running.ended
    running.close()
    await until(lambda: not server.open)
