"""Agents made by the gateway on both real Letta servers: what they are, what they remember, who answers for them."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from gateway.errors import AgentGone, InternalError, InvalidRequest, MemoryNotFound, ModelNotFound, UpstreamRejected
from gateway.letta.backend import PERSONAL_TAG, Agent, AgentBackend, AgentSpec, MemoryBlock, ModelProvider
from gateway.letta.catalog import Catalog
from gateway.letta.demo_model import RunningDemoModel
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import AgentTurn, Text, UserSaid
from tests.letta.batches import heard
from tests.live.app_server import AppServer
from tests.live.dying_turn import backend_of
from tests.live.letta_server import LettaServer

pytestmark = pytest.mark.services

SETTLED = 5.0
HUMAN = MemoryBlock("human", "The human is Ann.", "What is known of the human.")
PERSONA = MemoryBlock("persona", "I am Bo: careful.", "Who the agent is.")


@pytest.fixture
async def tasks() -> TaskSet:
    return TaskSet()


@pytest.fixture
async def backend(letta: LettaServer, tasks: TaskSet) -> AsyncIterator[AgentBackend]:
    await asyncio.to_thread(letta.start)
    backend = backend_of(letta.kind, letta.base_url, tasks)
    yield backend
    await tasks.close(SETTLED)
    await backend.close()


def spec_of(user: str, **more: object) -> AgentSpec:
    fields = {"name": f"agent of {user}", "tags": (PERSONAL_TAG, f"{PERSONAL_TAG}:{user}"), **more}
    return AgentSpec(blocks=(HUMAN, PERSONA), **fields)  # type: ignore[arg-type]


@pytest.fixture
async def personal(backend: AgentBackend) -> AsyncIterator[Agent]:
    made = await backend.create_agent(spec_of(str(uuid.uuid4())))
    yield made
    await backend.delete_agent(made.id)


async def say(backend: AgentBackend, agent: Agent, text: str, place: str | None = None) -> None:
    running = backend.turn(AgentTurn(agent_id=agent.id, conversation_id=place, news=(UserSaid((Text(text),)),)))
    try:
        async with asyncio.timeout(20):
            await running.open()
            await heard(running)
    finally:
        running.close()


def seen(model: RunningDemoModel) -> str:
    """Return what the model was asked last, whole; the App Server's own reflection on a chat is passed over."""
    asked = (bytes(request.body).decode() for request in reversed(model.requests))
    return next(text for text in asked if "You are a reflection subagent" not in text)


async def test_agent_is_found_by_its_tags_and_by_nothing_else(
    backend: AgentBackend, personal: Agent, letta: LettaServer
) -> None:
    own_tag = personal.tags[1]
    assert [agent.id for agent in await backend.find_tagged(own_tag)] == [personal.id]
    assert personal.id in {agent.id for agent in await backend.find_tagged(PERSONAL_TAG)}
    assert await backend.find_tagged(f"{PERSONAL_TAG}:{uuid.uuid4()}") == []
    assert {*personal.tags} <= {*next(agent for agent in await backend.agents() if agent.id == personal.id).tags}

    tasks = TaskSet()
    catalog = Catalog(backend, tasks, ttl=30.0)
    public = await asyncio.to_thread(letta.create_agent)
    listed = await catalog.models()
    assert listed.get(public.id) is not None
    assert listed.get(personal.id) is None
    for name in (personal.id, personal.name):
        with pytest.raises(ModelNotFound):
            await catalog.resolve(name)
    await asyncio.to_thread(letta.delete_agent, public.id)
    await tasks.close(1)


async def test_memory_that_is_written_is_what_the_model_sees(
    backend: AgentBackend, personal: Agent, model: RunningDemoModel, tasks: TaskSet
) -> None:
    place = await backend.new_conversation(personal.id)
    for thread in (None, place):
        await say(backend, personal, "hello", thread)
        for block in (HUMAN, PERSONA):
            assert block.value in seen(model)
            assert block.description is not None and block.description in seen(model)  # noqa: PT018
    assert [(block.label, block.value, block.description) for block in await backend.memory(personal.id)] == [
        (block.label, block.value, block.description) for block in (HUMAN, PERSONA)
    ]

    said = 'The human is Cleo.\n---\nShe said: "äöü".'
    written = await backend.write_memory(personal.id, "human", said)
    assert (written.label, written.value, written.description) == ("human", said, HUMAN.description)
    assert (await backend.memory(personal.id))[0].value == said
    await say(backend, personal, "at once", place)
    assert "Cleo" in seen(model)
    for thread in (place, None, place):
        await say(backend, personal, "and later", thread)
        assert "Cleo" in seen(model)
        assert "Ann" not in seen(model)

    await backend.write_memory(personal.id, "human", "")
    assert [block.value for block in await backend.memory(personal.id)] == ["", PERSONA.value]
    await backend.write_memory(personal.id, "human", "Dora.")
    assert [block.value for block in await backend.memory(personal.id)] == ["Dora.", PERSONA.value]


