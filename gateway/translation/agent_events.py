"""What an agent can say, as a closed union of frozen values: the one vocabulary between Letta and OpenAI.

Both transports decode into these (``letta/frames.py``); every translator reads only these.
"""

from typing import Literal, TypeAlias

import msgspec

from gateway.errors import GatewayError

StopReason: TypeAlias = Literal[
    "end_turn",
    "tool_rule",
    "no_tool_call",
    "max_steps",
    "max_tokens_exceeded",
    "requires_approval",
    "refusal",
]
"""The ways in which a turn ends well; the ways in which it fails arrive as a ``Failure``."""


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """A fragment of what the agent says to the user."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """A fragment of what the agent thinks."""

    text: str


class ToolCallDelta(msgspec.Struct, frozen=True, gc=False):
    """A fragment of a call that the client is to execute: the name comes once, the arguments in pieces."""

    call_id: str
    name: str | None
    arguments: str


class ServerToolCall(msgspec.Struct, frozen=True, gc=False):
    """A fragment of a call that runs on Letta: information, never something for the client to execute."""

    call_id: str
    name: str | None
    arguments: str


class ServerToolReturn(msgspec.Struct, frozen=True, gc=False):
    """What a tool that ran on Letta gave back."""

    call_id: str
    name: str | None
    succeeded: bool


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts of a turn or of one of its steps (add them up); None where Letta does not report a figure."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum of two steps."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            _sum(self.cached_tokens, other.cached_tokens),
            _sum(self.reasoning_tokens, other.reasoning_tokens),
        )


class Stop(msgspec.Struct, frozen=True, gc=False):
    """The turn ended well."""

    reason: StopReason


class Failure(msgspec.Struct, frozen=True):
    """The turn failed: the error is safe to show."""

    error: GatewayError


AgentEvent: TypeAlias = (
    TextDelta | ReasoningDelta | ToolCallDelta | ServerToolCall | ServerToolReturn | Usage | Stop | Failure
)
Batch: TypeAlias = list[AgentEvent]
"""The events of one network read, in order."""


def _sum(left: int | None, right: int | None) -> int | None:
    if left is None:
        return right
    return left if right is None else left + right
