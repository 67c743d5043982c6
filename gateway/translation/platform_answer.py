"""AgentEvent -> what the agent has said so far, as the platform tells it and keeps it."""

import io
from typing import Final, TypeAlias

import msgspec

from gateway.errors import GatewayError, UpstreamInvalid, UpstreamTruncated
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    Usage,
)
from gateway.translation.completion import MAX_ANSWER, MAX_CALLS
from gateway.translation.content import replaced
from gateway.translation.platform_types import ToolActivity, ToolStatus

MAX_NAME: Final = 200
"""Characters of a call's id and of a tool's name."""
NAMELESS: Final = "tool"
"""What a tool is called whose name Letta did not tell."""

Told: TypeAlias = TextDelta | ReasoningDelta | ToolActivity
"""What a user is told as it comes; texts are as they are kept."""


class Said(msgspec.Struct, frozen=True):
    """What the agent said."""

    text: str
    reasoning: str
    activity: tuple[ToolActivity, ...]


class PlatformAnswer:
    """One answer being gathered; made per request, fed in order.

    ``error`` is the failure that Letta told of, once it did, or that the answer is too long.
    """

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._reasoning = io.StringIO()
        self._room = MAX_ANSWER
        self._calls: dict[str, ToolActivity] = {}
        self._is_done = False
        self.usage: Usage | None = None
        self.error: GatewayError | None = None

    def receive(self, batch: Batch) -> bool:
        """Take the events of one network read, always ready for more; raises the error of a turn that failed."""
        for event in batch:
            self.take(event)
            if self.error is not None:
                raise self.error
        return True

    def take(self, event: AgentEvent) -> Told | None:
        """Take one event, and return what is to be told of it; what goes wrong changes ``error`` alone."""
        match event:
            case TextDelta(text=text):
                text = self._add(text, self._text)
                return TextDelta(text) if text else None
            case ReasoningDelta(text=text):
                text = self._add(text, self._reasoning)
                return ReasoningDelta(text) if text else None
            case ServerToolCall():
                return self._called(event)
            case ServerToolReturn():
                return self._returned(event)
            case Usage():
                self.usage = event if self.usage is None else self.usage.plus(event)
            case Stop():
                self._is_done = True
            case Failure(error=error):
                self.error = error
            case _:
                return None
        return None

    def answer(self) -> bytes:
        """Return nothing: the answer is told as it is kept. Raises ``UpstreamTruncated`` unless the agent was done."""
        if not self._is_done:
            raise UpstreamTruncated(should_retry=False)
        return b""

    def said(self) -> Said:
        """Return what was said so far; a call whose end was not told went as the answer did."""
        end: ToolStatus = "done" if self._is_done else "failed"
        activity = (
            ToolActivity(call.id, call.name or NAMELESS, end if call.status == "running" else call.status)
            for call in self._calls.values()
        )
        return Said(self._text.getvalue(), self._reasoning.getvalue(), tuple(activity))

    def _add(self, text: str, to: io.StringIO) -> str:
        text = replaced(text)
        if len(text) > self._room:
            self.error = _too_long()
            return ""
        self._room -= len(text)
        to.write(text)
        return text

    def _called(self, event: ServerToolCall) -> ToolActivity | None:
        call_id, name = _short(event.call_id), _short(event.name or "")
        known = self._calls.get(call_id)
        if known is not None and (known.name or not name):
            return None
        if known is None and len(self._calls) >= MAX_CALLS:
            self.error = _too_long()
            return None
        call = self._calls[call_id] = ToolActivity(call_id, name, "running" if known is None else known.status)
        return call if name else None

    def _returned(self, event: ServerToolReturn) -> ToolActivity | None:
        call_id = _short(event.call_id)
        known = self._calls.get(call_id)
        if known is None and len(self._calls) >= MAX_CALLS:
            self.error = _too_long()
            return None
        if known is not None and known.status != "running":
            return None
        name = (known.name if known is not None else "") or _short(event.name or NAMELESS)
        call = self._calls[call_id] = ToolActivity(call_id, name, "done" if event.succeeded else "failed")
        return call


def _short(text: str) -> str:
    return replaced(text[:MAX_NAME])


def _too_long() -> UpstreamInvalid:
    return UpstreamInvalid(
        f"The agent's answer is longer than {MAX_ANSWER} characters, and was ended there. Ask for less at a time.",
        code="upstream_answer_too_long",
        should_retry=False,
    )
