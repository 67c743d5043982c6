"""Who sees which agents on the OpenAI surface: users by their personal keys, and everybody else."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from gateway.errors import AgentGone, UpstreamUnavailable
from gateway.letta.scripted import Break, Script
from gateway.translation.agent_events import Stop, ToolCallDelta, Usage
from tests.handlers.platforms import ANN, BEN, CARA, Platform, agent_of, key, platform
from tests.server.running import FRIEND, JSON, chat_body
from tests.server.wire import Answer

ANNS, BENS = agent_of(ANN), agent_of(BEN)
OPERATORS = {"Authorization": "Bearer sk-operators-key"}
APIS = pytest.mark.parametrize("api", ["chat/completions", "responses"])


@pytest.fixture
async def gateway() -> AsyncIterator[Platform]:
    async with platform(api_keys=("sk-operators-key",)) as running:
        yield running


async def ask(gateway: Platform, api: str, model: str, headers: dict[str, str], **more: Any) -> Answer:
    if api == "responses":
        body = msgspec.json.encode({"model": model, "input": "Hi", **more})
    else:
        body = chat_body(model=model, **more)
    return await gateway.ask("POST", f"/v1/{api}", {**JSON, **headers}, body)


async def listed(gateway: Platform, headers: dict[str, str]) -> list[str]:
    answer = await gateway.ask("GET", "/v1/models", headers)
    assert answer.status == 200
    return [model["id"] for model in answer.json()["data"]]


async def test_user_sees_their_own_agent_alone(gateway: Platform) -> None:
    assert await listed(gateway, key(ANN)) == [ANNS.name]
    assert await listed(gateway, key(BEN)) == [BENS.name]


async def test_user_who_has_no_agent_yet_gets_one(gateway: Platform) -> None:
    (model,) = await listed(gateway, key(CARA))
    assert (await ask(gateway, "chat/completions", model, key(CARA))).status == 200
    assert len(gateway.backend.specs) == 1


@pytest.mark.parametrize("model", [ANNS.name, ANNS.id])
async def test_user_asks_for_their_own_model(gateway: Platform, model: str) -> None:
    answer = (await gateway.ask("GET", f"/v1/models/{model}", key(ANN))).json()
    assert (answer["id"], answer["letta"]["agent_id"]) == (model, ANNS.id)


@APIS
@pytest.mark.parametrize("model", [ANNS.name, ANNS.id])
async def test_user_talks_to_their_own_agent(gateway: Platform, api: str, model: str) -> None:
    assert (await ask(gateway, api, model, key(ANN))).status == 200
    assert gateway.backend.turns[0].sent.agent_id == ANNS.id
    assert await gateway.booked() == [(ANN, api.replace("/", "_"), "complete")]


@APIS
@pytest.mark.parametrize("model", [BENS.name, BENS.id, FRIEND.name, FRIEND.id, "nobody", "x" * 500, "a\nb"])
async def test_any_other_model_is_none_for_a_user(gateway: Platform, api: str, model: str) -> None:
    answer = await ask(gateway, api, model, key(ANN))
    assert (answer.status, answer.code) == (404, "model_not_found")
    unknown = await ask(gateway, api, model, key(CARA))
    assert answer.body == unknown.body
    assert gateway.backend.turns == []


async def test_others_model_and_an_unknown_one_have_the_same_answer(gateway: Platform) -> None:
    answers = [await gateway.ask("GET", f"/v1/models/{model}", key(ANN)) for model in (BENS.id, FRIEND.id, "nobody")]
    assert {answer.status for answer in answers} == {404}
    shown = {
        answer.body.replace(model.encode(), b"?")
        for answer, model in zip(answers, (BENS.id, FRIEND.id, "nobody"), strict=True)
    }
    assert len(shown) == 1


@APIS
async def test_nobody_else_comes_to_a_users_agent(gateway: Platform, api: str) -> None:
    assert await listed(gateway, OPERATORS) == [FRIEND.name]
    for model in (ANNS.name, ANNS.id):
        answer = await ask(gateway, api, model, OPERATORS)
        assert (answer.status, answer.code) == (404, "model_not_found")
    assert gateway.backend.turns == []


async def test_agent_that_is_gone_is_no_model(gateway: Platform) -> None:
    gateway.backend.listed.remove(ANNS)
    assert await listed(gateway, key(ANN)) == []
    assert (await ask(gateway, "chat/completions", ANNS.id, key(ANN))).code == "model_not_found"


async def test_agent_that_is_gone_since_its_name_was_asked_for(gateway: Platform) -> None:
    assert await listed(gateway, key(ANN)) == [ANNS.name]
    gateway.backend.play(Script(opening=(Break(AgentGone(should_retry=False)),)))
    assert (await ask(gateway, "chat/completions", ANNS.name, key(ANN))).code == "model_not_found"
    gateway.backend.listed.remove(ANNS)
    assert (await gateway.ask("GET", f"/v1/models/{ANNS.name}", key(ANN))).code == "model_not_found"


async def test_letta_that_is_away_is_no_404(gateway: Platform) -> None:
    gateway.backend.down = UpstreamUnavailable(should_retry=True)
    for path in ("/v1/models", f"/v1/models/{ANNS.name}"):
        assert (await gateway.ask("GET", path, key(ANN))).status == 503


# What belongs to others ----------------------------------------------------------------------------------------------


async def test_response_of_another_user_is_none(gateway: Platform) -> None:
    response = (await ask(gateway, "responses", ANNS.name, key(ANN))).json()
    path = f"/v1/responses/{response['id']}"
    for method, target in (("GET", path), ("GET", f"{path}/input_items"), ("POST", f"{path}/cancel"), ("DELETE", path)):
        answer = await gateway.ask(method, target, {**JSON, **key(BEN)}, b"{}" if method == "POST" else b"")
        assert (answer.status, answer.code) == (404, "response_not_found")
    follows = await ask(gateway, "responses", BENS.name, key(BEN), previous_response_id=response["id"])
    assert (follows.status, follows.code) == (404, "response_not_found")
    assert (await gateway.ask("GET", path, key(ANN))).status == 200


async def test_tool_call_of_another_user_is_none(gateway: Platform) -> None:
    gateway.backend.play(
        Script(([ToolCallDelta("call-1", "f", "{}")], [Stop("requires_approval")], [Usage(1, 1)])),
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert (await ask(gateway, "chat/completions", ANNS.name, key(ANN), tools=tools)).status == 200
    result = msgspec.json.encode(
        {
            "model": BENS.name,
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "call-1", "content": "42"},
            ],
        }
    )
    answer = await gateway.ask("POST", "/v1/chat/completions", {**JSON, **key(BEN)}, result)
    assert (answer.status, answer.code) == (404, "tool_call_not_found")
    assert len(gateway.backend.turns) == 1


async def test_chat_of_another_user_is_another_chat(gateway: Platform) -> None:
    chat = {"X-Letta-Chat-Key": "chat-1"}
    for user in (ANN, BEN, ANN):
        assert (await ask(gateway, "chat/completions", agent_of(user).name, {**key(user), **chat})).status == 200
    ann, ben, _ = (turn.sent for turn in gateway.backend.turns)
    assert gateway.backend.conversations[ann.conversation_id or ""] == ANNS.id
    assert gateway.backend.conversations[ben.conversation_id or ""] == BENS.id
    assert ann.conversation_id != ben.conversation_id


async def test_key_of_another_users_request_is_another_key(gateway: Platform) -> None:
    for user in (ANN, BEN):
        headers = {**key(user), "Idempotency-Key": "order-66"}
        assert (await ask(gateway, "chat/completions", agent_of(user).name, headers)).status == 200
    assert [turn.sent.agent_id for turn in gateway.backend.turns] == [ANNS.id, BENS.id]


async def test_budget_of_a_user_holds_on_the_openai_surface_too(gateway: Platform) -> None:
    await gateway.spend(ANN, 0)
    answer = await ask(gateway, "chat/completions", ANNS.name, key(ANN))
    assert (answer.status, answer.code) == (402, "budget_exceeded")
    assert (await ask(gateway, "chat/completions", FRIEND.name, OPERATORS)).status == 200
