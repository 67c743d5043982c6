"""Requests shaped as Roo Code sends them, before both Letta servers.

36 tools in 46 KB, every property required and none beside them, a system prompt of 50 KB, `max_tokens`, temperature 0,
and a user message with the state of the editor behind each tool message (Roo Code 3.52).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import openai
import pytest
import pytest_asyncio

from gateway.letta.demo_model import RunningDemoModel
from tests.live.letta_server import LettaServer
from tests.services.surroundings import API_KEY, Client

pytestmark = pytest.mark.asyncio(loop_scope="session")

_NAMES: Final = ("read_file", "attempt_completion", "ask_followup_question", *(f"mcp--server--{n}" for n in range(33)))
_PURPOSE: Final = "Read the contents of what is named, and answer with line numbers for easy reference. "
SYSTEM: Final = (
    "You are Roo, a highly skilled software engineer.\n\n" + "RULES: show names of files as links.\n" * 1_360
)
ENVIRONMENT: Final = (
    "<environment_details>\n# VSCode Visible Files\nsrc/main.py\n\n# Current Mode\n{}</environment_details>"
)


def tool(name: str) -> dict[str, Any]:
    texts = {field: {"type": "string", "description": f"The {field}. {_PURPOSE * 2}"} for field in ("path", "mode")}
    others = {"limit": {"type": "integer"}, "follow_up": {"type": "array", "items": {"type": "string"}}}
    properties = {"result": {"type": "string"}} if name == "attempt_completion" else {**texts, **others}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
    function = {"name": name, "description": _PURPOSE * 6, "strict": True, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS: Final[Any] = [tool(name) for name in _NAMES]


class Roo:
    """One task in the editor: the whole transcript goes with each request."""

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self._client = client
        self._model = model
        self.messages: list[Any] = [{"role": "system", "content": SYSTEM}]

    async def ask(self, *messages: dict[str, Any]) -> Any:
        """Send the transcript with what is new, and add the answer to it."""
        self.messages += messages
        calls: dict[int, dict[str, Any]] = {}
        text = ""
        finish: str | None = None
        async with asyncio.timeout(60):
            stream: Any = await self._client.chat.completions.create(
                model=self._model,
                messages=self.messages,
                tools=TOOLS,
                tool_choice="auto",
                parallel_tool_calls=True,
                temperature=0,
                max_tokens=8_192,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    finish = choice.finish_reason or finish
                    text += choice.delta.content or ""
                    for piece in choice.delta.tool_calls or ():
                        _add(calls, piece)
        called = [calls[index] for index in sorted(calls)]
        self.messages.append({"role": "assistant", "content": text, **({"tool_calls": called} if called else {})})
        return text, called, finish


def _add(calls: dict[int, dict[str, Any]], piece: Any) -> None:
    if piece.index not in calls:
        calls[piece.index] = {"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}}
    function = calls[piece.index]["function"]
    function["name"] += piece.function.name or ""
    function["arguments"] += piece.function.arguments or ""


@pytest_asyncio.fixture(loop_scope="session")
async def roo(client: Client) -> AsyncIterator[Roo]:
    headers = {"HTTP-Referer": "https://github.com/RooVetGit/Roo-Cline", "X-Title": "Roo Code"}
    sdk = openai.AsyncOpenAI(
        base_url=client.base_url, api_key=API_KEY, default_headers={**headers, "User-Agent": "RooCode/3.52.1"}
    )
    async with sdk:
        yield Roo(sdk, client.model)


def user(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def result(call: dict[str, Any], text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def seen_by(model: RunningDemoModel) -> str:
    return bytes(model.requests[-1].body).decode()


async def test_shape() -> None:
    assert 44_000 < len(json.dumps(TOOLS)) < 48_000
    assert 50_000 < len(SYSTEM) < 52_000
    assert len(TOOLS) == 36


async def test_task(roo: Roo, model: RunningDemoModel, letta: LettaServer) -> None:
    _, (call,), finish = await roo.ask(user("<task>\ncall read_file now\n</task>", ENVIRONMENT.format("")))
    assert finish == "tool_calls"
    assert call["function"]["name"] == "read_file"
    assert json.loads(call["function"]["arguments"]).keys() == {"path", "mode", "limit", "follow_up"}
    seen = seen_by(model)
    assert seen.count("You are Roo, a highly skilled software engineer.") == 1
    assert all(f'"{name}"' in seen for name in _NAMES)

    done = 'call attempt_completion with {"result": "All is well."}'
    text, calls, finish = await roo.ask(result(call, "1 | print()"), user(ENVIRONMENT.format(done)))
    assert (finish, [call["function"]["name"] for call in calls]) == ("tool_calls", ["attempt_completion"])
    assert json.loads(calls[0]["function"]["arguments"]) == {"result": "All is well."}
    seen = seen_by(model)
    assert "1 | print()" in seen
    assert seen.count("You are Roo, a highly skilled software engineer.") == 1

    news = user("<feedback>\nthink of tests\n</feedback>", ENVIRONMENT.format(""))
    text, calls, finish = await roo.ask(result(calls[0], ""), news)
    assert (calls, finish) == ([], "stop")
    assert "think of tests" in text
    assert seen_by(model).count("You are Roo, a highly skilled software engineer.") == 1


async def test_task_after_one_that_was_left_in_the_middle(roo: Roo, client: Client) -> None:
    await roo.ask(user("<task>\ncall read_file now\n</task>", ENVIRONMENT.format("")))
    roo.messages = roo.messages[:1]
    text, calls, finish = await roo.ask(user("<task>\nanother one\n</task>", ENVIRONMENT.format("")))
    assert (calls, finish) == ([], "stop")
    assert "another one" in text
