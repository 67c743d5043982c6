"""Letta's message vocabulary -> AgentEvent: the one decoder for both transports.

The frames are as recorded from letta 0.16.8 (V1) and described in its ``letta_streaming_response``; only the fields
that are used are declared, so that decoding a token costs one small struct. Unknown kinds of frames are skipped and
counted; a known kind that does not fit is the upstream's fault.
"""

import json
from collections.abc import Collection
from typing import Final, Protocol, get_args

import msgspec
from msgspec import Struct

from gateway.errors import GatewayError, UpstreamInvalid
from gateway.letta import failures
from gateway.letta.event_stream import EventStream
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

# Frames --------------------------------------------------------------------------------------------------------------


class Frame(Struct, tag_field="message_type", gc=False):
    """What all frames may carry; ``seq_id`` numbers the frames of a run and may come twice after a reconnect."""

    seq_id: int | None = None


class ContentPart(Struct):
    """A part of a message whose content is a list: only text parts carry ``text``."""

    text: str = ""


class AssistantMessage(Frame, tag="assistant_message"):
    """What the agent says: a string on REST, a list of parts on the App Server."""

    content: str | list[ContentPart] | None = None
    id: str | None = None


class ReasoningMessage(Frame, tag="reasoning_message"):
    """What the agent thinks."""

    reasoning: str | None = None
    id: str | None = None


class ToolCallBody(Struct):
    """A call or a fragment of one: ``name`` comes once, either may be null or absent."""

    tool_call_id: str
    name: str | None = None
    arguments: str | None = None


class ToolCallMessage(Frame, tag="tool_call_message"):
    """A call that runs on Letta. ``tool_calls`` is an object in deltas and a list in whole messages."""

    tool_call: ToolCallBody | None = None
    tool_calls: ToolCallBody | list[ToolCallBody] | None = None


class ApprovalRequestMessage(Frame, tag="approval_request_message"):
    """A call that waits for the client."""

    tool_call: ToolCallBody | None = None
    tool_calls: ToolCallBody | list[ToolCallBody] | None = None


class ToolReturnMessage(Frame, tag="tool_return_message", kw_only=True):
    """What a tool on Letta gave back."""

    tool_call_id: str
    name: str | None = None
    status: str | None = None


class StopReasonFrame(Frame, tag="stop_reason", kw_only=True):
    """Why the turn ended."""

    stop_reason: str


class UsageStatistics(Frame, tag="usage_statistics"):
    """Token counts; the App Server's ``prompt_tokens`` leave out what came from a cache, its total does not."""

    prompt_tokens: int | None = None
    total_tokens: int | None = None
    completion_tokens: int | None = None
    cached_input_tokens: int | None = None
    reasoning_tokens: int | None = None


class ErrorMessage(Frame, tag="error_message"):
    """The run failed; its texts are Letta's own and are not shown."""

    error_type: str | None = None
    message: str | None = None
    detail: str | None = None


class LoopError(Frame, tag="loop_error"):
    """A step failed on the App Server, which may try it again."""

    message: str | None = None


class Ping(Frame, tag="ping"):
    """A sign of life."""


class HiddenReasoningMessage(Frame, tag="hidden_reasoning_message"):
    """The agent thinks, and its provider does not show what."""


class ApprovalResponseMessage(Frame, tag="approval_response_message"):
    """An answer to a waiting call, echoed."""


class UserMessage(Frame, tag="user_message"):
    """The user's message, echoed."""


class SystemMessage(Frame, tag="system_message"):
    """A system message, echoed."""


class EventMessage(Frame, tag="event_message"):
    """Something that happened on the server, such as a compaction."""


class SummaryMessage(Frame, tag="summary_message"):
    """The summary that a compaction left."""


AnyFrame = (
    AssistantMessage
    | ReasoningMessage
    | ToolCallMessage
    | ApprovalRequestMessage
    | ToolReturnMessage
    | StopReasonFrame
    | UsageStatistics
    | ErrorMessage
    | LoopError
    | Ping
    | HiddenReasoningMessage
    | ApprovalResponseMessage
    | UserMessage
    | SystemMessage
    | EventMessage
    | SummaryMessage
)


class Envelope(Struct):
    """Of any frame: its kind and its run."""

    message_type: str | None = None
    run_id: str | None = None


DONE: Final = b"[DONE]"
_KINDS: Final = frozenset(str(kind.__struct_config__.tag) for kind in get_args(AnyFrame))
_LIFECYCLE: Final = frozenset(
    {
        "approval_classification_end",
        "client_tool_start",
        "client_tool_end",
        "command_start",
        "command_end",
        "slash_command_start",
        "slash_command_end",
        "status",
        "retry",
    }
)
"""What the App Server tells its own terminals of a turn's progress."""
_decode: Final = msgspec.json.Decoder(AnyFrame).decode
_decode_envelope: Final = msgspec.json.Decoder(Envelope).decode

