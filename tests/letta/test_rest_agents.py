from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.errors import UpstreamInvalid, UpstreamRejected, UpstreamUnavailable
from gateway.letta.backend import Agent, AgentSpec, MemoryBlock, ModelProvider
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_agents import CONTEXT_WINDOW
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.letta.recording_server import AGENT, PROVIDER, RecordingServer, status

PROXY = "http://billing.invalid/v1"
ANN = ModelProvider("ann", PROXY, "key-of-ann")


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def backend(server: RecordingServer) -> AsyncIterator[RestBackend]:
    backend = RestBackend(RestConfig(server.url), Metrics(), TaskSet())
    yield backend
    await backend.close()


def model(handle: str, category: str = "base", **fields: Any) -> dict[str, Any]:
    name = handle.partition("/")[2]
    return {"handle": handle, "name": name, "provider_name": "x", "provider_category": category, **fields}


def created(**fields: Any) -> dict[str, Any]:
    return {"id": AGENT, "name": "Bo", "created_at": "2026-11-21T00:00:00Z", "tags": [], **fields}


async def test_agent_of_the_present_type_with_what_was_asked_for(server: RecordingServer, backend: RestBackend) -> None:
    server.on("tools", status(200, [{"id": "tool-1", "name": "memory_insert"}]))
    server.on("new agent", status(200, created()))
    made = await backend.create_agent(
        AgentSpec(
            name="Bo",
            model="openai/gpt",
            embedding="openai/small",
            tools=("memory_insert", "send_message", "no_such_tool"),
            blocks=(MemoryBlock("human", "Ann.", "Who.", 100), MemoryBlock("persona", "Bo.", is_read_only=True)),
            tags=("a", "b"),
        )
    )
    assert made == Agent(AGENT, "Bo", 1795219200, ("a", "b"))
    assert server.asked("new agent")[0].json() == {
        "name": "Bo",
        "agent_type": "letta_v1_agent",
        "model": "openai/gpt",
        "embedding": "openai/small",
        "tools": ["memory_insert"],
        "memory_blocks": [
            {"label": "human", "value": "Ann.", "description": "Who.", "limit": 100, "read_only": False},
            {"label": "persona", "value": "Bo.", "read_only": True},
        ],
        "tags": ["a", "b"],
        "include_base_tools": False,
        "include_base_tool_rules": False,
    }
    assert server.asked("models") == server.asked("providers") == []


async def test_no_tools_are_looked_for_where_none_are_asked_for(server: RecordingServer, backend: RestBackend) -> None:
    await backend.create_agent(AgentSpec(name="Bo", model="openai/gpt", tools=("send_message",)))
    assert server.asked("tools") == []
    assert server.asked("new agent")[0].json()["tools"] == []


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([model("letta/letta-free"), model("openai/a"), model("openai/b")], "openai/a"),
        ([model("openai-proxy/theirs", "byok"), model("openai/own")], "openai/own"),
        ([model("letta/letta-free")], "letta/letta-free"),
    ],
)
async def test_usual_model_is_the_first_of_the_servers_own(
    server: RecordingServer, backend: RestBackend, offered: list[dict[str, Any]], chosen: str
) -> None:
    server.on("models", status(200, offered))
    await backend.create_agent(AgentSpec(name="Bo"))
    assert server.asked("new agent")[0].json()["model"] == chosen


@pytest.mark.parametrize("offered", [[], [model("openai-proxy/theirs", "byok")]])
async def test_server_without_a_model_of_its_own(
    server: RecordingServer, backend: RestBackend, offered: list[dict[str, Any]]
) -> None:
    server.on("models", status(200, offered))
    with pytest.raises(UpstreamRejected, match="LETTA_GATEWAY_USER_MODEL"):
        await backend.create_agent(AgentSpec(name="Bo"))
    assert server.asked("new agent") == []


async def test_model_that_the_server_does_not_know(server: RecordingServer, backend: RestBackend) -> None:
    server.on("new agent", status(404, {"detail": "NOT_FOUND: Handle a/b not found"}))
    with pytest.raises(UpstreamRejected, match="LETTA_GATEWAY_USER_MODEL"):
        await backend.create_agent(AgentSpec(name="Bo", model="a/b"))


# A provider of its own ------------------------------------------------------------------------------------------------


def of_provider(name: str) -> dict[str, Any]:
    return created(llm_config={"provider_name": name, "model": "gpt"})


