import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway import keys
from gateway.errors import UpstreamUnavailable
from gateway.handlers.platform_agent import MAX_VALUE
from gateway.letta.backend import Agent
from gateway.letta.scripted import Hang, Script
from gateway.translation.agent_events import TextDelta, Usage
from tests.server.people import Town, town
from tests.server.wire import until


@pytest.fixture
async def gateway() -> AsyncIterator[Town]:
    async with town(talks=False) as running:
        yield running


async def test_status_says_what_the_agent_is(gateway: Town) -> None:
    answer = await gateway.api("GET", "/agent/status", gateway.ann)
    assert answer.status == 200
    status = answer.json()
    assert status["state"] == "ready"
    assert status["agent"].keys() == {"id", "name", "model", "created_at", "tools"}
    assert status["agent"]["id"] == gateway.ann.agent_id
    assert status["agent"]["name"].startswith("Ann-")
    assert status["agent"]["model"] == "scripted/model"


async def test_agent_that_letta_has_no_more(gateway: Town) -> None:
    gateway.backend.listed = [agent for agent in gateway.backend.listed if agent.id != gateway.ann.agent_id]
    assert (await gateway.api("GET", "/agent/status", gateway.ann)).json() == {"state": "missing", "agent": None}
    for method, path, body in (
        ("GET", "/agent/memory", None),
        ("PATCH", "/agent/memory/human", {"value": "x"}),
    ):
        answer = await gateway.api(method, path, gateway.ann, body)
        assert (answer.status, answer.code) == (404, "agent_missing")
    renewed = await gateway.api("POST", "/agent/reset", gateway.ann)
    assert renewed.json()["state"] == "ready"
    assert (await gateway.api("GET", "/agent/memory", gateway.ann)).status == 200


async def test_memory_is_read_and_written(gateway: Town) -> None:
    before = (await gateway.api("GET", "/agent/memory", gateway.ann)).json()["data"]
    assert (before[0]["label"], before[0]["value"]) == ("human", "Name: Ann")
    assert all(block["description"] for block in before)
    written = await gateway.api("PATCH", "/agent/memory/human", gateway.ann, {"value": "Likes 🍵."})
    assert (written.status, written.json()) == (200, {**before[0], "value": "Likes 🍵."})
    after = (await gateway.api("GET", "/agent/memory", gateway.ann)).json()["data"]
    assert after == [written.json(), *before[1:]]
    bens = (await gateway.api("GET", "/agent/memory", gateway.ben)).json()["data"]
    assert bens[0]["value"] == "Name: Ben"


@pytest.mark.parametrize(
    ("label", "body", "status", "code", "param"),
    [
        ("none", {"value": "x"}, 404, "memory_not_found", None),
        ("human", {}, 400, "missing_required_parameter", "value"),
        ("human", {"value": 5}, 400, "invalid_type", "value"),
        ("human", {"value": "nul\0"}, 400, "invalid_value", "value"),
        ("human", {"value": "x" * (MAX_VALUE + 1)}, 400, "invalid_value", "value"),
        ("..%2f..%2fother", {"value": "x"}, 400, "malformed_request", None),
        ("other%2Flabel", {"value": "x"}, 404, "memory_not_found", None),
    ],
)
async def test_memory_that_cannot_be_written(
    gateway: Town, label: str, body: object, status: int, code: str, param: str | None
) -> None:
    before = repr(gateway.backend.memories)
    answer = await gateway.api("PATCH", f"/agent/memory/{label}", gateway.ann, body)
    assert (answer.status, answer.code, answer.error["param"]) == (status, code, param)
    assert repr(gateway.backend.memories) == before


