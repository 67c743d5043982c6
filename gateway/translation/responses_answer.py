"""AgentEvent -> the items of a response, gathered: what the stream tells piece by piece, and the whole answer.

Both forms of the answer come from here: the stream (``responses_stream.py``) writes down each change, the answer that
does not stream is what has been gathered at the end.
"""

import io
import re
from collections.abc import Iterator, Mapping
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
    StopReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.agent_turn import AgentSaid, Call, Said
from gateway.translation.completion import MAX_ANSWER
from gateway.translation.responses_items import merged
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_tables import (
    INCOMPLETE_REASONS,
    TOOL_FAILURE,
    WIRES,
    ItemKind,
    error_code,
    response_usage,
)
from gateway.translation.responses_types import (
    Echo,
    IncompleteDetails,
    ItemStatus,
    OutputCustomCall,
    OutputFunctionCall,
    OutputItem,
    OutputMcpCall,
    OutputMessage,
    OutputReasoning,
    OutputText,
    Response,
    ResponseError,
    ResponseStatus,
    SummaryText,
)

MAX_ITEMS: Final = 1_000


class _Input(msgspec.Struct):
    input: str


_INPUT: Final = msgspec.json.Decoder(_Input)
_ENCODER: Final = msgspec.json.Encoder()
_ID: Final = re.compile(rf"(?:{'|'.join(wire.prefix for wire in WIRES.values())})_(.+)_\d+")


def item_id(kind: ItemKind, response_id: str, index: int) -> str:
    """Return the id of an item: it holds the response's, so that nobody has to keep a list of items."""
    return f"{WIRES[kind].prefix}_{response_id.removeprefix('resp_')}_{index}"


def response_of(item_id: str) -> str | None:
    """Return the id of the response that an item belongs to, by the item's; None for an id of somebody else's."""
    found = _ID.fullmatch(item_id)
    return None if found is None else f"resp_{found[1]}"


class Gathered(msgspec.Struct):
    """One item of the output as it grows: ``text`` is what is said, thought, or handed over as arguments."""

    kind: ItemKind
    id: str
    index: int
    text: io.StringIO
    call_id: str = ""
    name: str = ""
    status: ItemStatus = "in_progress"


class Opened(msgspec.Struct, frozen=True):
    """An item began."""

    item: Gathered


class Grew(msgspec.Struct, frozen=True):
    """An item grew by a piece."""

    item: Gathered
    piece: str


class Closed(msgspec.Struct, frozen=True):
    """An item is as it stays."""

    item: Gathered


Change: TypeAlias = Opened | Grew | Closed


