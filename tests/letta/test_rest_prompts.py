import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.errors import AgentGone, UpstreamUnavailable
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_prompts import PAGE
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import AgentTurn, Text, UserSaid
from tests.letta.batches import heard
from tests.letta.recording_server import AGENT, Exchange, RecordingServer, status

CHATS = ["conv-1", "conv-2", "conv-3"]


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        server.on("conversations", status(200, [{"id": chat} for chat in CHATS]))
        yield server


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    tasks = TaskSet()
    yield tasks
    await tasks.close(1)


@pytest.fixture
async def backend(server: RecordingServer, tasks: TaskSet) -> AsyncIterator[RestBackend]:
    backend = RestBackend(RestConfig(server.url), Metrics(), tasks)
    yield backend
    await tasks.close(1)
    await backend.close()


def compiled(server: RecordingServer) -> list[str]:
    return [request.path.split("/")[-2] for request in server.asked("recompile conversation")]


async def until_idle(tasks: TaskSet) -> None:
    while len(tasks):  # noqa: ASYNC110 - it is seen from outside
        await asyncio.sleep(0.002)


async def test_all_conversations_are_compiled_behind_the_answer(
    server: RecordingServer, backend: RestBackend, tasks: TaskSet
) -> None:
    await backend.prompts.outdate(AGENT)
    assert server.asked("conversations")[0].query == {
        "agent_id": AGENT,
        "limit": "100",
        "order": "desc",
        "order_by": "last_message_at",
    }
    await until_idle(tasks)
    assert compiled(server) == CHATS
    await backend.prompts.see_current("conv-1")
    assert compiled(server) == CHATS


async def test_conversations_of_several_pages(server: RecordingServer, backend: RestBackend, tasks: TaskSet) -> None:
    first = [{"id": f"conv-{number}"} for number in range(PAGE)]
    server.on("conversations", status(200, first), status(200, [{"id": "conv-last"}]))
    await backend.prompts.outdate(AGENT)
    await until_idle(tasks)
    assert len(compiled(server)) == PAGE + 1
    assert server.asked("conversations")[1].query["after"] == f"conv-{PAGE - 1}"


async def test_turn_that_comes_first_waits_for_its_own_prompt(
    server: RecordingServer, backend: RestBackend, tasks: TaskSet
) -> None:
    gate = asyncio.Event()

    async def slowly(exchange: Exchange) -> None:
        await gate.wait()
        await status(200, "compiled")(exchange)

    server.on("recompile conversation", slowly, status(200, "compiled"))
    await backend.prompts.outdate(AGENT)
    running = backend.turn(AgentTurn(agent_id=AGENT, conversation_id="conv-1", news=(UserSaid((Text("Hi"),)),)))
    opening = asyncio.get_running_loop().create_task(running.open())
    await asyncio.sleep(0.05)
    assert server.asked("turn") == []
    gate.set()
    await opening
    kinds = [request.kind for request in server.requests]
    assert kinds.index("recompile conversation") < kinds.index("turn")
    await heard(running)
    running.close()
    await until_idle(tasks)
    assert sorted(compiled(server)) == CHATS


async def test_turn_of_another_thread_waits_for_nothing(server: RecordingServer, backend: RestBackend) -> None:
    await backend.prompts.see_current("conv-9")
    assert server.requests == []


async def test_what_failed_is_compiled_before_its_turn(
    server: RecordingServer, backend: RestBackend, tasks: TaskSet
) -> None:
    server.on("recompile conversation", status(503), status(503), status(200, "compiled"))
    await backend.prompts.outdate(AGENT)
    await until_idle(tasks)
    assert compiled(server) == ["conv-1"]
    with pytest.raises(UpstreamUnavailable):
        await backend.prompts.see_current("conv-1")
    for chat in CHATS:
        await backend.prompts.see_current(chat)
    assert compiled(server) == ["conv-1", "conv-1", *CHATS]


async def test_conversation_that_is_gone_and_server_that_compiles_by_itself(
    server: RecordingServer, backend: RestBackend, tasks: TaskSet
) -> None:
    server.on("recompile conversation", status(404), status(400), status(200, "compiled"))
    await backend.prompts.outdate(AGENT)
    await until_idle(tasks)
    assert compiled(server) == CHATS


async def test_memory_that_changes_while_a_prompt_is_compiled(
    server: RecordingServer, backend: RestBackend, tasks: TaskSet
) -> None:
    server.on("conversations", status(200, [{"id": "conv-1"}]))
    begun, gate = asyncio.Event(), asyncio.Event()

    async def slowly(exchange: Exchange) -> None:
        begun.set()
        await gate.wait()
        await status(200, "compiled")(exchange)

    server.on("recompile conversation", slowly, status(200, "compiled"))
    await backend.prompts.outdate(AGENT)
    await begun.wait()
    await backend.prompts.outdate(AGENT)
    gate.set()
    await until_idle(tasks)
    assert compiled(server) == ["conv-1", "conv-1"]


# A client's instructions ---------------------------------------------------------------------------------------------


async def say(backend: RestBackend, turn: AgentTurn) -> None:
    running = backend.turn(turn)
    try:
        await running.open()
        await heard(running)
    finally:
        running.close()


async def test_instructions_go_beside_the_prompt_and_stay_nowhere(
    server: RecordingServer, backend: RestBackend
) -> None:
    server.on("recompile", status(200, '"I am {Milo}."'))
    told = AgentTurn(agent_id=AGENT, news=(UserSaid((Text("Hi"),)),), overlay="Be {kind}.")
    await say(backend, told)
    (compiled,) = server.asked("recompile")
    assert compiled.query == {"dry_run": "true"}
    (sent,) = server.asked("turn")
    prompt = sent.json()["override_system"]
    assert prompt.startswith("I am {Milo}.\n\n<client_instructions>\n")
    assert prompt.endswith("\n\nBe {kind}.\n</client_instructions>\n")
    assert [message["content"] for message in sent.json()["messages"]] == ["Hi"]


async def test_turn_without_instructions_leaves_the_prompt_alone(server: RecordingServer, backend: RestBackend) -> None:
    await say(backend, AgentTurn(agent_id=AGENT, news=(UserSaid((Text("Hi"),)),)))
    (sent,) = server.asked("turn")
    assert "override_system" not in sent.json()
    assert server.asked("recompile") == []


async def test_agent_that_is_gone_when_it_is_instructed(server: RecordingServer, backend: RestBackend) -> None:
    server.on("recompile", status(404, {"detail": "no such agent"}))
    with pytest.raises(AgentGone):
        await say(backend, AgentTurn(agent_id=AGENT, news=(UserSaid((Text("Hi"),)),), overlay="Be kind."))
    assert server.asked("turn") == []
