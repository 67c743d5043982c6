"""How a client program tells what it heard: `await tell(steps)` runs the steps, and prints a line of JSON for each.

The programs here run in a Python of their own, with nothing installed but the clients and what they need.
"""

import asyncio
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel

BASE_URL: Final = os.environ["OPENAI_BASE_URL"]
API_KEY: Final = os.environ["OPENAI_API_KEY"]
MODEL: Final = os.environ["SERVICES_MODEL"]

GREETING: Final = "Hello there, friend."
QUESTION: Final = "call get_weather and get_time now"
THOUGHT: Final = "think of Rome"
ROME: Final = '{"city": "Rome", "people": 2800000}'
STRUCTURED: Final = f"call answer with {ROME}"
NOBODY: Final = "nobody-of-this-name"

_PATIENCE: Final = 60.0


@dataclasses.dataclass
class Heard:
    """What was made of one step; `calls` are the tools that ran, with their arguments."""

    text: str = ""
    pieces: int = 0
    reasoning: str = ""
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    status: int = 0
    failed: str = ""


Step = Callable[[], Awaitable[Heard]]


class Place(BaseModel):
    """What is asked for as JSON."""

    city: str
    people: int


class Tools:
    """The two tools of the tool loops, which remember how they were called."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def get_weather(self, city: str) -> str:
        """Tell the weather of a city."""
        self.calls.append({"name": "get_weather", "arguments": {"city": city}})
        return f"It is sunny in {city}."

    def get_time(self, city: str) -> str:
        """Tell the time of a city."""
        self.calls.append({"name": "get_time", "arguments": {"city": city}})
        return f"It is noon in {city}."

    def run(self, name: str, arguments: str) -> str:
        """Run a tool by its name, with arguments in JSON."""
        tools = {"get_weather": self.get_weather, "get_time": self.get_time}
        return tools[name](**json.loads(arguments))

    def sorted(self) -> list[dict[str, Any]]:
        """Return the calls in the order in which they were asked for: some clients run them side by side."""
        return sorted(self.calls, key=lambda call: str(call["name"]), reverse=True)


def compact(text: str) -> str:
    """Return JSON as one writes it without spaces."""
    return json.dumps(json.loads(text), separators=(",", ":"))


async def tell(steps: Mapping[str, Step]) -> None:
    """Run the steps one after the other, whatever becomes of the one before."""
    for name, step in steps.items():
        try:
            async with asyncio.timeout(_PATIENCE):
                heard = await step()
        except Exception:  # noqa: BLE001 - it is told as what it is
            heard = Heard(failed=traceback.format_exc())
        sys.stdout.write(json.dumps({"step": name, **dataclasses.asdict(heard)}) + "\n")
        sys.stdout.flush()
