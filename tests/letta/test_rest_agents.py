from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.errors import UpstreamInvalid, UpstreamRejected, UpstreamUnavailable
from gateway.letta.backend import Agent, AgentSpec, MemoryBlock, ModelProvider
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_agents import CONTEXT_WINDOW, MOST_ASKED, NO_KEY, REMEMBERED
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.letta.recording_server import AGENT, PROVIDER, RecordingServer, status

PROXY = "http://billing.invalid/v1"
QUERY_OF_BASE = "provider_category=base"
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
    assert server.asked("models")[0].target.partition("?")[2] == QUERY_OF_BASE


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


def at_proxy(name: str, address: str = PROXY, **fields: Any) -> dict[str, Any]:
    return model(f"openai-proxy/{name}", "byok", model_endpoint=address, **fields)


def provider(name: str, address: str = PROXY) -> dict[str, Any]:
    return {"id": f"{PROVIDER}-{name}", "name": name, "base_url": address}


def of_provider(name: str) -> dict[str, Any]:
    return created(llm_config={"provider_name": name, "model": "gpt"})


async def test_provider_is_made_and_named_by_the_agent(server: RecordingServer, backend: RestBackend) -> None:
    elsewhere = model("openai/gpt", max_context_window=1)
    server.on("models", status(200, [elsewhere, at_proxy("gpt", PROXY + "/", max_context_window=8192)]))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", model="openai-proxy/gpt", provider=ANN))
    assert [request.query for request in server.asked("providers")] == [{"name": "ann"}, {"order": "asc"}]
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
    server.on("models", status(200, [elsewhere, at_proxy("gpt")]))
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


async def test_models_stand_under_the_name_of_an_older_provider(server: RecordingServer, backend: RestBackend) -> None:
    """Letta keeps each model of a server once, mostly for the provider that came first."""
    at_this = [provider("eve"), provider("bob", PROXY + "/"), provider("cleo")]
    server.on("providers", status(200, []), status(200, [provider("x", "http://elsewhere.invalid/v1"), *at_this]))
    old, new = at_proxy("gpt", max_context_window=8192), at_proxy("new", max_context_window=1024)
    server.on("models", status(200, []), status(200, [old]), status(200, [new]))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", provider=ANN))
    assert [request.query["provider_name"] for request in server.asked("models")] == ["eve", "bob", "ann"]
    config = server.asked("new agent")[0].json()["llm_config"]
    assert (config["model"], config["context_window"]) == ("gpt", 8192)
    await backend.create_agent(AgentSpec(name="Bo", model="new", provider=ANN))
    assert server.asked("new agent")[1].json()["llm_config"]["context_window"] == 1024


async def test_few_are_asked_however_many_users_there_are(server: RecordingServer, backend: RestBackend) -> None:
    server.on("providers", status(200, []), status(200, [provider(f"user-{n}") for n in range(50)]))
    server.on("new agent", status(200, of_provider("ann")))
    await backend.create_agent(AgentSpec(name="Bo", model="gpt", provider=ANN))
    assert len(server.asked("models")) == MOST_ASKED + 1
    assert server.asked("new agent")[0].json()["llm_config"]["context_window"] == CONTEXT_WINDOW


async def test_models_of_an_address_are_remembered_for_a_while(server: RecordingServer, backend: RestBackend) -> None:
    now = 1_000.0
    backend._agents._clock = lambda: now
    server.on("models", status(200, [at_proxy("gpt", max_context_window=8192)]))
    server.on("new agent", *(status(200, of_provider(name)) for name in ("ann", "bob", "cleo")))
    for name in ("ann", "bob"):
        await backend.create_agent(AgentSpec(name=name, provider=ModelProvider(name, PROXY, name)))
    assert len(server.asked("models")) == 1
    assert [made.json()["llm_config"]["context_window"] for made in server.asked("new agent")] == [8192, 8192]
    now += REMEMBERED
    await backend.create_agent(AgentSpec(name="cleo", provider=ModelProvider("cleo", PROXY + "/", "cleo")))
    assert len(server.asked("models")) == 2
    with pytest.raises(UpstreamRejected):
        await backend.create_agent(AgentSpec(name="dora", provider=ModelProvider("d", "http://other.invalid/v1", "d")))
    assert len(server.asked("models")) == 3, "another address has other models"


