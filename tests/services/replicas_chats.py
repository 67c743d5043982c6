"""Chats with tools by the official SDK, whose every message has a word of its own, and what became of each."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import openai

from tests.live.test_chats import TOOLS, result, user

TRIES: Final = 6
"""Messages that a person says before giving up."""
PAUSE: Final = 0.5
"""Seconds in which a person reads an error."""


class Refused(msgspec.Struct, frozen=True):
    """A message that got no answer but an error; times are by the monotonic clock."""

    word: str
    code: str
    since: float
    at: float


class Record:
    """What became of all messages; ``answered`` has the words of those that got the whole answer, and when."""

    def __init__(self) -> None:
        self.answered: dict[str, float] = {}
        self.refused: list[Refused] = []
        self.slowest = 0.0

    @property
    def codes(self) -> Counter[str]:
        """Count the errors by what they say."""
        return Counter(refused.code for refused in self.refused)


class Chat:
    """A chat of three messages: one that makes the agent call a tool, the tool's result, and one more."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, number: int, record: Record) -> None:
        self._client = client
        self._model = model
        self._number = number
        self._record = record
        self._transcript: list[Any] = []

    async def run(self) -> None:
        """Say all three."""
        asked = await self._say("a", lambda word: user(f"{word} call get_weather now"))
        (call,) = asked["tool_calls"]
        await self._say("b", lambda word: result(call["id"], word))
        await self._say("c", user)

    async def _say(self, step: str, message: Callable[[str], Any]) -> dict[str, Any]:
        """Say something until there is an answer: after an error in other words, as what was said may be known."""
        for attempt in range(TRIES):
            word = f"w{self._number}{step}{attempt}"
            since, said = time.monotonic(), [*self._transcript, message(word)]
            try:
                answer = await self._ask(said)
            except (openai.APIError, ConnectionError) as error:
                self._record.refused.append(Refused(word, _code_of(error), since, time.monotonic()))
                await asyncio.sleep(PAUSE)
                continue
            assert word in answer["content"], (word, answer)
            assert ("tool_calls" in answer) == (step == "a"), (word, answer)
            self._record.answered[word] = time.monotonic()
            self._record.slowest = max(self._record.slowest, time.monotonic() - since)
            self._transcript = [*said, answer]
            return answer
        raise AssertionError(f"chat {self._number} got no answer: {self._record.codes}")

    async def _ask(self, messages: list[Any]) -> dict[str, Any]:
        headers = {"X-Letta-Chat-Key": f"chat-{self._number}", "Idempotency-Key": uuid.uuid4().hex}
        ask = self._client.chat.completions.create
        if self._number % 2:
            whole = await ask(model=self._model, messages=messages, tools=TOOLS, extra_headers=headers)
            return whole.choices[0].message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True)
        pieces = await ask(model=self._model, messages=messages, tools=TOOLS, extra_headers=headers, stream=True)
        return await folded(pieces)


async def folded(pieces: openai.AsyncStream[Any]) -> dict[str, Any]:
    """Return the message of a stream that came to its end."""
    text, reason = "", None
    calls: dict[int, dict[str, Any]] = {}
    async for piece in pieces:
        for choice in piece.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for delta in choice.delta.tool_calls or ():
                call = calls.setdefault(delta.index, {"type": "function", "function": {"name": "", "arguments": ""}})
                call["id"] = delta.id or call.get("id")
                call["function"]["name"] += delta.function.name or ""
                call["function"]["arguments"] += delta.function.arguments or ""
    if reason is None:
        raise ConnectionError("the stream has no end")
    return {"role": "assistant", "content": text, **({"tool_calls": [*calls.values()]} if calls else {})}


def _code_of(error: openai.APIError | ConnectionError) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"{error.status_code} {error.code}"
    if isinstance(error, openai.APIError) and error.code:
        return f"in-band {error.code}"
    return type(error).__name__
