"""What a client is to hear of each step that it tries, whoever it is; and what it tells of it, as one line of JSON.

The scripted model behind the agents decides what is said: the list is at the top of `gateway/letta/demo_script.py`.
"""

import re
from typing import Any, Final

import msgspec


class Call(msgspec.Struct, frozen=True):
    """A tool as the client ran it."""

    name: str
    arguments: Any


class Heard(msgspec.Struct, frozen=True):
    """What a client made of the answer to one step."""

    step: str
    text: str = ""
    pieces: int = 0
    """How many pieces a streamed answer came in."""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    status: int = 0
    """The HTTP status of the error that the client raised."""
    failed: str = ""
    """What went wrong with the step, where nothing should have."""


class Expected(msgspec.Struct, frozen=True):
    """What every client is to make of a step."""

    text: str = ""
    streamed: bool = False
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    status: int = 0


_GREETED: Final = "You said: Hello there, friend."
_TOLD: Final = "Tool said: It is sunny in Paris.; It is noon in Paris."
_CALLED: Final = (Call("get_weather", {"city": "Paris"}), Call("get_time", {"city": "Paris"}))
_THOUGHT: Final = ("You said: think of Rome", "I have to think of Rome")

EXPECTED: Final = {
    "plain": Expected(_GREETED),
    "streamed": Expected(_GREETED, streamed=True),
    "reasoning": Expected(_THOUGHT[0], reasoning=_THOUGHT[1]),
    "streamed_reasoning": Expected(_THOUGHT[0], streamed=True, reasoning=_THOUGHT[1]),
    "tool_loop": Expected(_TOLD, calls=_CALLED),
    "streamed_tool_loop": Expected(_TOLD, streamed=True, calls=_CALLED),
    "structured": Expected('{"city":"Rome","people":2800000}'),
    "structured_by_tool": Expected('{"city":"Rome","people":2800000}'),
    "follow_up": Expected("You said: And now?"),
    "unknown_model": Expected(status=404),
}
"""Steps by name; with `responses_` before it, a step over the Responses API; with `chat_`, by a client's other way."""
_PREFIX: Final = re.compile("responses_|chat_")


def expected(step: str) -> Expected:
    """Return what is to be heard of a step."""
    return EXPECTED[_PREFIX.sub("", step, count=1)]
