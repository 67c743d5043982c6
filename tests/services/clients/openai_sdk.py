"""The official SDK of Python: whole and streamed answers, its helpers, a tool loop by hand, both APIs."""

import asyncio
import contextlib
from typing import Any, Final

import openai

from tests.services.clients.telling import (
    API_KEY,
    BASE_URL,
    GREETING,
    MODEL,
    NOBODY,
    QUESTION,
    STRUCTURED,
    THOUGHT,
    Heard,
    Place,
    Tools,
    compact,
    tell,
)

_CLIENT: Final = openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
_CITY: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def _tool(name: str) -> dict[str, Any]:
    return {"name": name, "description": f"The {name}.", "parameters": _CITY, "strict": True}


_CHAT_TOOLS: Final[Any] = [{"type": "function", "function": _tool(name)} for name in ("get_weather", "get_time")]
_RESPONSES_TOOLS: Final[Any] = [{"type": "function", **_tool(name)} for name in ("get_weather", "get_time")]


def _user(text: str) -> Any:
    return {"role": "user", "content": text}


# Chat completions -----------------------------------------------------------------------------------------------------


async def plain() -> Heard:
    answer = await _CLIENT.chat.completions.create(model=MODEL, messages=[_user(GREETING)])
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    return Heard(answer.choices[0].message.content or "")


