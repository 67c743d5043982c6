"""What coding agents and chat pages do, on a real Letta server of either kind: tools, edits, retries, instructions."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam

from gateway.letta.demo_model import RunningDemoModel
from tests.live.gateways import gateway_before, sdk
from tests.live.letta_server import Agent, LettaServer
from tests.server.subprocesses import GatewayProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.services]


def tool(name: str, *required: str) -> ChatCompletionToolParam:
    properties = {field: {"type": "string"} for field in required or ("city",)}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": schema}}


TOOLS = [tool("get_weather"), tool("get_time")]
CHAT = {"X-OpenWebUI-Chat-Id": "chat-1"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(letta: LettaServer) -> AsyncIterator[GatewayProcess]:
    async with gateway_before(letta, LETTA_GATEWAY_FIRST_BYTE_WAIT="60") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(gateway: GatewayProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(gateway) as client:
        yield client


def user(text: str) -> ChatCompletionMessageParam:
    return {"role": "user", "content": text}


def system(text: str) -> ChatCompletionMessageParam:
    return {"role": "system", "content": text}


def said(text: str) -> ChatCompletionMessageParam:
    return {"role": "assistant", "content": text}


def result(call_id: str, text: str) -> ChatCompletionMessageParam:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


async def ask(client: openai.AsyncOpenAI, agent: Agent, *messages: Any, **more: Any) -> ChatCompletion:
    async with asyncio.timeout(30):
        answer: ChatCompletion = await client.chat.completions.create(model=agent.name, messages=list(messages), **more)
    return answer


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def message_of(answer: ChatCompletion) -> Any:
    return answer.choices[0].message.model_dump(exclude_none=True, exclude={"reasoning", "reasoning_content"})


def seen_by(model: RunningDemoModel) -> str:
    """Return all that the model was sent with the newest request."""
    return json.dumps(json.loads(bytes(model.requests[-1].body)), ensure_ascii=False)


# Tools ---------------------------------------------------------------------------------------------------------------


async def test_two_parallel_calls_and_their_results(client: openai.AsyncOpenAI, agent: Agent) -> None:
    question = user("call get_weather and get_time now")
    async with client.chat.completions.stream(model=agent.name, messages=[question], tools=TOOLS) as stream:
        completion = await stream.get_final_completion()
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "get_time"]
    assert all(json.loads(call.function.arguments) == {"city": "Paris"} for call in calls)
    answered = await ask(
        client,
        agent,
        question,
        message_of(completion),
        *(result(call.id, f"{call.function.name} is fine") for call in calls),
        tools=TOOLS,
    )
    assert answered.choices[0].finish_reason == "stop"
    assert "get_weather is fine" in text_of(answered)
    assert "get_time is fine" in text_of(answered)


async def test_whole_answer_with_a_call(client: openai.AsyncOpenAI, agent: Agent) -> None:
    answer = await ask(client, agent, user("Let me see. call get_weather now"), tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls or []
    assert (answer.choices[0].finish_reason, call.type) == ("tool_calls", "function")
    assert text_of(answer).strip() == "Let me see."
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


async def test_the_model_sees_the_tools_that_the_client_named(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel
) -> None:
    await ask(client, agent, user("hello"), tools=TOOLS)
    offered = [tool["function"]["name"] for tool in json.loads(bytes(model.requests[-1].body)).get("tools") or []]
    assert {"get_weather", "get_time"} <= set(offered)
    await ask(client, agent, user("hello again"), tools=TOOLS, tool_choice="none")
    offered = [tool["function"]["name"] for tool in json.loads(bytes(model.requests[-1].body)).get("tools") or []]
    assert not {"get_weather", "get_time"} & set(offered)


async def test_results_with_a_user_message_behind_them(client: openai.AsyncOpenAI, agent: Agent) -> None:
    """Roo Code tells of its environment after each result."""
    question = user("call get_weather now")
    asked = await ask(client, agent, question, tools=TOOLS)
    (call,) = asked.choices[0].message.tool_calls or []
    answered = await ask(
        client, agent, question, message_of(asked), result(call.id, "sunny"), user("environment: linux"), tools=TOOLS
    )
    assert answered.choices[0].finish_reason == "stop"
    assert text_of(answered)
    again = await ask(client, agent, user("still there?"))
    assert text_of(again) == "You said: still there?"


async def test_one_of_two_results(client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel) -> None:
    question = user("call get_weather and get_time now")
    asked = await ask(client, agent, question, tools=TOOLS)
    first, _ = asked.choices[0].message.tool_calls or []
    answered = await ask(client, agent, question, message_of(asked), result(first.id, "sunny"), tools=TOOLS)
    assert "sunny" in text_of(answered)
    assert "without running this call" in seen_by(model)


async def test_call_that_is_abandoned(client: openai.AsyncOpenAI, agent: Agent) -> None:
    await ask(client, agent, user("call get_weather now"), tools=TOOLS)
    answer = await ask(client, agent, user("never mind"), tools=TOOLS)
    assert text_of(answer) == "You said: never mind"
    assert text_of(await ask(client, agent, user("and now?"))) == "You said: and now?"


async def test_gateway_is_killed_between_a_call_and_its_result(letta: LettaServer, agent: Agent, tmp_path: Any) -> None:
    home = {"LETTA_GATEWAY_HOME": str(tmp_path)}
    question = user("call get_weather now")
    async with gateway_before(letta, **home) as gateway, sdk(gateway) as client:
        asked = await ask(client, agent, question, tools=TOOLS)
        (call,) = asked.choices[0].message.tool_calls or []
        gateway.process.kill()
    async with gateway_before(letta, **home) as gateway, sdk(gateway) as client:
        answered = await ask(client, agent, question, message_of(asked), result(call.id, "sunny"), tools=TOOLS)
        assert "sunny" in text_of(answered)
        assert text_of(await ask(client, agent, user("and now?"))) == "You said: and now?"


async def test_results_for_another_owners_call(letta: LettaServer, agent: Agent) -> None:
    keys = {"LETTA_GATEWAY_API_KEYS": "sk-anna,sk-ben"}
    async with gateway_before(letta, **keys) as gateway, sdk(gateway, "sk-anna") as anna, sdk(gateway, "sk-ben") as ben:
        asked = await ask(anna, agent, user("call get_weather now"), tools=TOOLS)
        (call,) = asked.choices[0].message.tool_calls or []
        with pytest.raises(openai.NotFoundError) as refused:
            await ask(ben, agent, user("x"), message_of(asked), result(call.id, "mine"), tools=TOOLS)
        assert refused.value.code == "tool_call_not_found"
        answered = await ask(anna, agent, user("x"), message_of(asked), result(call.id, "sunny"), tools=TOOLS)
        assert "sunny" in text_of(answered)


# Chats ---------------------------------------------------------------------------------------------------------------


async def test_chat_that_goes_on(client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel) -> None:
    one = await ask(client, agent, user("first words"), extra_headers=CHAT)
    two = await ask(client, agent, user("first words"), said(text_of(one)), user("second words"), extra_headers=CHAT)
    assert text_of(two) == "You said: second words"
    seen = seen_by(model)
    assert seen.count("first words") == 2, "what the user said, and what the model made of it: no transcript again"


async def test_message_that_is_edited(client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel) -> None:
    chat = {"X-OpenWebUI-Chat-Id": "edited"}
    one = await ask(client, agent, user("I like apples"), extra_headers=chat)
    await ask(client, agent, user("I like apples"), said(text_of(one)), user("and pears"), extra_headers=chat)
    await ask(client, agent, user("I like apples"), said(text_of(one)), user("and plums"), extra_headers=chat)
    seen = seen_by(model)
    assert "I like apples" in seen
    assert "and plums" in seen
    assert "and pears" not in seen


async def test_answer_that_is_asked_for_again(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel
) -> None:
    chat = {"X-OpenWebUI-Chat-Id": "regenerated"}
    for _ in range(2):
        assert text_of(await ask(client, agent, user("sing to me"), extra_headers=chat)) == "You said: sing to me"
    assert seen_by(model).count("sing to me") == 1


async def test_chat_that_began_elsewhere(client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel) -> None:
    chat = {"X-OpenWebUI-Chat-Id": "imported"}
    answer = await ask(client, agent, user("my name is Ada"), said("Hello Ada."), user("who am I?"), extra_headers=chat)
    assert text_of(answer) == "You said: who am I?"
    seen = seen_by(model)
    assert "my name is Ada" in seen
    assert "Hello Ada." in seen


async def test_chat_survives_a_restart(
    letta: LettaServer, agent: Agent, model: RunningDemoModel, tmp_path: Any
) -> None:
    home = {"LETTA_GATEWAY_HOME": str(tmp_path)}
    async with gateway_before(letta, **home) as gateway, sdk(gateway) as client:
        one = await ask(client, agent, user("first words"), extra_headers=CHAT)
    async with gateway_before(letta, **home) as gateway, sdk(gateway) as client:
        await ask(client, agent, user("first words"), said(text_of(one)), user("second"), extra_headers=CHAT)
    assert seen_by(model).count("first words") == 2


async def test_title_leaves_no_trace(client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel) -> None:
    chat = {"X-OpenWebUI-Chat-Id": "titled"}
    one = await ask(client, agent, user("good morning"), extra_headers=chat)
    title = await ask(client, agent, user("### Task:\nGenerate a concise title for this chat."), extra_headers=chat)
    assert "### Task:" in text_of(title)
    await ask(client, agent, user("good morning"), said(text_of(one)), user("how are you?"), extra_headers=chat)
    assert "### Task" not in seen_by(model)
    await ask(client, agent, user("and on your own thread?"))
    assert "### Task" not in seen_by(model)


async def test_stateless_requests_know_nothing_of_each_other(
    letta: LettaServer, agent: Agent, model: RunningDemoModel
) -> None:
    async with gateway_before(letta, LETTA_GATEWAY_CONVERSATION="stateless") as gateway, sdk(gateway) as client:
        await ask(client, agent, user("a secret"))
        await ask(client, agent, user("one"), said("You said: one"), user("two"))
        seen = seen_by(model)
        assert "a secret" not in seen
        assert "one" in seen
        question = user("call get_weather now")
        asked = await ask(client, agent, question, tools=TOOLS)
        (call,) = asked.choices[0].message.tool_calls or []
        answered = await ask(client, agent, question, message_of(asked), result(call.id, "sunny"), tools=TOOLS)
        assert "sunny" in text_of(answered)


# System prompts ------------------------------------------------------------------------------------------------------


async def test_system_prompt_reaches_the_model(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel
) -> None:
    prompt = "Always answer in verse. " + "Consider the meter. " * 2_500
    for text in ("hello", "and again"):
        assert text_of(await ask(client, agent, system(prompt), user(text))) == f"You said: {text}"
        seen = seen_by(model)
        assert seen.count("Always answer in verse.") == 1
        assert prompt.strip() in seen


async def test_system_prompt_of_a_chat_is_told_once_and_again_when_it_changes(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel
) -> None:
    chat = {"X-OpenWebUI-Chat-Id": "instructed"}
    one = await ask(client, agent, system("Be brief."), user("one"), extra_headers=chat)
    two = await ask(
        client, agent, system("Be brief."), user("one"), said(text_of(one)), user("two"), extra_headers=chat
    )
    assert seen_by(model).count("Be brief.") == 1
    before = [user("one"), said(text_of(one)), user("two"), said(text_of(two))]
    await ask(client, agent, system("Be long."), *before, user("three"), extra_headers=chat)
    seen = seen_by(model)
    assert seen.count("Be brief.") == seen.count("Be long.") == 1


async def test_system_prompt_of_a_killed_gateway_is_seen_by_nobody_else(
    letta: LettaServer, agent: Agent, model: RunningDemoModel
) -> None:
    async with gateway_before(letta) as gateway, sdk(gateway) as client:
        stream = await client.chat.completions.create(
            model=agent.name, messages=[system("SECRET RULES"), user("count to 100 every 50 ms")], stream=True
        )
        await anext(aiter(stream))
        assert "SECRET RULES" in seen_by(model)
        gateway.signal(signal.SIGKILL)
        await gateway.ended()
    async with gateway_before(letta) as gateway, sdk(gateway) as client:
        chat = {"X-Letta-Chat-Key": "another"}
        assert text_of(await ask(client, agent, user("who?"), extra_headers=chat)) == "You said: who?"
        assert "SECRET RULES" not in seen_by(model)


async def test_long_turn_with_a_system_prompt_holds_up_no_other_chat(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel
) -> None:
    stream = await client.chat.completions.create(
        model=agent.name, messages=[system("SECRET RULES"), user("count to 200 every 50 ms")], stream=True
    )
    await anext(aiter(stream))
    for text, chat in (("one", "chat-of-one"), ("two", "chat-of-two")):
        headers = {"X-Letta-Chat-Key": chat}
        async with asyncio.timeout(5):
            assert text_of(await ask(client, agent, user(text), extra_headers=headers)) == f"You said: {text}"
        assert "SECRET RULES" not in seen_by(model)
    assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"


# Once ----------------------------------------------------------------------------------------------------------------


async def test_retried_request_is_delivered_once(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel
) -> None:
    key = {"Idempotency-Key": "once-and-for-all"}
    answers = await asyncio.gather(*(ask(client, agent, user("pay the bill"), extra_headers=key) for _ in range(3)))
    assert {text_of(answer) for answer in answers} == {"You said: pay the bill"}
    await ask(client, agent, user("and now?"))
    assert seen_by(model).count("pay the bill") == 2, "what the user said once, and the answer to it"


async def test_answer_that_is_slower_than_the_sdk_is_patient_is_delivered_once(
    gateway: GatewayProcess, agent: Agent, model: RunningDemoModel
) -> None:
    async with sdk(gateway, retries=3) as client:
        hurried = client.with_options(timeout=1.0)
        answer = await ask(hurried, agent, user("count to 90 every 50 ms"))
    assert text_of(answer).endswith("word89")
    asked = [request for request in model.requests if b"count to 90 every 50 ms" in bytes(request.body)]
    assert len(asked) == 1


# Structured output ---------------------------------------------------------------------------------------------------


async def test_answer_of_a_schema(client: openai.AsyncOpenAI, agent: Agent) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = await ask(client, agent, user('call answer with {"city": "Rome"}'), response_format=wanted)
    assert json.loads(text_of(answer)) == {"city": "Rome"}
    assert answer.choices[0].finish_reason == "stop"
    assert not answer.choices[0].message.tool_calls
    assert text_of(await ask(client, agent, user("and now?"))) == "You said: and now?"
    with pytest.raises(openai.InternalServerError) as failed:
        await ask(client, agent, user('call answer with {"town": "Rome"}'), response_format=wanted)
    assert failed.value.code == "invalid_structured_output"
    with pytest.raises(openai.InternalServerError) as failed:
        await ask(client, agent, user("just words"), response_format=wanted)
    assert failed.value.code == "invalid_structured_output"


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"X-Letta-Chat-Key": "functions"}])
async def test_functions_as_they_were_before_tools(
    client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel, headers: dict[str, str]
) -> None:
    functions: Any = [TOOLS[0]["function"]]
    question = user("call get_weather now")
    asked = await ask(client, agent, question, functions=functions, extra_headers=headers)
    called = asked.choices[0].message.function_call
    assert called is not None
    assert (asked.choices[0].finish_reason, called.name) == ("function_call", "get_weather")
    assert asked.choices[0].message.tool_calls is None
    answered = await ask(
        client,
        agent,
        question,
        message_of(asked),
        {"role": "function", "name": "get_weather", "content": "sunny"},
        functions=functions,
        extra_headers=headers,
    )
    assert text_of(answered) == "Tool said: sunny"
    assert seen_by(model).count("call get_weather now") == 1
    assert "Result of the tool call" not in seen_by(model)
    stream = await client.chat.completions.create(
        model=agent.name, messages=[question], functions=functions, stream=True, extra_headers=headers
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert "".join(piece.name or "" for piece in pieces) == "get_weather"
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == {"city": "Paris"}
    assert chunks[-1].choices[0].finish_reason == "function_call"
