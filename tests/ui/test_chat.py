from typing import Any

import msgspec

from gateway import keys
from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import Break, Script, says
from gateway.translation.agent_events import (
    Batch,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
)
from tests.server.running import JSON, chat_body
from tests.ui.operator_page import API_KEY, Page, page

HELLO: dict[str, Any] = {"model": "friend", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}


async def test_answer_with_reasoning_and_what_the_agents_own_tools_do() -> None:
    async with page() as operator:
        call: Batch = [
            ServerToolCall("call-1", "search", '{"query": "tea"}'),
            ServerToolReturn("call-1", "search", succeeded=True),
        ]
        operator.gateway.backend.play(
            Script(steps=([ReasoningDelta("Hm. ")], call, [TextDelta("Tea.")], [Stop("end_turn")]))
        )
        answer = await operator.ask("POST", "chat", HELLO)
        assert answer.status == 200
        chunks = [event["choices"][0]["delta"] for event in answer.events[:-1]]
        thought = "".join(delta.get("reasoning_content") or "" for delta in chunks)
        assert answer.text == "Tea."
        assert thought.startswith("Hm. ")
        assert "[search" in thought
        assert answer.events[-1] == "[DONE]"


async def test_turn_is_the_operators() -> None:
    async with page() as operator:
        with_chat = await operator.ask("POST", "chat", HELLO, X_Letta_Chat_Key="page-1")
        assert with_chat.status == 200
        (turn,) = operator.gateway.backend.turns
        assert turn.sent.conversation_id is not None
        assert operator.gateway.app[keys.DRAIN].requests == 0


async def test_errors_are_those_of_the_api() -> None:
    async with page() as operator:
        gateway, key = operator.gateway, {"X-Api-Key": API_KEY}
        for body in ({**HELLO, "model": "nobody"}, {"model": "friend"}, {**HELLO, "n": 3}):
            by_page = await operator.ask("POST", "chat", body)
            by_api = await gateway.ask("POST", "/v1/chat/completions", {**JSON, **key}, msgspec.json.encode(body))
            assert (by_page.status, by_page.error) == (by_api.status, by_api.error)
            assert by_page.header("x-request-id")
        gateway.backend.down = UpstreamUnavailable()
        by_page = await operator.ask("POST", "chat", HELLO)
        by_api = await gateway.chat(headers=key, stream=True)
        assert (by_page.status, by_page.error) == (by_api.status, by_api.error)


async def test_error_in_the_stream_is_that_of_the_api() -> None:
    async with page() as operator:
        broken = Script(steps=([TextDelta("Hel")], Break(UpstreamUnavailable())))
        operator.gateway.backend.play(broken)
        operator.gateway.backend.play(broken)
        by_page = await operator.ask("POST", "chat", HELLO)
        by_api = await operator.gateway.chat(headers={"X-Api-Key": API_KEY}, stream=True)
        assert by_page.events[-1] == by_api.events[-1]
        assert by_page.events[-1]["error"]["code"] == "upstream_unavailable"


async def test_clients_do_not_see_what_the_page_sees() -> None:
    async with page() as operator:
        operator.gateway.backend.play(says("Hi"))
        answer = await operator.gateway.ask("POST", "/ui/api/chat", {**JSON, "X-Api-Key": API_KEY}, chat_body())
        assert answer.status == 401
        assert (await Page(operator.gateway, operator.cookie).ask("POST", "chat", HELLO)).status == 403
        assert operator.gateway.backend.turns == []