async def test_reset_is_a_fresh_start_and_the_history_stays(gateway: Town) -> None:
    await gateway.talk(gateway.ann)
    history = (await gateway.api("GET", "/chat/history", gateway.ann)).body
    answer = await gateway.api("POST", "/agent/reset", gateway.ann)
    agent_id = answer.json()["agent"]["id"]
    assert (answer.status, answer.json()["state"]) == (200, "ready")
    assert agent_id != gateway.ann.agent_id
    assert gateway.backend.gone == [gateway.ann.agent_id]
    memory = (await gateway.api("GET", "/agent/memory", gateway.ann)).json()["data"]
    assert memory[0]["value"] == "Name: Ann"
    assert (await gateway.api("GET", "/chat/history", gateway.ann)).body == history
    said = await gateway.api("POST", "/chat/message", gateway.ann, {"message": "Hello again", "stream": False})
    assert said.status == 200
    assert gateway.backend.turns[-1].sent.agent_id == agent_id
    assert (await gateway.send("GET", f"/v1/models/{agent_id}", gateway.ann.key)).status == 200


async def test_reset_during_a_turn_ends_it_and_books_what_it_took(gateway: Town) -> None:
    gateway.backend.play(Script(([TextDelta("Once upon")], Hang()), counted=Usage(70, 9)))
    before = (await gateway.api("GET", "/user/usage", gateway.ann)).json()["totals"]
    message = {"message": "Tell me a story", "stream": False}
    telling = asyncio.get_running_loop().create_task(gateway.api("POST", "/chat/message", gateway.ann, message))
    await until(lambda: any(turn.heard for turn in gateway.backend.turns[-1:]))
    waiting = asyncio.get_running_loop().create_task(gateway.api("POST", "/chat/message", gateway.ann, message))
    await until(lambda: gateway.app[keys.TURNS].held == 2)
    assert (await gateway.api("POST", "/agent/reset", gateway.ann)).status == 200
    assert gateway.backend.turns[-1].cancelled
    assert gateway.ann.agent_id in gateway.backend.gone
    told, refused = await telling, await waiting
    assert (told.status, told.code) == (502, "response_cancelled")
    assert (refused.status, refused.code) == (404, "agent_missing"), "it was meant for the agent of before"
    usage = (await gateway.api("GET", "/user/usage", gateway.ann)).json()["totals"]
    assert usage["prompt_tokens"] - before["prompt_tokens"] == 70
    assert usage["completion_tokens"] - before["completion_tokens"] == 9
    assert (await gateway.api("POST", "/chat/message", gateway.ann, message)).status == 200


async def test_agent_that_registration_could_not_make_comes_when_it_is_needed(gateway: Town) -> None:
    gateway.backend.down = UpstreamUnavailable(retry_after=1.0)
    account = {"email": "dora@example.com", "password": "correct horse battery"}
    registered = await gateway.send("POST", "/api/v1/auth/register", None, account)
    assert registered.status == 201
    token = registered.json()["access_token"]
    assert registered.json()["user"]["agent"] is None
    assert (await gateway.send("GET", "/api/v1/agent/status", token)).json()["state"] == "missing"
    assert (await gateway.send("GET", "/api/v1/agent/memory", token)).status == 503
    gateway.backend.down = None
    said = await gateway.send("POST", "/api/v1/chat/message", token, {"message": "Hello", "stream": False})
    assert said.status == 200
    assert (await gateway.send("GET", "/api/v1/agent/status", token)).json()["state"] == "ready"


async def test_letta_that_is_down_is_503(gateway: Town) -> None:
    gateway.backend.down = UpstreamUnavailable(retry_after=1.0)
    for method, path, body in (
        ("GET", "/agent/status", None),
        ("GET", "/agent/memory", None),
        ("PATCH", "/agent/memory/human", {"value": "x"}),
        ("POST", "/agent/reset", None),
    ):
        answer = await gateway.api(method, path, gateway.ann, body)
        assert (answer.status, answer.header("retry-after")) == (503, "1"), path
    gateway.backend.down = None
    status = (await gateway.api("GET", "/agent/status", gateway.ann)).json()
    assert status["agent"]["id"] == gateway.ann.agent_id, "the old one stays where no new one could be made"


async def test_agents_of_others_by_the_same_name_are_not_taken(gateway: Town) -> None:
    gateway.backend.listed.insert(0, Agent("agent-impostor", gateway.ann.agent_id, 1))
    status = (await gateway.api("GET", "/agent/status", gateway.ann)).json()
    assert status["agent"]["id"] == gateway.ann.agent_id
