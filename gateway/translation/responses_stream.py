"""AgentEvent -> the events of a streamed response, as bytes ready for the socket.

What is gathered in ``responses_answer.py`` is written down change by change. The token path: a delta is a template,
made once per item from the typed event itself, with the JSON of the text in its hole and the event's number at its end.

A delta is split so that no line is longer than ``sse.MAX_LINE``. The events that end an item, and the response, repeat
its whole text in one line, as clients read it from there: what bounds them is ``MAX_ANSWER``.
"""

import io
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from gateway.errors import GatewayError, UpstreamTruncated
from gateway.translation import sse
from gateway.translation.agent_events import Batch, ReasoningDelta, TextDelta, Usage
from gateway.translation.agent_turn import Said
from gateway.translation.chat_stream import MAX_TEXT
from gateway.translation.responses_answer import Change, Closed, Gathered, Grew, Opened, ResponseAnswer
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_tables import SERVER_TOOL_ENDS, WIRES
from gateway.translation.responses_types import Echo, OutputText, StreamEvent, SummaryText

MAX_ECHO: Final = 16_384
"""Bytes of the request that each of the three events with the whole response may repeat: the tools and instructions of
coding agents take 100 KB, and nobody reads them there."""

_ENCODER: Final = msgspec.json.Encoder()
_encode = _ENCODER.encode

_HOLE: Final = "\x00"
_HOLE_JSON: Final = _encode(_HOLE)
_END: Final = b"}" + sse.END

Spoken: TypeAlias = type[TextDelta] | type[ReasoningDelta]
_SPOKEN: Final[dict[str, Spoken]] = {"message": TextDelta, "reasoning": ReasoningDelta}


