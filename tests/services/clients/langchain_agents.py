"""langchain-openai over both APIs, alone and in LangGraph's agent that reasons and acts."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import openai
from langchain.agents import create_agent
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI

from tests.services.clients.telling import (
    API_KEY,
    BASE_URL,
    GREETING,
    MODEL,
    NOBODY,
    QUESTION,
    STRUCTURED,
    Heard,
    Place,
    Step,
    Tools,
    tell,
)


def _model(*, responses: bool, name: str = MODEL) -> Any:
    return ChatOpenAI(
        model=name, base_url=BASE_URL, api_key=API_KEY, use_responses_api=responses, max_retries=0, temperature=0
    )


def _agent(*, responses: bool, tools: Tools) -> Any:
    return create_agent(
        _model(responses=responses),
        tools=[tools.get_weather, tools.get_time],
        system_prompt="You guide travellers.",
    )


async def plain(*, responses: bool) -> Heard:
    return Heard((await _model(responses=responses).ainvoke(GREETING)).text)


async def streamed(*, responses: bool) -> Heard:
    chunks = [chunk async for chunk in _model(responses=responses).astream(GREETING)]
    pieces = [chunk.text for chunk in chunks if chunk.text]
    return Heard("".join(pieces), len(pieces))


async def tool_loop(*, responses: bool) -> Heard:
    tools = Tools()
    ended = await _agent(responses=responses, tools=tools).ainvoke({"messages": [("user", QUESTION)]})
    return Heard(ended["messages"][-1].text, calls=tools.sorted())


async def streamed_tool_loop(*, responses: bool) -> Heard:
    tools = Tools()
    asked = {"messages": [("user", QUESTION)]}
    pieces: list[str] = []
    async for message, _ in _agent(responses=responses, tools=tools).astream(asked, stream_mode="messages"):
        if isinstance(message, AIMessageChunk) and message.text:
            pieces.append(str(message.text))
    return Heard("".join(pieces), len(pieces), calls=tools.sorted())


async def structured(*, responses: bool) -> Heard:
    place = await _model(responses=responses).with_structured_output(Place).ainvoke(STRUCTURED)
    return Heard(place.model_dump_json())


async def unknown_model(*, responses: bool) -> Heard:
    try:
        await _model(responses=responses, name=NOBODY).ainvoke(GREETING)
    except openai.NotFoundError as error:
        return Heard(status=error.status_code)
    raise AssertionError("no error was raised")


_STEPS: Final = (plain, streamed, tool_loop, streamed_tool_loop, structured, unknown_model)


def _with(step: Callable[..., Any], *, responses: bool) -> Step:
    return lambda: step(responses=responses)


STEPS: Final[dict[str, Step]] = {
    **{step.__name__: _with(step, responses=False) for step in _STEPS},
    **{f"responses_{step.__name__}": _with(step, responses=True) for step in _STEPS},
}

if __name__ == "__main__":
    asyncio.run(tell(STEPS))