class ResponseAnswer:
    """One answer being gathered; made per request, fed in order.

    ``error`` is the failure that ended it, once there is one. ``tool_activity`` says whether the calls of the agent's
    own tools are items; ``namespaced`` what the client calls those functions whose names were made for the agent.
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
        self._id = response_id
        self._created = created
        self._echo = echo
        self._tool_activity = tool_activity
        self._namespaced = namespaced or {}
        self._items: list[Gathered] = []
        self._speaking: Gathered | None = None
        self._calls: dict[str, Gathered] = {}
        self._server_calls: dict[str, Gathered] = {}
        self._stop: StopReason | None = None
        self._room = MAX_ANSWER
        self.usage: Usage | None = None
        self.error: GatewayError | None = None

    @property
    def speaking(self) -> Gathered | None:
        """Return the message or reasoning that is open."""
        return self._speaking

    @property
    def room(self) -> int:
        """Return how many characters more the answer takes."""
        # What is being said is counted when it is over: the stream writes to it past this class.
        return self._room if self._speaking is None else self._room - self._speaking.text.tell()

    @property
    def stopped(self) -> bool:
        """Tell whether the agent said that it was done."""
        return self._stop is not None

    def receive(self, batch: Batch) -> bool:
        """Take the events of one network read, always ready for more; raises the error of a turn that failed."""
        for event in batch:
            for _ in self.take(event):
                pass
            if self.error is not None:
                raise self.error
        return True

    def take(self, event: AgentEvent) -> Iterator[Change]:
        """Take one event and yield what changes with it; a failure changes ``error`` alone."""
        match event:
            case TextDelta(text=text):
                yield from self._say("message", text)
            case ReasoningDelta(text=text):
                yield from self._say("reasoning", text)
            case ToolCallDelta(name=name):
                yield from self._call(self._kind_of(name), self._calls, event)
            case ServerToolCall() if self._tool_activity:
                yield from self._call("mcp_call", self._server_calls, event)
            case ServerToolReturn(call_id=call_id, succeeded=succeeded):
                returned = self._server_calls.pop(call_id, None)
                if returned is not None:
                    yield self._close(returned, "completed" if succeeded else "failed")
            case Usage():
                self.usage = event if self.usage is None else self.usage.plus(event)
            case Stop(reason=reason):
                self._stop = reason
                yield from self._close_all()
            case Failure(error=error):
                self.error = error
            case _:
                return

    def fail(self, error: GatewayError) -> None:
        """End the answer: what was gathered stays, incomplete."""
        self.error = error

    def answer(self) -> bytes:
        """Return the answer as JSON; raises ``UpstreamTruncated`` unless the agent was done or the turn failed."""
        return _ENCODER.encode(self.response(self._echo))

    def cancelled(self) -> bytes:
        """Return the answer as JSON where it was cancelled on its way: what was gathered, incomplete."""
        self._break_off()
        return _ENCODER.encode(self.so_far(self._echo, "cancelled"))

    def failed(self, error: GatewayError) -> bytes:
        """Return the answer as JSON where it failed on its way: what was gathered, incomplete, and why."""
        self._break_off()
        return _ENCODER.encode(self.so_far(self._echo, "failed", ResponseError(error_code(error), error.message)))

    def under_way(self) -> bytes:
        """Return the answer as JSON while it comes."""
        return _ENCODER.encode(self.so_far(self._echo, "in_progress"))

    def _break_off(self) -> None:
        for item in [item for item in self._items if item.status == "in_progress"]:
            self._close(item, "incomplete")

    def response(self, echo: Echo) -> Response:
        """Return the answer at its end, with this echo of the request."""
        if self.error is not None:
            return self.so_far(echo, "failed", ResponseError(error_code(self.error), self.error.message))
        if self._stop is None:
            raise UpstreamTruncated(should_retry=False)
        reason = INCOMPLETE_REASONS[self._stop]
        if reason is None:
            return self.so_far(echo, "completed")
        return self.so_far(echo, "incomplete", details=IncompleteDetails(reason))

    def so_far(
        self,
        echo: Echo,
        status: ResponseStatus,
        error: ResponseError | None = None,
        details: IncompleteDetails | None = None,
    ) -> Response:
        """Return the answer as far as it has come."""
        is_running = status == "in_progress"
        return Response(
            **msgspec.structs.asdict(echo),
            id=self._id,
            created_at=self._created,
            status=status,
            output=() if is_running else tuple(self.shown(item) for item in self._items),
            error=error,
            incomplete_details=details,
            usage=None if is_running else response_usage(self.usage),
        )

    def output_items(self) -> bytes:
        """Return the items as a JSON array, as they are stored."""
        return _ENCODER.encode([self.shown(item) for item in self._items])

    def output(self) -> tuple[Said, ...]:
        """Return what the agent said and called, as a transcript: what the client sends back reads as the same."""
        return merged(said for item in self._items if (said := _as_said(item)) is not None)

    def shown(self, item: Gathered) -> OutputItem:
        """Return an item as the API has it."""
        text, status = item.text.getvalue(), item.status
        if status == "in_progress" and self.error is not None:
            status = "incomplete"
        is_begun = status == "in_progress"
        match item.kind:
            case "message":
                return OutputMessage(item.id, status, () if is_begun else (OutputText(text),))
            case "reasoning":
                return OutputReasoning(item.id, status, () if is_begun else (SummaryText(text),))
            case "function_call":
                name = self._namespaced.get(item.name)
                if name is None:
                    return OutputFunctionCall(item.id, item.call_id, item.name, text, status)
                return OutputFunctionCall(item.id, item.call_id, name.name, text, status, name.namespace)
            case "custom_tool_call":
                return OutputCustomCall(item.id, item.call_id, item.name, text, status)
            case "mcp_call":
                return OutputMcpCall(item.id, item.name, text, status, TOOL_FAILURE if status == "failed" else None)

    # Changes ---------------------------------------------------------------------------------------------------------

    def _say(self, kind: ItemKind, text: str) -> Iterator[Change]:
        item = self._speaking
        if item is None or item.kind != kind:
            if not text:
                return
            yield from self._be_silent()
            item = self._open(kind)
            if item is None:
                return
            self._speaking = item
            yield Opened(item)
        yield from self._grow(item, text)

    def _call(
        self, kind: ItemKind, calls: dict[str, Gathered], event: ToolCallDelta | ServerToolCall
    ) -> Iterator[Change]:
        item = calls.get(event.call_id)
        if item is None:
            yield from self._be_silent()
            item = self._open(kind)
            if item is None:
                return
            calls[event.call_id] = item
            item.call_id, item.name = event.call_id, event.name or ""
            yield Opened(item)
        elif event.name and not item.name:
            item.name = event.name
        if event.arguments:
            grown = self._grow(item, event.arguments)
            # The input of a custom tool is inside what comes as JSON: it is told when that is whole.
            yield from (change for change in grown if item.kind != "custom_tool_call")

    def _kind_of(self, name: str | None) -> ItemKind:
        meant = self._namespaced.get(name or "")
        return "custom_tool_call" if meant is not None and meant.is_custom else "function_call"

    def _grow(self, item: Gathered, piece: str) -> Iterator[Change]:
        if len(piece) > self.room:
            self.error = _too_long()
            return
        item.text.write(piece)
        if item is not self._speaking:
            self._room -= len(piece)
        yield Grew(item, piece)

    def _open(self, kind: ItemKind) -> Gathered | None:
        index = len(self._items)
        if index >= MAX_ITEMS:
            self.error = _too_long()
            return None
        item = Gathered(kind, item_id(kind, self._id, index), index, io.StringIO())
        self._items.append(item)
        return item

    def _be_silent(self) -> Iterator[Change]:
        """End the text or the reasoning: something else begins."""
        if self._speaking is not None:
            item, self._speaking = self._speaking, None
            self._room -= item.text.tell()
            yield self._close(item, "completed")

    def _close_all(self) -> Iterator[Change]:
        """End what is open: calls stay so until the end, as their pieces may come by turns."""
        is_whole = self._stop is not None and INCOMPLETE_REASONS[self._stop] is None
        self._speaking = None
        for item in self._items:
            if item.status == "in_progress":
                if item.kind == "custom_tool_call":
                    given = _input_of(item.text.getvalue())
                    item.text = io.StringIO()
                    item.text.write(given)
                    yield Grew(item, given)
                # A call of the agent's own that never returned is not complete, however the turn ended.
                yield self._close(item, "completed" if is_whole and item.kind != "mcp_call" else "incomplete")
        self._calls.clear()
        self._server_calls.clear()

    def _close(self, item: Gathered, status: ItemStatus) -> Closed:
        item.status = status
        return Closed(item)


def _as_said(item: Gathered) -> Said | None:
    text = item.text.getvalue()
    if item.kind == "message":
        return AgentSaid(text)
    if item.kind in ("function_call", "custom_tool_call"):
        return AgentSaid("", (Call(item.call_id, item.name, text),))
    return None


def _input_of(arguments: str) -> str:
    """Return the text that a custom tool is called with; what the agent wrote, where it is not as it was told."""
    try:
        return _INPUT.decode(arguments).input
    except msgspec.DecodeError:
        return arguments


def _too_long() -> UpstreamInvalid:
    return UpstreamInvalid(
        f"The agent's answer is longer than {MAX_ANSWER} characters, and a response repeats the whole of it. Ask for "
        "it by POST /v1/chat/completions with 'stream': true.",
        code="upstream_answer_too_long",
        should_retry=False,
    )
