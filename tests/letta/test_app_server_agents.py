from collections.abc import AsyncIterator

import pytest

from gateway.errors import InternalError, UpstreamRejected
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.backend import Agent, AgentSpec, MemoryBlock, ModelProvider
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.letta.fake_app_server import AGENT, MODELS, OTHER, FakeAppServer, replies


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        yield server


@pytest.fixture
async def backend(server: FakeAppServer) -> AsyncIterator[AppServerBackend]:
    backend = AppServerBackend(AppServerConfig(server.url), Metrics(), TaskSet())
    yield backend
    await backend.close()


async def test_agent_with_what_was_asked_for(server: FakeAppServer, backend: AppServerBackend) -> None:
    blocks = (MemoryBlock("human", "Ann.", "Who.", 100), MemoryBlock("persona", "Bo."))
    spec = AgentSpec(
        name="Bo", model=MODELS[1], embedding="x", tools=("Bash",), blocks=blocks, tags=("letta-gateway:user", "b")
    )
    made = await backend.create_agent(spec)
    assert made == Agent("agent-local-2", "Bo", 0, ("letta-gateway:user", "b"))
    assert server.asked("agent_create")[0]["body"] == {
        "name": "Bo",
        "model": MODELS[1],
        "tags": ["letta-gateway:user", "b"],
        "memory_blocks": [
            {"label": "human", "value": "Ann.", "description": "Who."},
            {"label": "persona", "value": "Bo.", "description": "persona"},
        ],
    }


async def test_usual_model_is_the_first_that_is_offered(server: FakeAppServer, backend: AppServerBackend) -> None:
    await backend.create_agent(AgentSpec(name="Bo"))
    assert server.asked("agent_create")[0]["body"]["model"] == MODELS[0]


async def test_model_that_is_not_offered(server: FakeAppServer, backend: AppServerBackend) -> None:
    with pytest.raises(UpstreamRejected, match="LETTA_GATEWAY_USER_MODEL"):
        await backend.create_agent(AgentSpec(name="Bo", model="nowhere/nothing"))
    server.on("list_models", replies(entries=[]))
    with pytest.raises(UpstreamRejected):
        await backend.create_agent(AgentSpec(name="Bo"))
    assert server.asked("agent_create") == []


async def test_no_agent_has_a_provider_of_its_own(server: FakeAppServer, backend: AppServerBackend) -> None:
    assert not backend.capabilities.providers
    with pytest.raises(InternalError):
        await backend.create_agent(AgentSpec(name="Bo", provider=ModelProvider("ann", "http://x.invalid/v1", "key")))
    assert server.asked("agent_create") == []


async def test_agents_of_a_tag(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.agents[OTHER]["tags"] = ["a", "b"]
    assert await backend.find_tagged("a") == [Agent(OTHER, "scholar", 0, ("a", "b"))]
    assert await backend.find_tagged("c") == []


async def test_server_that_lists_too_much(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("agent_list", replies(agents=[*server.agents.values()]))
    assert await backend.find_tagged("a") == []


async def test_deleted_agent(server: FakeAppServer, backend: AppServerBackend) -> None:
    for _ in range(2):
        await backend.delete_agent(AGENT)
    assert AGENT not in server.agents
    server.on("agent_delete", replies(success=False, error="EACCES"))
    with pytest.raises(UpstreamRejected):
        await backend.delete_agent(OTHER)
