"""AgentEvent -> the events of a platform chat, as bytes ready for the socket.

The events have names: ``start``, ``reasoning``, ``text``, ``tool``, ``usage``, ``done``, ``error``. A delta is split so
that no line is longer than ``sse.MAX_LINE``; ``done`` repeats the whole message in one, bounded by ``MAX_ANSWER``.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from gateway.errors import GatewayError
from gateway.translation import sse
from gateway.translation.agent_events import Batch, ReasoningDelta, TextDelta, Usage
from gateway.translation.chat_stream import MAX_TEXT
from gateway.translation.platform_answer import PlatformAnswer, Told
from gateway.translation.platform_types import Done, Message, Piece, Started, TokenCounts, ToolActivity

_ENCODER: Final = msgspec.json.Encoder()
_encode = _ENCODER.encode


class PlatformStream:
    """The translation of one streamed answer, which ``answer`` gathers; made per request, fed in order.

    ``receive`` takes the events of one network read and returns the bytes of what is told of them; ``finish`` ends a
    stream that ended, ``fail`` one that broke. What ``done`` says is added once the message is kept.
    """

    def __init__(self, started: Started, answer: PlatformAnswer) -> None:
        self._started = started
        self._answer = answer
        self._begun = False
        self.chunks = 0

    @property
    def usage(self) -> Usage | None:
        """Return what the turn took, as far as Letta has told."""
        return self._answer.usage

    @property
    def error(self) -> GatewayError | None:
        """Return the failure that Letta told of."""
        return self._answer.error

    def receive(self, batch: Batch) -> bytes:
        """Return what a batch of events tells: empty where the user is shown nothing of them."""
        out: list[bytes] = []
        for event in batch:
            told = self._answer.take(event)
            if self._answer.error is not None:
                break
            if told is not None:
                self._tell(told, out)
        return b"".join(out)

    def finish(self) -> bytes:
        """Return the end of the stream; raises ``UpstreamTruncated`` unless the agent said that it was done."""
        self._answer.answer()
        out: list[bytes] = []
        self._begin(out)
        out.append(self._event(b"usage", token_counts(self._answer.usage)))
        return b"".join(out)

    def fail(self, error: GatewayError) -> bytes:
        """Return the event of the failure, after which nothing more is sent."""
        return sse.named_event(b"error", error.body())

    def _tell(self, told: Told, out: list[bytes]) -> None:
        self._begin(out)
        match told:
            case TextDelta(text=text):
                out += (self._event(b"text", Piece(piece)) for piece in _pieces(text))
            case ReasoningDelta(text=text):
                out += (self._event(b"reasoning", Piece(piece)) for piece in _pieces(text))
            case ToolActivity():
                out.append(self._event(b"tool", told))

    def _begin(self, out: list[bytes]) -> None:
        if not self._begun:
            self._begun = True
            out.append(self._event(b"start", self._started))

    def _event(self, name: bytes, data: Started | Piece | ToolActivity | TokenCounts) -> bytes:
        self.chunks += 1
        return sse.named_event(name, _encode(data))


def done(message: Message) -> bytes:
    """Return the last event: the message as it is kept."""
    return sse.named_event(b"done", _encode(Done(message)))


def token_counts(usage: Usage | None) -> TokenCounts:
    """Return the counts of a turn; zeros where Letta reported nothing."""
    if usage is None:
        return TokenCounts(0, 0, 0, 0, 0)
    return TokenCounts(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens or 0,
        reasoning_tokens=usage.reasoning_tokens or 0,
    )


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), MAX_TEXT):
        yield text[start : start + MAX_TEXT]
