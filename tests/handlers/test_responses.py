"""``/v1/responses`` over HTTP, with the official SDK and a scripted backend."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import openai
import pytest

from gateway.errors import TurnFailed
from gateway.letta.scripted import Break, Hang, Hold, Script, says
from gateway.translation.agent_events import (
    Batch,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.agent_turn import AgentSaid, AgentTurn, Instructed, Text, ToolResult, UserSaid
from tests.server.running import FRIEND, JSON, Running, serving, settings
from tests.server.wire import until

ALL: Batch = [Stop("end_turn"), Usage(10, 2)]
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


@pytest.fixture
async def client(gateway: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(gateway) as client:
        yield client


def sdk(gateway: Running, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=key, max_retries=0)


def sent(gateway: Running) -> AgentTurn:
    return gateway.backend.turns[-1].sent


def user(text: str) -> UserSaid:
    return UserSaid((Text(text),))


async def test_response_is_answered_and_stored(gateway: Running, client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="friend", input="Hello?", instructions="Be kind.", metadata={"a": "b"})
    assert (made.status, made.output_text, made.model) == ("completed", "Hello, world!", "friend")
    assert made.usage is not None
    assert made.usage.total_tokens == 120
    assert sent(gateway).news == (user("Hello?"),)
    assert await client.responses.retrieve(made.id) == made
    items = await client.responses.input_items.list(made.id)
    assert [item.to_dict()["content"] for item in items.data] == [[{"type": "input_text", "text": "Hello?"}]]


async def test_stream_ends_in_what_is_stored(gateway: Running, client: openai.AsyncOpenAI) -> None:
    gateway.backend.play(
        Script(
            (
                [ReasoningDelta("Hm")],
                [ServerToolCall("c-1", "archival_memory_search", "{}")],
                [ServerToolReturn("c-1", "archival_memory_search", succeeded=True)],
                [TextDelta("Hel")],
                [TextDelta("lo")],
                ALL,
            )
        )
    )
    async with client.responses.stream(model="friend", input="Hello?") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "mcp_call", "message"]
    stored = await client.responses.retrieve(final.id)
    assert (stored.output_text, len(stored.output)) == ("Hello", 3)


async def test_response_that_follows_another(gateway: Running, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="friend", input="one", instructions="Be kind.")
    second = await client.responses.create(model="friend", input="two", previous_response_id=first.id)
    assert sent(gateway).conversation_id is not None
    assert sent(gateway).history == (user("one"), AgentSaid("Hello, world!"))
    assert sent(gateway).news == (user("two"),)
    third = await client.responses.create(model="friend", input="three", previous_response_id=second.id)
    assert sent(gateway).history == ()
    assert sent(gateway).news == (user("three"),)
    await client.responses.create(model="friend", input="else", previous_response_id=second.id)
    assert sent(gateway).history[-2:] == (user("two"), AgentSaid("Hello, world!")), "another branch"
    assert third.previous_response_id == second.id


async def test_tool_loop(gateway: Running, client: openai.AsyncOpenAI) -> None:
    gateway.backend.play(Script(([ToolCallDelta("c-1", "get_weather", "{}")], [Stop("requires_approval")])))
    asked = await client.responses.create(model="friend", input="weather?", tools=[TOOL])
    (call,) = asked.output
    assert (call.type, call.call_id) == ("function_call", "c-1")  # type: ignore[union-attr]
    result: Any = {"type": "function_call_output", "call_id": "c-1", "output": "sunny"}
    done = await client.responses.create(model="friend", input=[result], previous_response_id=asked.id, tools=[TOOL])
    assert done.output_text == "Hello, world!"
    assert sent(gateway).returns == (ToolResult("c-1", "sunny"),)
    assert sent(gateway).conversation_id is None, "where the call waits"
    assert [tool.name for tool in sent(gateway).tools] == ["get_weather"]


async def test_loop_of_a_custom_tool(gateway: Running, client: openai.AsyncOpenAI) -> None:
    called: Batch = [ToolCallDelta("c-1", "apply_patch", '{"in'), ToolCallDelta("c-1", None, 'put": "*** Begin\\n"}')]
    gateway.backend.play(Script((called, [Stop("requires_approval")])))
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    patch: Any = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": grammar}
    asked = await client.responses.create(model="friend", input="fix it", tools=[patch])
    (offered,) = sent(gateway).tools
    assert (offered.name, "start: /.+/" in offered.description) == ("apply_patch", True)
    (call,) = asked.output
    assert call.type == "custom_tool_call"
    assert (call.call_id, call.name, call.input) == ("c-1", "apply_patch", "*** Begin\n")
    said: Any = [
        {"role": "user", "content": "fix it"},
        call.to_dict(),
        {"type": "custom_tool_call_output", "call_id": "c-1", "output": "Done!"},
    ]
    done = await client.responses.create(model="friend", input=said, tools=[patch])
    assert done.output_text == "Hello, world!"
    assert sent(gateway).returns == (ToolResult("c-1", "Done!"),)


async def test_conversation_that_is_named_holds_what_came_before(gateway: Running, client: openai.AsyncOpenAI) -> None:
    for text in ("one", "two", "three"):
        await client.responses.create(model="friend", input=text, conversation="conv_42")
        assert sent(gateway).news == (user(text),)
        assert sent(gateway).history == ()
    assert len({turn.sent.conversation_id for turn in gateway.backend.turns}) == 1
    said: Any = [
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "Hello, world!"},
        {"role": "user", "content": "four"},
    ]
    await client.responses.create(model="friend", input=said, conversation="conv_42")
    assert sent(gateway).news == (user("four"),)


async def test_unstored_response_is_not_to_be_had(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="friend", input="Hello?", store=False)
    for asking in (
        client.responses.retrieve(made.id),
        client.responses.input_items.list(made.id),
        client.responses.create(model="friend", input="Hi", previous_response_id=made.id),
        client.responses.cancel(made.id),
    ):
        with pytest.raises(openai.NotFoundError) as gone:
            await asking
        assert gone.value.code == "response_not_found"


async def test_pages_of_input_items(gateway: Running, client: openai.AsyncOpenAI) -> None:
    said: Any = [{"role": "user", "content": str(number)} for number in range(5)]
    made = await client.responses.create(model="friend", input=said)
    listed = [item.to_dict()["content"] async for item in client.responses.input_items.list(made.id, limit=2)]
    assert [content[0]["text"] for content in listed] == ["4", "3", "2", "1", "0"]  # type: ignore[index]
    path = f"/v1/responses/{made.id}"
    for query, param in (("limit=abc", "limit"), ("limit=0", "limit"), ("order=up", "order"), ("after=x", "after")):
        answer = await gateway.ask("GET", f"{path}/input_items?{query}")
        assert (answer.status, answer.error["param"]) == (400, param)
    answer = await gateway.ask("GET", f"{path}?stream=true")
    assert (answer.status, answer.code, answer.error["param"]) == (400, "unsupported_parameter", "stream")
    assert (await gateway.ask("GET", f"{path}?stream=false")).status == 200


async def test_deleted_response(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="friend", input="Hello?")
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.delete(made.id)


async def test_response_of_another_owner() -> None:
    async with serving(settings(api_keys=("sk-anna", "sk-ben"))) as gateway:
        anna, ben = sdk(gateway, "sk-anna"), sdk(gateway, "sk-ben")
        made = await anna.responses.create(model="friend", input="Hello?")
        unknown: list[str] = []
        others: list[str] = []
        for response_id, errors in (("resp_" + "0" * 32, unknown), (made.id, others)):
            for asking in (
                ben.responses.retrieve(response_id),
                ben.responses.delete(response_id),
                ben.responses.cancel(response_id),
                ben.responses.input_items.list(response_id),
                ben.responses.create(model="friend", input="Hi", previous_response_id=response_id),
            ):
                with pytest.raises(openai.NotFoundError) as gone:
                    await asking
                errors.append(str(gone.value).replace(response_id, "ID"))
        assert unknown == others
        assert (await anna.responses.retrieve(made.id)).output_text == "Hello, world!"
        await anna.close()
        await ben.close()


async def test_response_is_cancelled_from_elsewhere(gateway: Running, client: openai.AsyncOpenAI) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    stream = await client.responses.create(model="friend", input="Hello?", stream=True)
    kinds, made, cancelled = [], "", None
    async for event in stream:
        kinds.append(event.type)
        if event.type == "response.created":
            made = event.response.id
        if event.type == "response.output_text.delta":
            cancelled = await client.responses.cancel(made)
    assert kinds[-1] == "response.failed"
    assert cancelled is not None
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "Hel")
    await until(lambda: gateway.backend.turns[0].cancelled)
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(cancelled.id)


async def test_failure_in_the_middle(gateway: Running, client: openai.AsyncOpenAI) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], Break(TurnFailed(should_retry=False)))))
    stream = await client.responses.create(model="friend", input="Hello?", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.code == "server_error"
    stored = await client.responses.retrieve(events[-1].response.id)
    assert (stored.status, stored.output_text) == ("failed", "Hel")
    assert stored.error == events[-1].response.error
    await client.responses.create(model="friend", input="And now?", previous_response_id=stored.id)
    assert sent(gateway).history == (user("Hello?"), AgentSaid("Hel")), "the message was delivered"
    assert sent(gateway).news == (user("And now?"),)


async def test_response_that_is_under_way(gateway: Running, client: openai.AsyncOpenAI) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script(([TextDelta("Hel")], Hold(gate), [TextDelta("lo")], ALL)))
    stream = await client.responses.create(model="friend", input="Hello?", stream=True)
    response_id = ""
    async for event in stream:
        if event.type == "response.created":
            response_id = event.response.id
        if event.type != "response.output_text.delta" or gate.is_set():
            continue
        assert (await client.responses.retrieve(response_id)).status == "in_progress"
        for asking in (
            client.responses.delete(response_id),
            client.responses.input_items.list(response_id),
            client.responses.create(model="friend", input="Hi", previous_response_id=response_id),
        ):
            with pytest.raises(openai.ConflictError) as busy:
                await asking
            assert busy.value.code == "conversation_busy"
        gate.set()
    assert len(gateway.backend.turns) == 1
    stored = await client.responses.retrieve(response_id)
    assert (stored.status, stored.output_text) == ("completed", "Hello")


async def test_response_whose_client_leaves_is_stored_as_cancelled(
    gateway: Running, client: openai.AsyncOpenAI
) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    stream = await client.responses.create(model="friend", input="Hello?", stream=True)
    response_id = ""
    async for event in stream:
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    async with asyncio.timeout(5):
        while (stored := await client.responses.retrieve(response_id)).status == "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (stored.status, stored.output_text) == ("cancelled", "Hel")


async def test_failure_before_the_first_byte_is_a_status(gateway: Running) -> None:
    gateway.backend.play(Script(opening=(Break(TurnFailed(should_retry=False)),)))
    body = b'{"model": "friend", "input": "Hi", "stream": true}'
    answer = await gateway.ask("POST", "/v1/responses", JSON, body)
    assert (answer.status, answer.code) == (502, "agent_run_failed")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"input": "Hi"}', "model"),
        (b'{"model": "friend"}', "input"),
        (b'{"model": "friend", "input": []}', "input"),
        (b'{"model": "friend", "input": "Hi", "background": true}', "background"),
        (b'{"model": "friend", "input": [{"role": "user", "content": 5}]}', "input[0].content"),
    ],
)
async def test_request_that_is_none(gateway: Running, body: bytes, param: str) -> None:
    answer = await gateway.ask("POST", "/v1/responses", JSON, body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert gateway.backend.turns == []


async def test_retry_is_answered_from_the_first(gateway: Running) -> None:
    headers = {**JSON, "Idempotency-Key": "r-1"}
    body = b'{"model": "friend", "input": "Hi"}'
    first = await gateway.ask("POST", "/v1/responses", headers, body)
    again = await gateway.ask("POST", "/v1/responses", headers, body)
    assert first.body == again.body
    assert len(gateway.backend.turns) == 1


async def test_instructions_hold_for_one_response(gateway: Running, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="friend", input="one", instructions="Be kind.", conversation="c")
    assert Instructed("Be kind.") in sent(gateway).news
    assert first.instructions == "Be kind."


async def test_client_that_leaves_before_it_is_stored(gateway: Running, client: openai.AsyncOpenAI) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((Hold(gate), [TextDelta("Hi")], ALL)), says("and now?"))
    asking = asyncio.get_running_loop().create_task(client.responses.create(model="friend", input="one"))
    await until(lambda: gateway.backend.turns)
    asking.cancel()
    await until(lambda: gateway.backend.turns[0].closed)
    assert (await client.responses.create(model=FRIEND.id, input="two")).output_text == "and now?"


@pytest.mark.parametrize("item", [[], 5, "text", None, True])
async def test_item_that_is_no_object(item: object) -> None:
    async with serving() as gateway:
        body = msgspec.json.encode({"model": "friend", "input": [item]})
        answer = await gateway.ask("POST", "/v1/responses", JSON, body)
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert gateway.backend.turns == []
