import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import pytest

from gateway.errors import AgentGone, ConversationGone, GatewayError, UpstreamInvalid, UpstreamRejected
from gateway.letta import app_server_turn
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server import SOCKETS, AppServerBackend, AppServerConfig
from gateway.letta.app_server_threads import MOVED
from gateway.letta.app_server_turn import AppServerTurn
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import AgentEvent, Stop
from gateway.translation.agent_turn import AgentTurn, Text, UserSaid
from tests.letta.batches import heard
from tests.letta.fake_app_server import (
    AGENT,
    OTHER,
    SOON,
    THREADS,
    WELL,
    Answer,
    FakeAppServer,
    conversation_row,
    hang,
    nothing_leaks,
    replies,
    turn,
    until,
)

CHAT = "local-conv-chat"

NewBackend: TypeAlias = Callable[..., AppServerBackend]


@pytest.fixture(autouse=True)
async def clean() -> AsyncIterator[None]:
    async with nothing_leaks():
        yield


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        server.conversations.append(conversation_row(CHAT, AGENT, wire.CHAT))
        yield server


@pytest.fixture
async def new_backend(server: FakeAppServer) -> AsyncIterator[NewBackend]:
    made: list[AppServerBackend] = []

    def new_backend(**options: Any) -> AppServerBackend:
        made.append(AppServerBackend(AppServerConfig(server.url, **options), Metrics(), TaskSet()))
        return made[-1]

    yield new_backend
    for backend in made:
        async with asyncio.timeout(SOON):
            await backend.close()
    await until(lambda: not server.open)


@pytest.fixture
async def backend(new_backend: NewBackend) -> AppServerBackend:
    return new_backend()


def in_chat(backend: AppServerBackend, conversation_id: str | None, agent_id: str = AGENT) -> AppServerTurn:
    news = (UserSaid((Text("Hi"),)),)
    return backend.turn(AgentTurn(agent_id=agent_id, conversation_id=conversation_id, news=news))


async def said_in(backend: AppServerBackend, conversation_id: str | None, agent_id: str = AGENT) -> list[AgentEvent]:
    """Return all events of a turn."""
    running = in_chat(backend, conversation_id, agent_id)
    try:
        async with asyncio.timeout(SOON):
            await running.open()
            return await heard(running)
    finally:
        running.close()


def places(server: FakeAppServer) -> list[str]:
    return [command["runtime"]["conversation_id"] for command in server.asked("input")]


# Conversations -------------------------------------------------------------------------------------------------------


