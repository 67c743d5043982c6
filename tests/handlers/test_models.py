import asyncio

from gateway.errors import AgentGone, UpstreamTimeout, UpstreamUnavailable
from gateway.letta.backend import Agent
from gateway.letta.scripted import ScriptedBackend
from tests.server.running import FRIEND, serving, settings

TWIN = Agent("agent-2", "twin", 2)
OTHER_TWIN = Agent("agent-3", "twin", 3)


async def test_every_agent_is_a_model() -> None:
    async with serving(backend=ScriptedBackend([FRIEND, TWIN, OTHER_TWIN])) as gateway:
        answer = await gateway.ask("GET", "/v1/models")
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    assert answer.json() == {
        "object": "list",
        "data": [
            {"id": "friend", "object": "model", "created": 1_700_000_000, "owned_by": "letta"},
            {"id": "agent-2", "object": "model", "created": 2, "owned_by": "letta"},
            {"id": "agent-3", "object": "model", "created": 3, "owned_by": "letta"},
        ],
    }


async def test_no_agents() -> None:
    async with serving(backend=ScriptedBackend()) as gateway:
        assert (await gateway.ask("GET", "/v1/models")).json() == {"object": "list", "data": []}


async def test_one_agent_by_either_name() -> None:
    async with serving() as gateway:
        by_name = (await gateway.ask("GET", f"/v1/models/{FRIEND.name}")).json()
        by_id = (await gateway.ask("GET", f"/v1/models/{FRIEND.id}")).json()
    letta = {
        "agent_id": FRIEND.id,
        "description": "An agent of a script.",
        "model": "scripted/model",
        "tools": ["memory"],
    }
    plain = {"id": FRIEND.name, "object": "model", "created": FRIEND.created, "owned_by": "letta"}
    assert by_name == {**plain, "letta": letta}
    assert by_id == {**by_name, "id": FRIEND.id}


async def test_unknown_agent() -> None:
    async with serving() as gateway:
        for model in ("nobody", "Friend", "friend%20", "agent-nobody", "x" * 3_000):
            answer = await gateway.ask("GET", f"/v1/models/{model}")
            assert (answer.status, answer.code, answer.error["param"]) == (404, "model_not_found", "model")
            assert len(answer.body) < 500


async def test_letta_is_down() -> None:
    backend = ScriptedBackend([FRIEND])
    async with serving(settings(models_ttl=0.0), backend) as gateway:
        for down, status in ((UpstreamUnavailable(retry_after=2.0), 503), (UpstreamTimeout(), 504)):
            backend.down = down
            for target in ("/v1/models", "/v1/models/friend", "/v1/models/nobody"):
                answer = await gateway.ask("GET", target)
                assert (answer.status, answer.code) == (status, down.code), "and never an unknown model"
        backend.down = None
        assert (await gateway.ask("GET", "/v1/models/friend")).status == 200


async def test_listing_is_asked_for_once_by_many() -> None:
    async with serving() as gateway:
        await asyncio.gather(*(gateway.ask("GET", "/v1/models") for _ in range(20)))
        assert gateway.backend.listings == 1


async def test_agent_that_appeared_meanwhile() -> None:
    async with serving() as gateway:
        await gateway.ask("GET", "/v1/models")
        gateway.backend.listed.append(TWIN)
        assert (await gateway.ask("GET", "/v1/models/twin")).status == 200


async def test_letta_that_knows_no_agents_at_all() -> None:
    """A wrong LETTA_BASE_URL, say: the answer is an error of OpenAI's shape."""
    backend = ScriptedBackend()
    backend.down = AgentGone()
    async with serving(backend=backend) as gateway:
        answer = await gateway.ask("GET", "/v1/models")
        assert answer.code == "agent_gone"
