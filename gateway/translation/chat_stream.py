"""AgentEvent -> Chat Completions chunks, as bytes ready for the socket.

The token path: a chunk is one of two templates, made once per stream from the typed chunk itself, with the JSON of
the text put into its hole. Everything rarer goes through the types.
"""

from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from gateway.errors import GatewayError, UpstreamTruncated
from gateway.translation import sse
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.openai_types import (
    ChatCompletionChunk,
    ChunkChoice,
    CompletionUsage,
    Delta,
    FinishReason,
    FunctionFragment,
    ToolCallFragment,
)
from gateway.translation.tables import completion_usage, finish_reason

_ENCODER: Final = msgspec.json.Encoder()
_encode = _ENCODER.encode

MAX_TEXT: Final = 5_000
"""Characters in one delta: twice (both names of reasoning) times six bytes (an escape) stays below ``sse.MAX_LINE``."""

_HOLE: Final = "\x00"
_HOLE_JSON: Final = _encode(_HOLE)


class ChatStream:
    """The translation of one streamed answer; made per request, fed in order.

    ``receive`` takes the events of one network read and returns the bytes of all their chunks; ``finish`` ends a
    stream that ended, ``fail`` one that broke. ``is_legacy`` writes calls as OpenAI's functions. ``error`` is the
    failure that Letta told of, once it did.
    """

    def __init__(
        self, *, completion_id: str, created: int, model: str, include_usage: bool, is_legacy: bool = False
    ) -> None:
        self._id = completion_id
        self._created = created
        self._model = model
        self._no_usage: UnsetType | None = None if include_usage else UNSET
        self._include_usage = include_usage
        self._is_legacy = is_legacy
        self._indexes: dict[str, int] = {}
        self._finished = False
        self._begun = False
        self.usage: Usage | None = None
        self.error: GatewayError | None = None
        self.chunks = 0
        text = self._chunk(Delta(content=_HOLE))
        self._text_head, self._text_tail = text.split(_HOLE_JSON)
        reasoning = self._chunk(Delta(reasoning_content=_HOLE, reasoning=_HOLE))
        self._reasoning_head, self._reasoning_middle, self._reasoning_tail = reasoning.split(_HOLE_JSON)

    def receive(self, batch: Batch) -> bytes:
        """Return the chunks of a batch of events: empty where the client is shown nothing of them."""
        if len(batch) == 1 and self._begun:
            event = batch[0]
            if type(event) is TextDelta and len(event.text) <= MAX_TEXT:
                self.chunks += 1
                return self._text_head + _encode(event.text) + self._text_tail
        out: list[bytes] = []
        for event in batch:
            if type(event) is TextDelta and self._begun and len(event.text) <= MAX_TEXT:
                out += (self._text_head, _encode(event.text), self._text_tail)
                self.chunks += 1
            else:
                self._receive_rare(event, out)
                if self.error is not None:
                    break
        return b"".join(out)

    def finish(self) -> bytes:
        """Return the end of the stream; raises ``UpstreamTruncated`` unless the agent said that it was done."""
        if not self._finished:
            raise UpstreamTruncated(should_retry=False)
        if not self._include_usage:
            return sse.DONE
        return self._usage_chunk() + sse.DONE

    def fail(self, error: GatewayError) -> bytes:
        """Return the in-band error after which nothing more is sent."""
        return sse.event(error.body())

    def _receive_rare(self, event: AgentEvent, out: list[bytes]) -> None:
        match event:
            case TextDelta(text=text):
                self._add_pieces([Delta(content=piece) for piece in _pieces(text)], out)
            case ReasoningDelta(text=text):
                self._add_reasoning(text, out)
            case ToolCallDelta():
                self._add_pieces(self._tool_call(event), out)
            case Usage():
                self.usage = event if self.usage is None else self.usage.plus(event)
            case Stop(reason=reason):
                self._finished = True
                self._add(self._delta(Delta()), finish_reason(reason, is_legacy=self._is_legacy), out)
            case Failure(error=error):
                self.error = error
            case _:
                return

    def _add_reasoning(self, text: str, out: list[bytes]) -> None:
        if not self._begun or len(text) > MAX_TEXT:
            self._add_pieces([Delta(reasoning_content=piece, reasoning=piece) for piece in _pieces(text)], out)
            return
        encoded = _encode(text)
        out += (self._reasoning_head, encoded, self._reasoning_middle, encoded, self._reasoning_tail)
        self.chunks += 1

    def _tool_call(self, event: ToolCallDelta) -> list[Delta]:
        known = event.call_id in self._indexes
        index = self._indexes.setdefault(event.call_id, len(self._indexes))
        first, *more = _pieces(event.arguments)
        if known:
            fragments = [ToolCallFragment(index, function=FunctionFragment(arguments=first))]
        else:
            begun = FunctionFragment(name=event.name or "", arguments=first)
            fragments = [ToolCallFragment(index, event.call_id, begun, "function")]
        fragments += [ToolCallFragment(index, function=FunctionFragment(arguments=piece)) for piece in more]
        if self._is_legacy:
            return [Delta(function_call=fragment.function) for fragment in fragments]
        return [Delta(tool_calls=[fragment]) for fragment in fragments]

    def _add_pieces(self, deltas: list[Delta], out: list[bytes]) -> None:
        for delta in deltas:
            self._add(self._delta(delta), None, out)

    def _delta(self, delta: Delta) -> Delta:
        if self._begun:
            return delta
        self._begun = True
        return msgspec.structs.replace(delta, role="assistant")

    def _add(self, delta: Delta, finish: FinishReason | None, out: list[bytes]) -> None:
        out.append(self._chunk(delta, finish))
        self.chunks += 1

    def _chunk(self, delta: Delta, finish: FinishReason | None = None) -> bytes:
        return self._encode([ChunkChoice(0, delta, None, finish)], self._no_usage)

    def _usage_chunk(self) -> bytes:
        return self._encode([], completion_usage(self.usage))

    def _encode(self, choices: list[ChunkChoice], usage: CompletionUsage | UnsetType | None) -> bytes:
        chunk = ChatCompletionChunk(self._id, "chat.completion.chunk", self._created, self._model, choices, usage)
        return sse.event(_encode(chunk))


def _pieces(text: str) -> list[str]:
    if len(text) <= MAX_TEXT:
        return [text]
    return [text[start : start + MAX_TEXT] for start in range(0, len(text), MAX_TEXT)]