async def test_conversation_that_was_there_before_is_started_once(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    for _ in range(2):
        assert (await said_in(backend, CHAT))[-1] == Stop("end_turn")
    (start,) = server.asked("runtime_start")
    assert (start["agent_id"], start["conversation_id"], start["mode"]) == (AGENT, CHAT, "unrestricted")
    assert "external_tools" not in start
    assert places(server) == [CHAT, CHAT]
    assert server.asked("conversation_list") == []


async def test_new_conversation_is_made_for_people_to_recognise(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    made = await backend.new_conversation(AGENT)
    assert server.conversations[-1]["id"] == made
    (creation,) = server.asked("conversation_create")
    assert creation["body"] == {"agent_id": AGENT, "summary": "Chat by letta-gateway"}
    for _ in range(2):
        assert (await said_in(backend, made))[-1] == Stop("end_turn")
    assert server.asked("runtime_start") == [], "an input starts it as well"
    assert places(server) == [made, made]


async def test_new_conversation_is_no_agents_own_thread(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.conversations.clear()
    made = await backend.new_conversation(AGENT)
    await said_in(backend, None)
    assert places(server) != [made]
    (listing,) = server.asked("conversation_list")
    assert listing["query"]["summary_search"].lower() not in wire.CHAT.lower()


async def test_agent_that_is_not_there_has_no_conversation(backend: AppServerBackend) -> None:
    with pytest.raises(AgentGone):
        await backend.new_conversation("agent-nobody")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(replies(success=False, error="no"), UpstreamRejected), (replies(conversation={"id": 7}), UpstreamInvalid)],
)
async def test_conversation_that_cannot_be_made(
    server: FakeAppServer, backend: AppServerBackend, answer: Answer, kind: type[GatewayError]
) -> None:
    server.on("conversation_create", answer)
    with pytest.raises(kind):
        await backend.new_conversation(AGENT)


async def test_conversation_that_is_not_there(server: FakeAppServer, backend: AppServerBackend) -> None:
    for _ in range(2):
        with pytest.raises(ConversationGone) as raised:
            await said_in(backend, "local-conv-gone")
        assert raised.value.code == "conversation_gone"
    assert server.asked("input") == []


async def test_conversation_that_is_put_away(server: FakeAppServer, backend: AppServerBackend) -> None:
    await said_in(backend, CHAT)
    await backend.delete_conversation(CHAT)
    assert server.conversations[-1]["archived"] is True
    assert server.conversations[-1]["summary"] == wire.CHAT
    assert not backend.threads._chats
    assert all(slot.socket is None or not slot.socket.started for slot in backend._slots)


async def test_conversation_that_is_put_away_before_it_was_used(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    made = await backend.new_conversation(AGENT)
    await backend.delete_conversation(made)
    assert server.conversations[-1]["archived"] is True
    assert not backend.threads._new


async def test_conversation_that_is_not_there_to_be_put_away(backend: AppServerBackend) -> None:
    await backend.delete_conversation("local-conv-gone")


async def test_conversation_that_cannot_be_put_away(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("conversation_update", replies(success=False, error="disk full"))
    with pytest.raises(UpstreamRejected):
        await backend.delete_conversation(CHAT)


async def test_conversations_are_spread_over_the_sockets(server: FakeAppServer, backend: AppServerBackend) -> None:
    chats = [await backend.new_conversation(AGENT) for _ in range(30)]
    await asyncio.gather(*(said_in(backend, chat) for chat in chats))
    await asyncio.gather(*(said_in(backend, chat) for chat in chats))
    assert server.connections == SOCKETS
    assert sorted(places(server)) == sorted(chats * 2)


# Copies --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_server_turn, "SETTLE", 0.1)


async def leave_stuck(server: FakeAppServer, backend: AppServerBackend, conversation_id: str) -> None:
    """Cancel a turn that does not end."""
    server.on("input", turn(hang), WELL)
    server.on("abort_message", replies(aborted=True))
    running = in_chat(backend, conversation_id)
    await running.open()
    await running.cancel()
    running.close()


@pytest.mark.usefixtures("short_waits")
async def test_conversation_whose_turn_does_not_end_goes_on_in_a_copy(
    server: FakeAppServer, backend: AppServerBackend, new_backend: NewBackend
) -> None:
    await leave_stuck(server, backend, CHAT)
    rows = {row["id"]: row for row in server.conversations}
    (copy,) = set(rows) - {CHAT, *THREADS.values()}
    assert rows[CHAT]["archived"] is True
    assert rows[CHAT]["summary"] == f"{MOVED}{copy}"
    server.on("runtime_start", _start_as_told)
    for gateway in (backend, new_backend()):  # the second one as after a restart
        for _ in range(2):
            assert (await said_in(gateway, CHAT))[-1] == Stop("end_turn")
    assert places(server) == [CHAT, copy, copy, copy, copy]
    assert (await said_in(backend, None))[-1] == Stop("end_turn")
    assert places(server)[-1] == THREADS[AGENT]


async def _start_as_told(exchange: Any) -> None:
    wanted = exchange.command["conversation_id"]
    (row,) = (row for row in exchange.server.conversations if row["id"] == wanted)
    await exchange.reply(runtime=exchange.runtime, conversation=row)


@pytest.mark.usefixtures("short_waits")
async def test_copy_is_put_away_with_its_conversation(server: FakeAppServer, backend: AppServerBackend) -> None:
    await leave_stuck(server, backend, CHAT)
    await backend.delete_conversation(CHAT)
    assert [row["id"] for row in server.conversations if not row.get("archived")] == [*THREADS.values()]


async def test_conversations_that_go_on_in_one_another(server: FakeAppServer, backend: AppServerBackend) -> None:
    rows = [conversation_row("a", AGENT, f"{MOVED}b"), conversation_row("b", AGENT, f"{MOVED}a")]
    server.conversations += rows
    server.on("runtime_start", _start_as_told)
    with pytest.raises(UpstreamInvalid):
        await said_in(backend, "a")


# Own threads: the rest of it is in ``test_app_server.py`` ------------------------------------------------------------


async def test_own_threads_and_conversations_do_not_mix(server: FakeAppServer, backend: AppServerBackend) -> None:
    asked = ((None, AGENT), (CHAT, AGENT), (None, OTHER))
    await asyncio.gather(*(said_in(backend, conversation, agent) for conversation, agent in asked))
    assert sorted(places(server)) == sorted([THREADS[AGENT], CHAT, THREADS[OTHER]])


# Where a conversation stands -----------------------------------------------------------------------------------------


async def test_conversation_is_found_without_being_started(server: FakeAppServer, backend: AppServerBackend) -> None:
    assert await backend.threads.find(AGENT, None) == wire.Runtime(AGENT, "local-conv-1")
    assert await backend.threads.find(AGENT, CHAT) == wire.Runtime(AGENT, CHAT)
    assert await backend.threads.find(AGENT, "local-conv-none") is None
    assert await backend.threads.find("agent-local-none", None) is None
    assert server.asked("runtime_start") == server.asked("conversation_create") == []


async def test_conversation_that_moved_is_found_where_it_goes_on(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    server.conversations[-1]["summary"] = f"{MOVED}local-conv-8"
    server.conversations.append(conversation_row("local-conv-8", AGENT, f"{MOVED}local-conv-9"))
    server.conversations.append(conversation_row("local-conv-9", AGENT, wire.CHAT))
    assert await backend.threads.find(AGENT, CHAT) == wire.Runtime(AGENT, "local-conv-9")