# Decoding ------------------------------------------------------------------------------------------------------------


class Calls(Protocol):
    """Tells whose calls the agent's are, and by which names."""

    def called(self, call: ToolCallBody, *, waits: bool) -> AgentEvent | None:
        """Return the event of a fragment of a call, which runs on Letta unless it ``waits``; None to hold it back."""
        ...

    def stopped(self, reason: StopReason) -> Batch:
        """Return the events of a good end."""
        ...


class AllCalls:
    """Takes every call that waits for one of the client's: for turns that know nothing of tools."""

    def called(self, call: ToolCallBody, *, waits: bool) -> AgentEvent | None:
        """Return the event of a fragment."""
        event = ToolCallDelta if waits else ServerToolCall
        return event(call.tool_call_id, call.name, call.arguments or "")

    def stopped(self, reason: StopReason) -> Batch:
        """Return the end."""
        return [Stop(reason)]


class FrameDecoder:
    """The decoder of one turn: frames in, events out.

    ``run_id`` is the run's id as soon as a frame has named it; ``unknown`` counts the frames of kinds that nobody
    knows. ``by_step`` is the App Server's way: each step of a turn is a run, with numbers, failures and a stop reason
    of its own, none of which ends the turn; ``trouble`` is what was said of the last failure. ``used`` is what was told
    so far of what the turn took. Returns of calls that were ``answered`` are no news.
    """

    def __init__(self, *, by_step: bool = False, calls: Calls | None = None, answered: Collection[str] = ()) -> None:
        self._by_step = by_step
        self._calls = calls or AllCalls()
        self.trouble = ""
        self.used: Usage | None = None
        self.run_id: str | None = None
        self.unknown = 0
        self.stopped = False
        self._pending_failure: GatewayError | None = None
        self._failed = False
        self._returned = set(answered)
        self._text_id: str | None = None
        self._reasoning_id: str | None = None
        self._last_seq = -1

    @property
    def over(self) -> bool:
        """Tell whether Letta said how the turn ended."""
        return self.stopped or self._failed or self._pending_failure is not None

    def decode(self, data: bytes, batch: Batch) -> None:
        """Add the events of one frame to the batch; raises ``UpstreamInvalid`` where a known frame does not fit."""
        try:
            self._decode_known(data, batch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._decode_odd(data, batch)

    def fragment(self, data: bytes) -> TextDelta | ReasoningDelta | None:
        """Return the event of a frame that goes on with what is being said or thought; None for every other one.

        It changes nothing: whatever is not that plain takes the long way, ``decode``.
        """
        try:
            frame = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if type(frame) is AssistantMessage:
            text, id_before = frame.content, self._text_id
        elif type(frame) is ReasoningMessage:
            text, id_before = frame.reasoning, self._reasoning_id
        else:
            return None
        if type(text) is not str or not text or frame.id != id_before or frame.seq_id is not None or not self.run_id:
            return None
        return TextDelta(text) if type(frame) is AssistantMessage else ReasoningDelta(text)

    def accept(self, frame: AnyFrame, batch: Batch) -> None:
        """Add the events of a decoded frame to the batch."""
        seq = frame.seq_id
        if seq is not None and not self._by_step:
            if seq <= self._last_seq:
                return
            self._last_seq = seq
        if type(frame) is AssistantMessage:
            self._text(frame, batch)
        else:
            self._accept_rare(frame, batch)

    def end(self) -> Batch:
        """Return what the end of the stream itself says: the failure that a stop reason announced."""
        if self._pending_failure is None or self._failed:
            return []
        self._failed = True
        return [Failure(self._pending_failure)]

    def _text(self, frame: AssistantMessage, batch: Batch) -> None:
        content = frame.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        if not text:
            return
        # Two messages in one turn (text, a tool, text again) are two paragraphs to the reader.
        if frame.id != self._text_id:
            if self._text_id is not None:
                text = "\n\n" + text
            self._text_id = frame.id
        batch.append(TextDelta(text))

    def _reasoning(self, frame: ReasoningMessage, batch: Batch) -> None:
        text = frame.reasoning
        if not text:
            return
        if frame.id != self._reasoning_id:
            if self._reasoning_id is not None:
                text = "\n\n" + text
            self._reasoning_id = frame.id
        batch.append(ReasoningDelta(text))

    def _accept_rare(self, frame: AnyFrame, batch: Batch) -> None:
        match frame:
            case ReasoningMessage():
                self._reasoning(frame, batch)
            case ToolCallMessage():
                self._called(frame, batch, waits=False)
            case ApprovalRequestMessage():
                # The App Server asks itself for approval of its own tools, and gives it.
                self._called(frame, batch, waits=not self._by_step)
            case ToolReturnMessage():
                self._tool_return(frame, batch)
            case StopReasonFrame(stop_reason=reason):
                self._stop(reason, batch)
            case UsageStatistics():
                usage = _usage(frame)
                self.used = usage if self.used is None else self.used.plus(usage)
                batch.append(usage)
            case ErrorMessage() | LoopError():
                self._trouble(frame, batch)
            case _:
                return

    def _called(self, frame: ToolCallMessage | ApprovalRequestMessage, batch: Batch, *, waits: bool) -> None:
        for call in _calls(frame):
            event = self._calls.called(call, waits=waits)
            if event is not None:
                batch.append(event)

    def _tool_return(self, frame: ToolReturnMessage, batch: Batch) -> None:
        if frame.tool_call_id in self._returned:
            return  # the App Server tells of it twice: when it ran, and as it is stored
        self._returned.add(frame.tool_call_id)
        batch.append(ServerToolReturn(frame.tool_call_id, frame.name, succeeded=frame.status != "error"))

    def _trouble(self, frame: ErrorMessage | LoopError, batch: Batch) -> None:
        if isinstance(frame, LoopError):
            self.trouble = frame.message or ""
        elif self._by_step:
            self.trouble = frame.detail or frame.message or ""
        else:
            self._fail(failures.of_error(frame.error_type, frame.message, frame.detail, self._pending_failure), batch)

    def _stop(self, reason: str, batch: Batch) -> None:
        if self._by_step:
            return
        good = failures.good_stop(reason)
        if good is not None:
            if not self.stopped:
                self.stopped = True
                batch.extend(self._calls.stopped(good))
            return
        error = failures.of_stop(reason)
        if reason in failures.FOLLOWED_BY_DETAIL:
            self._pending_failure = error
        else:
            self._fail(error, batch)

    def _fail(self, error: GatewayError, batch: Batch) -> None:
        if not self._failed:
            self._failed = True
            batch.append(Failure(error))

    def _decode_known(self, data: bytes, batch: Batch) -> None:
        self._accept_first(_decode(data), data, batch)

    def _accept_first(self, frame: AnyFrame, data: bytes, batch: Batch) -> None:
        """Accept a frame, and learn the run from the first one that names it."""
        if self.run_id is None:
            self.run_id = _decode_envelope(data).run_id
        self.accept(frame, batch)

    def _decode_odd(self, data: bytes, batch: Batch) -> None:
        """Tell a frame of an unknown kind, and escaped lone surrogates, from a broken frame."""
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            self._decode_lines(data, batch)
            return
        kind = document.get("message_type") if isinstance(document, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            self.unknown += not isinstance(kind, str) or kind not in _LIFECYCLE
            return
        try:
            # msgspec refuses a lone surrogate, which Python's JSON writes as an escape: show it as U+FFFD.
            text = json.dumps(document, ensure_ascii=False)
            self._decode_known(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), batch)
        except (msgspec.DecodeError, RecursionError):
            raise UpstreamInvalid(should_retry=False) from None

    def _decode_lines(self, data: bytes, batch: Batch) -> None:
        """Decode frames with no blank line between them, which arrive as one event of several data lines."""
        if b"\n" not in data:
            raise UpstreamInvalid(should_retry=False)
        for line in data.split(b"\n"):
            if line and line != DONE:
                self.decode(line, batch)


def _calls(frame: ToolCallMessage | ApprovalRequestMessage) -> list[ToolCallBody]:
    # The older field holds the first of several calls.
    calls = frame.tool_calls or frame.tool_call
    if calls is None:
        return []
    return calls if isinstance(calls, list) else [calls]


def _usage(frame: UsageStatistics) -> Usage:
    completion = frame.completion_tokens or 0
    prompt = max(frame.prompt_tokens or 0, (frame.total_tokens or 0) - completion)
    return Usage(prompt, completion, frame.cached_input_tokens, frame.reasoning_tokens)


class TurnStream:
    """One turn's bytes -> batches of events: the SSE parser and the frame decoder in a row.

    ``done`` is set by Letta's ``[DONE]``.
    """

    def __init__(self, calls: Calls | None = None, answered: Collection[str] = ()) -> None:
        self.frames = FrameDecoder(calls=calls, answered=answered)
        self.events = EventStream()
        self.done = False

    def feed(self, data: bytes) -> Batch:
        """Return the events of one network read."""
        # Most reads are one frame that goes on with the text: no more is done for it than that takes.
        if (
            self.events.between
            and data.startswith(b"data: {")
            and data.endswith(b"}\n\n")
            and data.find(b"\n") == len(data) - 2
        ):
            fragment = self.frames.fragment(data[6:-2])
            if fragment is not None:
                return [fragment]
        batch: Batch = []
        decode = self.frames.decode
        for payload in self.events.feed(data):
            if payload == DONE:
                self.done = True
            elif payload:  # an empty event is somebody's keepalive
                decode(payload, batch)
        return batch

    def end(self) -> Batch:
        """Return what the end of the stream itself says."""
        return self.frames.end()
