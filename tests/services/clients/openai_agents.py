"""The OpenAI Agents SDK, with both of its model classes."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

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
    Step,
    Tools,
    tell,
)

_CLIENT: Final = openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
Maker = Callable[[str], Any]


def _chat(name: str) -> Any:
    return OpenAIChatCompletionsModel(name, _CLIENT)


def _responses(name: str) -> Any:
    return OpenAIResponsesModel(name, _CLIENT)


def _agent(make: Maker, *, name: str = MODEL, tools: Tools | None = None, output: Any = None) -> Any:
    functions = [function_tool(tools.get_weather), function_tool(tools.get_time)] if tools else []
    settings = ModelSettings(parallel_tool_calls=True) if tools else ModelSettings()
    return Agent(
        name="Guide",
        instructions="You guide travellers.",
        model=make(name),
        tools=functions,
        output_type=output,
        model_settings=settings,
    )


async def plain(make: Maker) -> Heard:
    return Heard((await Runner.run(_agent(make), GREETING)).final_output)


async def streamed(make: Maker) -> Heard:
    return await _streamed(make, GREETING)


async def streamed_reasoning(make: Maker) -> Heard:
    return await _streamed(make, THOUGHT)


async def _streamed(make: Maker, text: str, tools: Tools | None = None) -> Heard:
    running = Runner.run_streamed(_agent(make, tools=tools), text)
    pieces = 0
    thoughts: list[str] = []
    async for event in running.stream_events():
        if event.type == "raw_response_event":
            pieces += event.data.type == "response.output_text.delta"
            # `reasoning_content` comes as a summary; `reasoning`, the same text, as reasoning_text events beside it.
            if event.data.type == "response.reasoning_summary_text.delta":
                thoughts.append(event.data.delta)
    return Heard(running.final_output, pieces, "".join(thoughts), tools.sorted() if tools else [])


async def tool_loop(make: Maker) -> Heard:
    tools = Tools()
    result = await Runner.run(_agent(make, tools=tools), QUESTION)
    return Heard(result.final_output, calls=tools.sorted())


async def streamed_tool_loop(make: Maker) -> Heard:
    return await _streamed(make, QUESTION, Tools())


async def structured(make: Maker) -> Heard:
    result = await Runner.run(_agent(make, output=Place), STRUCTURED)
    return Heard(result.final_output_as(Place).model_dump_json())


async def unknown_model(make: Maker) -> Heard:
    try:
        await Runner.run(_agent(make, name=NOBODY), GREETING)
    except openai.NotFoundError as error:
        return Heard(status=error.status_code)
    raise AssertionError("no error was raised")


_STEPS: Final = (plain, streamed, streamed_reasoning, tool_loop, streamed_tool_loop, structured, unknown_model)


def _with(step: Callable[[Maker], Any], make: Maker) -> Step:
    return lambda: step(make)


STEPS: Final[dict[str, Step]] = {
    **{step.__name__: _with(step, _chat) for step in _STEPS},
    **{f"responses_{step.__name__}": _with(step, _responses) for step in _STEPS},
}

if __name__ == "__main__":
    set_tracing_disabled(disabled=True)
    asyncio.run(tell(STEPS))