class ResponsesStream:
    """The translation of one streamed answer; made per request, fed in order.

    ``receive`` takes the events of one network read and returns the bytes of all their events; ``finish`` ends a stream
    that ended, ``fail`` one that broke. ``error`` is the failure that Letta told of, once it did. ``answer``,
    ``output_items`` and ``output`` are ``ResponseAnswer``'s.
    """

    def __init__(
        self,
        *,
        response_id: str,
        created: int,
        echo: Echo,
        tool_activity: bool = False,
        namespaced: Mapping[str, FunctionName] | None = None,
    ) -> None:
        self._answer = ResponseAnswer(
            response_id=response_id, created=created, echo=echo, tool_activity=tool_activity, namespaced=namespaced
        )
        self._echo = _short(echo)
        self._begun = False
        self._templates: dict[str, tuple[bytes, bytes]] = {}
        self._spoken: Spoken | None = None
        self._spoken_id = ""
        self._recount = 0
        self._write: Callable[[str], int] = io.StringIO().write
        self._head = self._tail = b""
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
        """Return what a batch of events tells: empty where the client is shown nothing of them."""
        if len(batch) == 1:
            event = batch[0]
            number = self.chunks
            if type(event) is self._spoken and len(text := event.text) <= MAX_TEXT and number < self._recount:
                self._write(text)
                self.chunks = number + 1
                return b"".join((self._head, _encode(text), self._tail, _encode(number), _END))
        out: list[bytes] = []
        for event in batch:
            for change in self._answer.take(event):
                self._tell(change, out)
            if self._answer.error is not None:
                break
        return b"".join(out)

    def finish(self) -> bytes:
        """Return the end of the stream; raises ``UpstreamTruncated`` unless the agent said that it was done."""
        if not self._answer.stopped:
            raise UpstreamTruncated(should_retry=False)
        return self._end()

    def fail(self, error: GatewayError) -> bytes:
        """Return the event of the failure, after which nothing more is sent."""
        self._answer.fail(error)
        return self._end()

    def answer(self) -> bytes:
        """Return the whole answer as JSON, as a request that does not stream gets it."""
        return self._answer.answer()

    def cancelled(self) -> bytes:
        """Return the answer as JSON where it was cancelled on its way."""
        return self._answer.cancelled()

    def failed(self, error: GatewayError) -> bytes:
        """Return the answer as JSON where it failed on its way."""
        return self._answer.failed(error)

    def under_way(self) -> bytes:
        """Return the answer as JSON while it comes."""
        return self._answer.under_way()

    def output_items(self) -> bytes:
        """Return the items of the output as a JSON array."""
        return self._answer.output_items()

    def output(self) -> tuple[Said, ...]:
        """Return what the agent said and called, as a transcript."""
        return self._answer.output()

    # Changes ---------------------------------------------------------------------------------------------------------

    def _tell(self, change: Change, out: list[bytes]) -> None:
        match change:
            case Opened(item=item):
                self._begin(out)
                self._tell_opened(item, out)
            case Grew(item=item, piece=piece):
                self._tell_piece(item, piece, out)
            case Closed(item=item):
                self._tell_closed(item, out)
        self._note_speaking()

    def _note_speaking(self) -> None:
        """Keep at hand what the next delta of the same kind needs."""
        item = self._answer.speaking
        if item is None:
            self._spoken = None
            return
        # Until then deltas cannot fill the room that is left, however long they are.
        self._recount = self.chunks + self._answer.room // MAX_TEXT
        if item.id != self._spoken_id:
            self._spoken_id = item.id
            self._spoken = _SPOKEN[item.kind]
            self._write = item.text.write
            self._head, self._tail = self._templates[item.id]

    def _begin(self, out: list[bytes]) -> None:
        """Tell of the response itself, with the first that there is to tell."""
        if self._begun:
            return
        self._begun = True
        for name in ("response.created", "response.in_progress"):
            response = self._answer.so_far(self._echo, "in_progress")
            self._add(StreamEvent(type=name, response=response, sequence_number=self.chunks), out)

    def _end(self) -> bytes:
        out: list[bytes] = []
        self._begin(out)
        response = self._answer.response(self._echo)
        self._add(StreamEvent(type=f"response.{response.status}", response=response, sequence_number=self.chunks), out)
        return b"".join(out)

    def _tell_opened(self, item: Gathered, out: list[bytes]) -> None:
        wire = WIRES[item.kind]
        self._add(self._item_event("response.output_item.added", item), out)
        if wire.part_added is not None:
            self._add(self._event(wire.part_added, item, part=_part(item, "")), out)
        if wire.begun is not None:
            self._add(self._event(wire.begun, item), out)
        self._templates[item.id] = self._template(wire.delta, item)

    def _tell_piece(self, item: Gathered, piece: str, out: list[bytes]) -> None:
        head, tail = self._templates[item.id]
        for start in range(0, len(piece) or 1, MAX_TEXT):
            out += (head, _encode(piece[start : start + MAX_TEXT]), tail, _encode(self.chunks), _END)
            self.chunks += 1

    def _tell_closed(self, item: Gathered, out: list[bytes]) -> None:
        wire, text = WIRES[item.kind], item.text.getvalue()
        part = _part(item, text)
        if item.kind == "custom_tool_call":
            self._add(msgspec.structs.replace(self._event(wire.done, item), input=text), out)
        elif part is UNSET:
            self._add(self._event(wire.done, item, arguments=text), out)
        else:
            self._add(self._event(wire.done, item, text=text), out)
        if wire.part_done is not None:
            self._add(self._event(wire.part_done, item, part=part), out)
        if item.kind == "mcp_call" and item.status in SERVER_TOOL_ENDS:
            self._add(self._event(SERVER_TOOL_ENDS[item.status], item), out)
        self._add(self._item_event("response.output_item.done", item), out)
        del self._templates[item.id]

    # Events ----------------------------------------------------------------------------------------------------------

    def _template(self, name: str, item: Gathered) -> tuple[bytes, bytes]:
        """Return what stands before and behind the text of a delta, up to the event's number."""
        event = _frame(self._event(name, item, delta=_HOLE))
        head, tail = event.split(_HOLE_JSON)
        return head, tail[: tail.rindex(b":") + 1]

    def _item_event(self, name: str, item: Gathered) -> StreamEvent:
        shown = self._answer.shown(item)
        return StreamEvent(type=name, output_index=item.index, item=shown, sequence_number=self.chunks)

    def _event(
        self,
        name: str,
        item: Gathered,
        *,
        part: OutputText | SummaryText | UnsetType = UNSET,
        text: str | UnsetType = UNSET,
        arguments: str | UnsetType = UNSET,
        delta: str | UnsetType = UNSET,
    ) -> StreamEvent:
        is_text = item.kind == "message" and (delta is not UNSET or text is not UNSET)
        return StreamEvent(
            type=name,
            item_id=item.id,
            output_index=item.index,
            content_index=0 if item.kind == "message" else UNSET,
            summary_index=0 if item.kind == "reasoning" else UNSET,
            part=part,
            logprobs=() if is_text else UNSET,
            text=text,
            arguments=arguments,
            delta=delta,
            sequence_number=self.chunks,
        )

    def _add(self, event: StreamEvent, out: list[bytes]) -> None:
        out.append(_frame(event))
        self.chunks += 1


def _frame(event: StreamEvent) -> bytes:
    """Frame an event with its name, which SDKs of other languages tell events apart by."""
    return b"event: " + event.type.encode() + b"\n" + sse.event(_encode(event))


def _part(item: Gathered, text: str) -> OutputText | SummaryText | UnsetType:
    match item.kind:
        case "message":
            return OutputText(text)
        case "reasoning":
            return SummaryText(text)
        case _:
            return UNSET


def _short(echo: Echo) -> Echo:
    """Return an echo that fits into a line many times over: where it does not, what may be long is left out of it."""
    if len(_encode(echo)) <= MAX_ECHO:
        return echo
    return Echo(
        model=echo.model,
        tool_choice=echo.tool_choice if isinstance(echo.tool_choice, str) else "auto",
        parallel_tool_calls=echo.parallel_tool_calls,
        previous_response_id=echo.previous_response_id,
        conversation=echo.conversation,
        store=echo.store,
        max_output_tokens=echo.max_output_tokens,
        max_tool_calls=echo.max_tool_calls,
        temperature=echo.temperature,
        top_p=echo.top_p,
        truncation=echo.truncation,
    )