async def test_memory_that_is_written_while_its_agent_answers(
    backend: AgentBackend, personal: Agent, model: RunningDemoModel
) -> None:
    """A prompt that is compiled while a turn begins is lost on the App Server, as a rule once in three times."""
    place = await backend.new_conversation(personal.id)
    await say(backend, personal, "hello", place)
    for name in ("Cleo", "Dora", "Eve", "Fay"):
        async with asyncio.TaskGroup() as group:
            group.create_task(say(backend, personal, "meanwhile", place))
            await backend.write_memory(personal.id, "human", f"The human is {name}.")
        for _ in range(2):
            await say(backend, personal, "and later", place)
            assert f"The human is {name}." in seen(model)


async def test_memory_that_is_not_there(backend: AgentBackend, personal: Agent) -> None:
    for label in ("nothing", "../human", "a/b", "human.md", "MEMORY", ""):
        with pytest.raises(MemoryNotFound):
            await backend.write_memory(personal.id, label, "x")
    gone = f"{personal.id[:-12]}{'0' * 12}"
    with pytest.raises(AgentGone):
        await backend.memory(gone)
    with pytest.raises(AgentGone):
        await backend.write_memory(gone, "human", "x")


async def test_deleted_agent_is_gone_and_may_be_deleted_again(backend: AgentBackend) -> None:
    made = await backend.create_agent(spec_of(str(uuid.uuid4())))
    await say(backend, made, "hello")
    for _ in range(2):
        await backend.delete_agent(made.id)
    assert await backend.find_tagged(made.tags[1]) == []
    with pytest.raises(AgentGone):
        await backend.details(made.id)
    with pytest.raises(AgentGone):
        await backend.memory(made.id)


async def test_memory_of_a_deleted_agent_is_empty_on_the_app_servers_disk(
    app_server: AppServer, tasks: TaskSet
) -> None:
    await asyncio.to_thread(app_server.start)
    backend = backend_of("app_server", app_server.base_url, tasks)
    made = await backend.create_agent(spec_of(str(uuid.uuid4())))
    await say(backend, made, "hello")
    await backend.write_memory(made.id, "human", "Ann, whose secret is 42.")
    assert any("secret is 42" in text for text in app_server.memory_files(made.id))
    await backend.delete_agent(made.id)
    assert not any("42" in text or PERSONA.value in text for text in app_server.memory_files(made.id))
    await tasks.close(SETTLED)
    await backend.close()


async def test_model_that_the_server_does_not_offer(backend: AgentBackend) -> None:
    for model in ("nowhere/nothing", "nothing"):
        with pytest.raises(UpstreamRejected):
            await backend.create_agent(spec_of("nobody", model=model))
    assert await backend.find_tagged(f"{PERSONAL_TAG}:nobody") == []


async def test_tools_that_the_server_lacks_are_left_out(backend: AgentBackend, letta: LettaServer) -> None:
    tools = ("memory_insert", "send_message", "no_such_tool", "conversation_search")
    made = await backend.create_agent(spec_of(str(uuid.uuid4()), tools=tools))
    expected = {"memory_insert", "conversation_search"} if letta.kind == "v1" else set()
    assert {*(await backend.details(made.id)).tools} == expected
    await backend.delete_agent(made.id)


async def test_provider_where_the_server_takes_none(backend: AgentBackend, model: RunningDemoModel) -> None:
    if backend.capabilities.providers:
        pytest.skip("it takes them: see test_providers.py")
    with pytest.raises(InternalError):
        await backend.create_agent(spec_of("ann", provider=ModelProvider("test-ann", model.base_url, "key")))
    await backend.delete_provider("nobody's")


async def test_text_that_is_longer_than_its_block(backend: AgentBackend, letta: LettaServer) -> None:
    spec = AgentSpec(name="short", blocks=(MemoryBlock("human", "", limit=5),))
    made = await backend.create_agent(spec)
    assert (await backend.write_memory(made.id, "human", "12345")).value == "12345"
    if letta.kind == "v1":
        with pytest.raises(InvalidRequest):
            await backend.write_memory(made.id, "human", "123456")
        assert (await backend.memory(made.id))[0].value == "12345"
    await backend.delete_agent(made.id)