async def test_address_without_models_is_asked_again(server: RecordingServer, backend: RestBackend) -> None:
    server.on("models", status(200, []), status(200, [at_proxy("gpt")]))
    server.on("new agent", status(200, of_provider("ann")))
    with pytest.raises(UpstreamRejected):
        await backend.create_agent(AgentSpec(name="Bo", provider=ANN))
    await backend.create_agent(AgentSpec(name="Bo", provider=ANN))
    assert server.asked("new agent")[0].json()["llm_config"]["model"] == "gpt"


async def test_deleted_provider(server: RecordingServer, backend: RestBackend) -> None:
    server.on("providers", status(200, [provider("anna"), provider("ann")]))
    server.on("delete provider", status(200, {}), status(404, {"detail": "gone"}), status(503))
    await backend.delete_provider("ann")
    await backend.delete_provider("ann")
    with pytest.raises(UpstreamUnavailable):
        await backend.delete_provider("ann")
    assert {request.path.rpartition("/")[2] for request in server.asked("delete provider")} == {f"{PROVIDER}-ann"}
    assert server.asked("change provider") == []


async def test_provider_that_is_not_there_is_deleted(server: RecordingServer, backend: RestBackend) -> None:
    await backend.delete_provider("ann")
    assert server.asked("delete provider") == server.asked("change provider") == []


async def test_provider_under_whose_name_models_stand_loses_its_key(
    server: RecordingServer, backend: RestBackend
) -> None:
    """With it, Letta would lose the models for everybody at this address, and never take them up again."""
    server.on("providers", status(200, [provider("ann")]))
    server.on("models", status(200, [at_proxy("gpt")]))
    await backend.delete_provider("ann")
    (change,) = server.asked("change provider")
    assert (change.path.rpartition("/")[2], change.json()) == (f"{PROVIDER}-ann", {"api_key": NO_KEY})
    assert server.asked("models")[0].query == {"provider_name": "ann"}
    assert server.asked("delete provider") == []


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


# Agents that are there ------------------------------------------------------------------------------------------------

SERVERS_OWN = {"provider_name": "openai", "provider_category": "base"}
ANNS_OWN = {"provider_name": "ann", "provider_category": "byok"}


async def test_agent_that_is_there_is_given_a_provider_of_its_own(
    server: RecordingServer, backend: RestBackend
) -> None:
    server.on("agent", status(200, created(llm_config=SERVERS_OWN)), status(200, created(llm_config=ANNS_OWN)))
    await backend.set_provider(AGENT, AgentSpec(name="Bo", model="gpt-4", provider=ANN))
    asked, changed = server.asked("agent")
    assert (asked.method, changed.method) == ("GET", "PATCH")
    config = changed.json()["llm_config"]
    assert changed.json().keys() == {"llm_config"}, "nothing else of it changes"
    assert (config["provider_name"], config["provider_category"], config["handle"]) == ("ann", "byok", "ann/gpt-4")


@pytest.mark.parametrize(("config", "provider"), [(SERVERS_OWN, ANN), (ANNS_OWN, None)])
async def test_agent_whose_provider_letta_does_not_change(
    server: RecordingServer, backend: RestBackend, config: dict[str, str], provider: ModelProvider | None
) -> None:
    server.on("agent", status(200, created(llm_config=config)))
    with pytest.raises(UpstreamInvalid, match="another model provider"):
        await backend.set_provider(AGENT, AgentSpec(name="Bo", model="gpt-4", provider=provider))


async def test_agent_is_given_back_to_the_servers_own_provider(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent", status(200, created(llm_config=ANNS_OWN)), status(200, created(llm_config=SERVERS_OWN)))
    await backend.set_provider(AGENT, AgentSpec(name="Bo", model="openai/gpt"))
    assert server.asked("agent")[1].json() == {"model": "openai/gpt"}


@pytest.mark.parametrize(("config", "provider"), [(ANNS_OWN, ANN), (SERVERS_OWN, None)])
async def test_agent_that_has_its_provider_stays_as_it_is(
    server: RecordingServer, backend: RestBackend, config: dict[str, str], provider: ModelProvider | None
) -> None:
    server.on("agent", status(200, created(llm_config=config)))
    await backend.set_provider(AGENT, AgentSpec(name="Bo", model="gpt-4", provider=provider))
    assert [request.method for request in server.asked("agent")] == ["GET"]