async def test_provider_is_made_and_named_by_the_agent(server: RecordingServer, backend: RestBackend) -> None:
    offered = [model("openai/gpt", max_context_window=1), model("openai-proxy/gpt", model_endpoint=PROXY + "/")]
    server.on("models", status(200, [*offered[:1], {**offered[1], "max_context_window": 8192}]))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", model="openai-proxy/gpt", provider=ANN))
    assert server.asked("providers")[0].query == {"name": "ann"}
    assert server.asked("new provider")[0].json() == {
        "name": "ann",
        "provider_type": "openai",
        "api_key": "key-of-ann",
        "base_url": PROXY,
    }
    assert server.asked("change provider") == []
    sent = server.asked("new agent")[0].json()
    assert "model" not in sent
    assert sent["llm_config"] == {
        "model": "gpt",
        "model_endpoint_type": "openai",
        "model_endpoint": PROXY,
        "context_window": 8192,
        "provider_name": "ann",
        "provider_category": "byok",
        "handle": "ann/gpt",
    }


async def test_provider_that_is_known_gets_todays_key(server: RecordingServer, backend: RestBackend) -> None:
    server.on("providers", status(200, [{"id": PROVIDER, "name": "ann"}, {"id": "provider-x", "name": "anna"}]))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", model="team/gpt", provider=ANN))
    assert server.asked("new provider") == []
    (change,) = server.asked("change provider")
    assert change.path.endswith(PROVIDER)
    assert change.json() == {"api_key": "key-of-ann", "base_url": PROXY}
    config = server.asked("new agent")[0].json()["llm_config"]
    assert (config["model"], config["handle"]) == ("team/gpt", "ann/team/gpt")
    assert config["context_window"] == CONTEXT_WINDOW


async def test_provider_that_somebody_makes_meanwhile(server: RecordingServer, backend: RestBackend) -> None:
    server.on("providers", status(200, []), status(200, [{"id": PROVIDER, "name": "ann"}]))
    server.on("new provider", status(409, {"detail": "A unique constraint was violated for Provider."}))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", model="gpt", provider=ANN))
    assert len(server.asked("change provider")) == 1


async def test_first_model_of_the_providers_server(server: RecordingServer, backend: RestBackend) -> None:
    elsewhere = model("openai-proxy/other", model_endpoint="http://elsewhere.invalid/v1")
    server.on("models", status(200, [elsewhere, model("openai-proxy/gpt", "byok", model_endpoint=PROXY)]))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", provider=ANN))
    assert server.asked("new agent")[0].json()["llm_config"]["model"] == "gpt"


async def test_provider_without_a_model(server: RecordingServer, backend: RestBackend) -> None:
    with pytest.raises(UpstreamRejected):
        await backend.create_agent(AgentSpec(name="Bo", provider=ANN))
    assert server.asked("new agent") == []


@pytest.mark.parametrize("config", [{"provider_name": "bob"}, {"provider_name": None}, {}])
async def test_agent_that_got_anothers_provider_is_deleted_again(
    server: RecordingServer, backend: RestBackend, config: dict[str, Any]
) -> None:
    server.on("new agent", status(200, created(llm_config=config)))
    with pytest.raises(UpstreamInvalid):
        await backend.create_agent(AgentSpec(name="Bo", model="gpt", provider=ANN))
    assert [request.path.rpartition("/")[2] for request in server.asked("delete agent")] == [AGENT]


# Finding and deleting -------------------------------------------------------------------------------------------------


async def test_agents_of_a_tag(server: RecordingServer, backend: RestBackend) -> None:
    server.on("listing", status(200, [created(tags=["a", "b"])]))
    assert await backend.find_tagged("a") == [Agent(AGENT, "Bo", 1795219200, ("a", "b"))]
    query = server.asked("listing")[0].query
    assert (query["tags"], query["include"]) == ("a", "agent.tags")


async def test_deleted_agent(server: RecordingServer, backend: RestBackend) -> None:
    server.on("delete agent", status(200, {}), status(404, {"detail": "gone"}), status(503))
    await backend.delete_agent(AGENT)
    await backend.delete_agent(AGENT)
    with pytest.raises(UpstreamUnavailable):
        await backend.delete_agent(AGENT)
    assert all(request.path.endswith(f"/agents/{AGENT}") for request in server.asked("delete agent"))
