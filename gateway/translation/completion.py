"""AgentEvent -> the whole Chat Completions answer: the same events as the stream's, folded."""

import io
from typing import Final

import msgspec
from msgspec import UNSET

from gateway.errors import UpstreamInvalid, UpstreamTruncated
from gateway.translation.agent_events import (
    Batch,
    Failure,
    ReasoningDelta,
    Stop,
    StopReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.openai_types import AnswerMessage, ChatCompletion, Choice, FunctionCall, ToolCall
from gateway.translation.tables import completion_usage, finish_reason

_ENCODER: Final = msgspec.json.Encoder()

MAX_ANSWER: Final = 2_097_152
"""Characters of an answer that is gathered, half a million tokens: a runaway agent must not fill the memory."""
MAX_CALLS: Final = 1_000


class CallParts(msgspec.Struct):
    """A tool call as its fragments arrive."""

    name: str
    arguments: io.StringIO


class Completion:
    """One answer being gathered; made per request, fed in order."""

    def __init__(self, *, completion_id: str, created: int, model: str, is_legacy: bool = False) -> None:
        self._id = completion_id
        self._created = created
        self._model = model
        self._is_legacy = is_legacy
        # Not lists: a list of the tokens is ten times the size of the text.
        self._text = io.StringIO()
        self._reasoning = io.StringIO()
        self._room = MAX_ANSWER
        self._calls: dict[str, CallParts] = {}
        self._stop: StopReason | None = None
        self.usage: Usage | None = None

    def receive(self, batch: Batch) -> bool:
        """Take the events of one network read, always ready for more; raises the error of a turn that failed."""
        for event in batch:
            match event:
                case TextDelta(text=text):
                    self._add(text, self._text)
                case ReasoningDelta(text=text):
                    self._add(text, self._reasoning)
                case ToolCallDelta(call_id=call_id, name=name, arguments=arguments):
                    self._add(arguments, self._call(call_id, name).arguments)
                case Usage():
                    self.usage = event if self.usage is None else self.usage.plus(event)
                case Stop(reason=reason):
                    self._stop = reason
                case Failure(error=error):
                    raise error
                case _:
                    continue
        return True

    def answer(self) -> bytes:
        """Return the answer as JSON; raises ``UpstreamTruncated`` unless the agent said that it was done."""
        if self._stop is None:
            raise UpstreamTruncated(should_retry=False)
        choice = Choice(0, self._message(), None, finish_reason(self._stop, is_legacy=self._is_legacy))
        return _ENCODER.encode(
            ChatCompletion(
                self._id, "chat.completion", self._created, self._model, [choice], completion_usage(self.usage)
            )
        )

    def _add(self, text: str, to: io.StringIO) -> None:
        self._room -= len(text)
        if self._room < 0:
            raise _too_long()
        to.write(text)

    def _call(self, call_id: str, name: str | None) -> CallParts:
        call = self._calls.get(call_id)
        if call is None:
            if len(self._calls) >= MAX_CALLS:
                raise _too_long()
            call = self._calls[call_id] = CallParts(name or "", io.StringIO())
        return call

    def _message(self) -> AnswerMessage:
        text, reasoning = self._text.getvalue(), self._reasoning.getvalue()
        calls = [
            ToolCall(call_id, "function", FunctionCall(parts.name, parts.arguments.getvalue()))
            for call_id, parts in self._calls.items()
        ]
        return AnswerMessage(
            role="assistant",
            content=text if text or not calls else None,
            reasoning_content=reasoning or UNSET,
            reasoning=reasoning or UNSET,
            tool_calls=calls if calls and not self._is_legacy else UNSET,
            function_call=calls[0].function if calls and self._is_legacy else UNSET,
        )


def _too_long() -> UpstreamInvalid:
    return UpstreamInvalid(
        f"The agent's answer is longer than {MAX_ANSWER} characters. Ask for it with 'stream': true.",
        code="upstream_answer_too_long",
        should_retry=False,
    )
