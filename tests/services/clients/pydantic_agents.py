"""pydantic-ai, with both of its OpenAI models."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.services.clients.telling import (
    API_KEY,
    BASE_URL,
    GREETING,
    MODEL,
    NOBODY,
    QUESTION,
    ROME,
    STRUCTURED,
    THOUGHT,
    Heard,
    Place,
    Step,
    Tools,
    tell,
)

_PROVIDER: Final = OpenAIProvider(base_url=BASE_URL, api_key=API_KEY)
Maker = Callable[[str], Any]


def _chat(name: str) -> Any:
    return OpenAIChatModel(name, provider=_PROVIDER)


def _responses(name: str) -> Any:
    return OpenAIResponsesModel(name, provider=_PROVIDER)


def _agent(make: Maker, *, name: str = MODEL, tools: Tools | None = None, output: Any = str) -> Any:
    functions = [tools.get_weather, tools.get_time] if tools else []
    return Agent(make(name), instructions="You guide travellers.", tools=functions, output_type=output)


async def plain(make: Maker) -> Heard:
    return Heard((await _agent(make).run(GREETING)).output)


async def streamed(make: Maker) -> Heard:
    return await _streamed(make, GREETING)


async def reasoning(make: Maker) -> Heard:
    result = await _agent(make).run(THOUGHT)
    thoughts = [part.content for part in result.response.parts if isinstance(part, ThinkingPart)]
    return Heard(result.output, reasoning="".join(thoughts))


async def _streamed(make: Maker, text: str, tools: Tools | None = None) -> Heard:
    async with _agent(make, tools=tools).run_stream(text) as running:
        pieces = [piece async for piece in running.stream_text(delta=True, debounce_by=None)]
    return Heard("".join(pieces), len(pieces), calls=tools.sorted() if tools else [])


async def tool_loop(make: Maker) -> Heard:
    tools = Tools()
    result = await _agent(make, tools=tools).run(QUESTION)
    return Heard(result.output, calls=tools.sorted())


async def streamed_tool_loop(make: Maker) -> Heard:
    return await _streamed(make, QUESTION, Tools())


async def structured(make: Maker) -> Heard:
    result = await _agent(make, output=NativeOutput(Place)).run(STRUCTURED)
    return Heard(result.output.model_dump_json())


async def structured_by_tool(make: Maker) -> Heard:
    """The library's own way: a tool `final_result`, `tool_choice: required`, and its call is the end."""
    result = await _agent(make, output=Place).run(f"call final_result with {ROME}")
    return Heard(result.output.model_dump_json())


async def unknown_model(make: Maker) -> Heard:
    try:
        await _agent(make, name=NOBODY).run(GREETING)
    except ModelHTTPError as error:
        return Heard(status=error.status_code)
    raise AssertionError("no error was raised")


_STEPS: Final = (
    plain,
    streamed,
    reasoning,
    tool_loop,
    streamed_tool_loop,
    structured,
    structured_by_tool,
    unknown_model,
)


def _with(step: Callable[[Maker], Any], make: Maker) -> Step:
    return lambda: step(make)


STEPS: Final[dict[str, Step]] = {
    **{step.__name__: _with(step, _chat) for step in _STEPS},
    **{f"responses_{step.__name__}": _with(step, _responses) for step in _STEPS},
}

if __name__ == "__main__":
    asyncio.run(tell(STEPS))