async def streamed() -> Heard:
    options: Any = {"include_usage": True}
    stream = await _CLIENT.chat.completions.create(
        model=MODEL, messages=[_user(GREETING)], stream=True, stream_options=options
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    return Heard("".join(pieces), len(pieces))


async def reasoning() -> Heard:
    answer = await _CLIENT.chat.completions.create(model=MODEL, messages=[_user(THOUGHT)])
    message: Any = answer.choices[0].message
    return Heard(message.content, reasoning=message.reasoning_content)


async def tool_loop() -> Heard:
    tools, messages = Tools(), [_user(QUESTION)]
    while True:
        answer = await _CLIENT.chat.completions.create(
            model=MODEL, messages=messages, tools=_CHAT_TOOLS, parallel_tool_calls=True
        )
        message = answer.choices[0].message
        if answer.choices[0].finish_reason != "tool_calls":
            return Heard(message.content or "", calls=tools.calls)
        messages += [message, *_results(tools, message.tool_calls)]


async def streamed_tool_loop() -> Heard:
    tools, messages = Tools(), [_user(QUESTION)]
    while True:
        pieces = 0
        async with _CLIENT.chat.completions.stream(model=MODEL, messages=messages, tools=_CHAT_TOOLS) as stream:
            async for event in stream:
                pieces += event.type == "content.delta"
            completion = await stream.get_final_completion()
        choice = completion.choices[0]
        if choice.finish_reason != "tool_calls":
            return Heard(choice.message.content or "", pieces, calls=tools.calls)
        messages += [choice.message, *_results(tools, choice.message.tool_calls)]


def _results(tools: Tools, calls: Any) -> list[Any]:
    return [
        {"role": "tool", "tool_call_id": call.id, "content": tools.run(call.function.name, call.function.arguments)}
        for call in calls
    ]


async def structured() -> Heard:
    answer = await _CLIENT.chat.completions.parse(model=MODEL, messages=[_user(STRUCTURED)], response_format=Place)
    place = answer.choices[0].message.parsed
    assert place is not None
    return Heard(place.model_dump_json())


async def unknown_model() -> Heard:
    try:
        await _CLIENT.chat.completions.create(model=NOBODY, messages=[_user(GREETING)])
    except openai.NotFoundError as error:
        is_clear = error.code == "model_not_found" and NOBODY in error.message
        return Heard(status=error.status_code, failed="" if is_clear else str(error))
    raise AssertionError("no error was raised")


# Responses ------------------------------------------------------------------------------------------------------------


async def responses_plain() -> Heard:
    response = await _CLIENT.responses.create(model=MODEL, input=GREETING)
    assert response.usage is not None
    return Heard(response.output_text)


async def responses_streamed() -> Heard:
    pieces = 0
    async with _CLIENT.responses.stream(model=MODEL, input=GREETING) as stream:
        async for event in stream:
            pieces += event.type == "response.output_text.delta"
        response = await stream.get_final_response()
    return Heard(response.output_text, pieces)


async def responses_streamed_reasoning() -> Heard:
    pieces = 0
    thoughts: list[str] = []
    async with _CLIENT.responses.stream(model=MODEL, input=THOUGHT, reasoning={"summary": "auto"}) as stream:
        async for event in stream:
            pieces += event.type == "response.output_text.delta"
            if event.type == "response.reasoning_summary_text.delta":
                thoughts.append(event.delta)
        response = await stream.get_final_response()
    items = [item for item in response.output if item.type == "reasoning"]
    assert "".join(part.text for item in items for part in item.summary) == "".join(thoughts)
    return Heard(response.output_text, pieces, "".join(thoughts))


async def responses_tool_loop() -> Heard:
    tools, said = Tools(), [_user(QUESTION)]
    while True:
        response = await _CLIENT.responses.create(model=MODEL, input=said, tools=_RESPONSES_TOOLS, store=False)
        outputs = _outputs(tools, response.output)
        if not outputs:
            return Heard(response.output_text, calls=tools.calls)
        said += [*(item.to_dict() for item in response.output), *outputs]


async def responses_streamed_tool_loop() -> Heard:
    """By `previous_response_id`: the gateway keeps what was said before."""
    tools = Tools()
    said: Any = QUESTION
    before: Any = openai.omit
    while True:
        pieces = 0
        async with _CLIENT.responses.stream(
            model=MODEL, input=said, tools=_RESPONSES_TOOLS, previous_response_id=before
        ) as stream:
            async for event in stream:
                pieces += event.type == "response.output_text.delta"
            response = await stream.get_final_response()
        said = _outputs(tools, response.output)
        if not said:
            return Heard(response.output_text, pieces, calls=tools.calls)
        before = response.id


def _outputs(tools: Tools, items: Any) -> list[Any]:
    return [
        {"type": "function_call_output", "call_id": item.call_id, "output": tools.run(item.name, item.arguments)}
        for item in items
        if item.type == "function_call"
    ]


async def responses_structured() -> Heard:
    response = await _CLIENT.responses.parse(model=MODEL, input=STRUCTURED, text_format=Place)
    assert response.output_parsed is not None
    assert compact(response.output_text) == response.output_parsed.model_dump_json()
    return Heard(response.output_parsed.model_dump_json())


async def responses_follow_up() -> Heard:
    first = await _CLIENT.responses.create(model=MODEL, input=GREETING)
    second = await _CLIENT.responses.create(model=MODEL, input="And now?", previous_response_id=first.id)
    assert (await _CLIENT.responses.retrieve(second.id)).output_text == second.output_text
    items = await _CLIENT.responses.input_items.list(second.id)
    assert len(items.data) == 1
    await _CLIENT.responses.delete(second.id)
    with contextlib.suppress(openai.NotFoundError):
        await _CLIENT.responses.retrieve(second.id)
        raise AssertionError("a deleted response is still there")
    return Heard(second.output_text)


async def responses_unknown_model() -> Heard:
    try:
        await _CLIENT.responses.create(model=NOBODY, input=GREETING)
    except openai.NotFoundError as error:
        return Heard(status=error.status_code)
    raise AssertionError("no error was raised")


STEPS: Final = {
    step.__name__: step
    for step in (
        plain,
        streamed,
        reasoning,
        tool_loop,
        streamed_tool_loop,
        structured,
        unknown_model,
        responses_plain,
        responses_streamed,
        responses_streamed_reasoning,
        responses_tool_loop,
        responses_streamed_tool_loop,
        responses_structured,
        responses_follow_up,
        responses_unknown_model,
    )
}

if __name__ == "__main__":
    asyncio.run(tell(STEPS))
