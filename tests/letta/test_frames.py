import itertools
import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from letta_client.types import StopReasonType

from gateway.errors import (
    GatewayError,
    InvalidRequest,
    PendingApproval,
    TurnCancelled,
    TurnFailed,
    UpstreamInvalid,
    UpstreamQuotaExceeded,
    UpstreamRateLimited,
    UpstreamTimeout,
)
from gateway.letta.frames import AnyFrame, FrameDecoder, TurnStream
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
from tests.letta import recorded

KINDS = [str(kind.__struct_config__.tag) for kind in get_args(AnyFrame)]


def frame(kind: str, **fields: Any) -> bytes:
    return json.dumps({"message_type": kind, **fields}).encode()


def decode(*frames: bytes, end: bool = False) -> list[AgentEvent]:
    """What these frames say, and what their end says if it is asked."""
    decoder = FrameDecoder()
    batch: Batch = []
    for data in frames:
        decoder.decode(data, batch)
    return batch + decoder.end() if end else batch


def failure(*frames: bytes) -> GatewayError:
    events = decode(*frames, end=True)
    (failed,) = (event for event in events if isinstance(event, Failure))
    assert events[-1] is failed
    return failed.error


def text(content: Any, **fields: Any) -> bytes:
    return frame("assistant_message", content=content, **fields)


def thought(reasoning: str | None, **fields: Any) -> bytes:
    return frame("reasoning_message", reasoning=reasoning, **fields)


def stop(reason: str) -> bytes:
    return frame("stop_reason", stop_reason=reason)


# Recorded streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recorded.names())
def test_recorded_stream(name: str) -> None:
    assert recorded.events(recorded.answered(recorded.stream(name))) == recorded.expected(name)


@pytest.mark.parametrize("name", recorded.names())
def test_recorded_stream_split_at_every_point(name: str) -> None:
    stream = recorded.stream(name)
    whole = recorded.answered(stream)
    frames = [part + b"\n\n" for part in stream.removesuffix(b"\n\n").split(b"\n\n")]
    starts = [0, *itertools.accumulate(map(len, frames))]
    # All frames are split at once, each after as many bytes: so every point of the stream is tried.
    for offset in range(max(map(len, frames))):
        cuts = [start + min(offset, len(part)) for start, part in zip(starts, frames, strict=False)]
        reads = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
        assert recorded.answered(*reads) == whole


@pytest.mark.parametrize("name", ["stream-text", "stream-cancelled", "stream-error-unknown-tool-return"])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
def test_recorded_stream_one_byte_at_a_time_with_other_line_ends(name: str, line_end: bytes) -> None:
    stream = recorded.stream(name).replace(b"\n", line_end)
    assert recorded.answered(*(stream[at : at + 1] for at in range(len(stream)))) == recorded.answered(
        recorded.stream(name)
    )


def test_recorded_stream_that_is_cut_off_anywhere_is_never_whole() -> None:
    stream = recorded.stream("stream-text")
    told = stream.index(b"end_turn")
    for end in range(0, told, 7):
        *_, last = recorded.events(recorded.answered(stream[:end]))
        assert json.loads(last)["error"]["code"] == "upstream_stream_truncated"


def test_recorded_stream_without_its_done_is_whole() -> None:
    stream = recorded.stream("stream-text")
    assert recorded.answered(stream.replace(b"data: [DONE]\n\n", b"")) == recorded.answered(stream)


# Text and reasoning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Hi", [TextDelta("Hi")]),
        ("", []),
        (None, []),
        ([], []),
        ([{"type": "text", "text": "He"}, {"type": "image"}, {"type": "text", "text": "llo"}], [TextDelta("Hello")]),
        ([{"type": "image"}], []),
    ],
)
def test_content_as_a_string_or_as_parts(content: Any, said: list[AgentEvent]) -> None:
    assert decode(text(content)) == said


def test_two_messages_of_one_turn_are_two_paragraphs() -> None:
    assert decode(text("Let ", id="m1"), text("me see.", id="m1"), text("It", id="m2"), text(" is.", id="m2")) == [
        TextDelta("Let "),
        TextDelta("me see."),
        TextDelta("\n\nIt"),
        TextDelta(" is."),
    ]


def test_message_that_begins_with_nothing_still_begins_a_paragraph() -> None:
    assert decode(text("One", id="m1"), text("", id="m2"), text("two", id="m2")) == [
        TextDelta("One"),
        TextDelta("\n\ntwo"),
    ]


def test_messages_without_an_id_are_one() -> None:
    assert decode(text("a"), text("b")) == [TextDelta("a"), TextDelta("b")]


def test_thoughts_of_two_steps_are_two_paragraphs_and_none_of_the_text() -> None:
    frames = [thought("Hm", id="m1"), thought(None, id="m1"), text("One", id="m1"), thought("So", id="m2")]
    assert decode(*frames) == [ReasoningDelta("Hm"), TextDelta("One"), ReasoningDelta("\n\nSo")]


# Tools ---------------------------------------------------------------------------------------------------------------

CALL = {"tool_call_id": "call_a", "name": "f", "arguments": "{}"}
OTHER = {"tool_call_id": "call_b", "name": "g", "arguments": None}


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({}, []),
        ({"tool_call": None, "tool_calls": None}, []),
        ({"tool_call": CALL}, [("call_a", "f", "{}")]),
        ({"tool_call": {"tool_call_id": "call_a"}}, [("call_a", None, "")]),
        ({"tool_call": CALL, "tool_calls": CALL}, [("call_a", "f", "{}")]),
        ({"tool_calls": CALL}, [("call_a", "f", "{}")]),
        ({"tool_calls": [CALL, OTHER]}, [("call_a", "f", "{}"), ("call_b", "g", "")]),
        ({"tool_call": CALL, "tool_calls": [CALL, OTHER]}, [("call_a", "f", "{}"), ("call_b", "g", "")]),
        ({"tool_call": CALL, "tool_calls": []}, [("call_a", "f", "{}")]),
    ],
)
def test_calls_as_an_object_or_as_a_list(fields: dict[str, Any], calls: list[tuple[str, str | None, str]]) -> None:
    assert decode(frame("approval_request_message", **fields)) == [ToolCallDelta(*call) for call in calls]
    assert decode(frame("tool_call_message", **fields)) == [ServerToolCall(*call) for call in calls]


@pytest.mark.parametrize(("status", "succeeded"), [("success", True), ("error", False), (None, True)])
def test_tool_return(status: str | None, *, succeeded: bool) -> None:
    returned = frame("tool_return_message", tool_call_id="call_a", name="f", status=status, tool_return="secret")
    assert decode(returned) == [ServerToolReturn("call_a", "f", succeeded)]


# The end -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_good_stop(reason: StopReason) -> None:
    decoder = FrameDecoder()
    batch: Batch = []
    decoder.decode(stop(reason), batch)
    assert batch == [Stop(reason)]
    assert decoder.over
    assert decoder.end() == []


@pytest.mark.parametrize(
    ("reason", "error", "status", "code"),
    [
        ("error", TurnFailed, 502, "agent_run_failed"),
        ("llm_api_error", TurnFailed, 502, "model_error"),
        ("invalid_llm_response", TurnFailed, 502, "model_error"),
        ("invalid_tool_call", TurnFailed, 502, "model_error"),
        ("cancelled", TurnCancelled, 502, "agent_run_cancelled"),
        ("insufficient_credits", UpstreamQuotaExceeded, 429, "insufficient_quota"),
        ("context_window_overflow_in_system_prompt", InvalidRequest, 400, "context_length_exceeded"),
        ("tea_time", UpstreamInvalid, 502, "upstream_invalid_response"),
    ],
)
def test_failed_stop(reason: str, error: type[GatewayError], status: int, code: str) -> None:
    failed = failure(text("Hel"), stop(reason))
    assert type(failed) is error
    assert (failed.status, failed.code, failed.should_retry) == (status, code, False)


def test_every_stop_reason_of_letta_has_a_meaning() -> None:
    for reason in get_args(StopReasonType):
        events = decode(stop(reason), end=True)
        assert len(events) == 1
        assert not (isinstance(events[0], Failure) and isinstance(events[0].error, UpstreamInvalid)), reason


@pytest.mark.parametrize(
    ("error_type", "error", "code"),
    [
        ("llm_rate_limit", UpstreamRateLimited, "upstream_rate_limited"),
        ("llm_timeout", UpstreamTimeout, "model_timeout"),
        ("llm_authentication", TurnFailed, "model_auth_failed"),
        ("llm_error", TurnFailed, "model_error"),
        ("insufficient_credits", UpstreamQuotaExceeded, "insufficient_quota"),
        ("internal_error", TurnFailed, "agent_run_failed"),
        ("tea_time", TurnFailed, "agent_run_failed"),
        (None, TurnFailed, "agent_run_failed"),
    ],
)
def test_error_message(error_type: str | None, error: type[GatewayError], code: str) -> None:
    told = frame("error_message", error_type=error_type, message="key sk-1", detail="/srv/letta.py")
    for failed in (failure(told), failure(stop("error"), told)):
        assert type(failed) is error
        assert (failed.code, failed.should_retry) == (code, False)
        assert "sk-1" not in failed.message
        assert "letta.py" not in failed.message


def test_error_message_that_says_less_than_the_stop_reason() -> None:
    assert failure(stop("llm_api_error"), frame("error_message", error_type="internal_error")).code == "model_error"


@pytest.mark.parametrize("field", ["message", "detail"])
def test_agent_that_waits_for_approval(field: str) -> None:
    told = frame("error_message", error_type="internal_error", **{field: "The agent is waiting for approval on a tool"})
    assert isinstance(failure(stop("error"), told), PendingApproval)


def test_failure_is_told_once() -> None:
    told = frame("error_message", error_type="llm_error")
    assert len(decode(stop("error"), told, stop("cancelled"), told, end=True)) == 1


def test_failure_after_a_good_stop_is_told() -> None:
    assert decode(stop("end_turn"), frame("error_message"))[0] == Stop("end_turn")
    assert isinstance(failure(stop("end_turn"), frame("error_message")), TurnFailed)


def test_announced_failure_comes_with_the_end_of_the_stream() -> None:
    decoder = FrameDecoder()
    batch: Batch = []
    over_before = decoder.over
    decoder.decode(stop("error"), batch)
    assert batch == []
    assert (over_before, decoder.over) == (False, True)
    assert [type(event) for event in decoder.end()] == [Failure]


def test_usage_where_letta_reports_figures_and_where_not() -> None:
    assert decode(frame("usage_statistics", prompt_tokens=3, completion_tokens=4)) == [Usage(3, 4)]
    assert decode(
        frame("usage_statistics", prompt_tokens=3, completion_tokens=4, cached_input_tokens=0, reasoning_tokens=1)
    ) == [Usage(3, 4, 0, 1)]
    assert decode(frame("usage_statistics", prompt_tokens=None, step_count=2)) == [Usage(0, 0)]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, 3),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 107}, 103),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 0}, 3),
        ({"completion_tokens": 4, "total_tokens": 7}, 3),
    ],
)
def test_prompt_is_counted_with_what_came_from_a_cache(fields: dict[str, int], prompt: int) -> None:
    assert decode(frame("usage_statistics", **fields)) == [Usage(prompt, 4)]


# Step by step, as the App Server speaks -------------------------------------------------------------------------------


def by_step(*frames: bytes) -> tuple[FrameDecoder, Batch]:
    decoder = FrameDecoder(by_step=True)
    batch: Batch = []
    for data in frames:
        decoder.decode(data, batch)
    return decoder, batch


def test_steps_number_their_frames_anew() -> None:
    _, batch = by_step(text("a", seq_id=1), text("b", seq_id=2), text("c", seq_id=1))
    assert batch == [TextDelta("a"), TextDelta("b"), TextDelta("c")]


@pytest.mark.parametrize("reason", ["end_turn", "requires_approval", "error", "cancelled", "tea_time"])
def test_stop_of_a_step_does_not_end_the_turn(reason: str) -> None:
    decoder, batch = by_step(text("a"), stop(reason), text("b"))
    assert batch == [TextDelta("a"), TextDelta("b")]
    assert not decoder.stopped


def test_failure_of_a_step_is_remembered_and_not_told() -> None:
    decoder, batch = by_step(frame("error_message", message="first"), frame("error_message", message="m", detail="d"))
    assert (batch, decoder.trouble) == ([], "d")


def test_loop_error_is_remembered_and_not_told() -> None:
    decoder, batch = by_step(frame("error_message", detail="429: x"), frame("loop_error", message="400: x"))
    assert (batch, decoder.trouble) == ([], "400: x"), "an earlier failure was got over"
    assert by_step(frame("loop_error"))[0].trouble == ""


@pytest.mark.parametrize("kind", ["status", "retry", "client_tool_start", "approval_classification_end"])
def test_progress_for_a_terminal_is_no_unknown_frame(kind: str) -> None:
    decoder, batch = by_step(frame(kind), frame("tea_message"))
    assert (batch, decoder.unknown) == ([], 1)


# What is skipped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "ping",
        "hidden_reasoning_message",
        "approval_response_message",
        "user_message",
        "system_message",
        "event_message",
        "summary_message",
    ],
)
def test_kind_that_says_nothing_to_the_client(kind: str) -> None:
    decoder = FrameDecoder()
    batch: Batch = []
    decoder.decode(frame(kind, content={"a": 1}, run_id="run-1"), batch)
    assert (batch, decoder.unknown, decoder.run_id) == ([], 0, "run-1")


@pytest.mark.parametrize(
    "odd",
    [
        b'{"message_type":"tea_message","content":1}',
        b'{"message_type":null}',
        b'{"message_type":7}',
        b'{"message_type":["ping"]}',
        b'{"message_type":{}}',
        b"{}",
        b"[]",
        b"null",
        b"7",
        b'"ping"',
        b'{\n "message_type":\n "tea_message"\n}',
    ],
)
def test_unknown_kind_is_skipped_and_counted(odd: bytes) -> None:
    decoder = FrameDecoder()
    batch: Batch = []
    decoder.decode(odd, batch)
    decoder.decode(text("Hi"), batch)
    assert (batch, decoder.unknown) == ([TextDelta("Hi")], 1)


@pytest.mark.parametrize(
    "broken",
    [
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b'{"message_type":"ping"} x',
        b"[" * 100_000,
        frame("assistant_message", content=7),
        frame("assistant_message", content=[{"text": None}]),
        frame("assistant_message", content="a", id=7),
        frame("reasoning_message", reasoning=["a"]),
        frame("tool_call_message", tool_call={"name": "f"}),
        frame("approval_request_message", tool_calls=7),
        frame("tool_return_message"),
        frame("stop_reason"),
        frame("stop_reason", stop_reason=None),
        frame("usage_statistics", prompt_tokens="3"),
        frame("error_message", message={}),
        frame("ping", seq_id="1"),
        frame("ping", run_id=7),
        frame("assistant_message", content="\ud800", id=7),
        b'{"message_type":"ping","x":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    ],
)
def test_frame_that_does_not_fit_is_the_upstreams_fault(broken: bytes) -> None:
    with pytest.raises(UpstreamInvalid) as raised:
        decode(broken)
    assert raised.value.should_retry is False
    turn = TurnStream()
    turn.feed(b"data: " + frame("ping") + b"\n\n")
    with pytest.raises(UpstreamInvalid):
        turn.feed(b"data: " + broken + b"\n\n")


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 700, *range(800, 1_100, 10)])
def test_frame_nested_up_to_pythons_limit_is_read_or_refused(depth: int) -> None:
    try:
        decode(b'{"message_type":"ping","x":' + b"[" * depth + b"]" * depth + b"}")
    except UpstreamInvalid:
        assert depth > 100


@pytest.mark.parametrize(
    ("escaped", "shown"),
    [
        (rb"a\ud800b", "a\ufffdb"),
        (rb"\udc00", "\ufffd"),
        (rb"\ud83d\ude00", "😀"),
        (rb"\ud83d", "\ufffd"),
        (rb"\ude00\ud83d", "\ufffd\ufffd"),
        (rb"\ud83d\ud83d\ude00", "\ufffd😀"),
        (rb"\u0000", "\0"),
    ],
)
def test_lone_surrogate_is_shown_as_one_replacement_character(escaped: bytes, shown: str) -> None:
    decoder = FrameDecoder()
    batch: Batch = []
    decoder.decode(b'{"message_type":"assistant_message","run_id":"run-1","content":"' + escaped + b'"}', batch)
    assert (batch, decoder.unknown, decoder.run_id) == ([TextDelta(shown)], 0, "run-1")


# Frames in a row -----------------------------------------------------------------------------------------------------


def test_duplicate_frames_are_dropped() -> None:
    frames = [text("a", seq_id=1), text("b", seq_id=2), text("b", seq_id=2), text("a", seq_id=1), text("c", seq_id=4)]
    assert decode(*frames) == [TextDelta("a"), TextDelta("b"), TextDelta("c")]


def test_frames_without_a_number_are_all_taken() -> None:
    assert decode(text("a", seq_id=1), text("a"), text("a", seq_id=None)) == [TextDelta("a")] * 3


def test_run_is_the_first_that_is_named() -> None:
    decoder = FrameDecoder()
    for data in (
        frame("ping"),
        frame("ping", run_id=None),
        frame("ping", run_id="run-1"),
        frame("ping", run_id="run-2"),
    ):
        decoder.decode(data, [])
    assert decoder.run_id == "run-1"


def test_run_is_learned_from_text_too() -> None:
    turn = TurnStream()
    for data in (frame("ping"), text("a"), text("b", run_id="run-1")):
        turn.feed(b"data: " + data + b"\n\n")
    assert turn.frames.run_id == "run-1"


def test_frames_without_a_blank_line_between_them() -> None:
    assert decode(text("a") + b"\n" + text("b") + b"\n\n" + frame("tea") + b"\n" + stop("end_turn")) == [
        TextDelta("a"),
        TextDelta("b"),
        Stop("end_turn"),
    ]
    with pytest.raises(UpstreamInvalid):
        decode(text("a") + b"\n{")


def test_frame_written_over_several_lines() -> None:
    assert decode(json.dumps({"message_type": "assistant_message", "content": "a"}, indent=1).encode()) == [
        TextDelta("a")
    ]


def test_text_in_every_form_one_frame_a_read() -> None:
    turn = TurnStream()
    said = [
        turn.feed(b"data: " + data + b"\n\n")
        for data in (
            frame("ping", run_id="run-1"),
            text("a", id="m1"),
            text("", id="m1"),
            text(None, id="m1"),
            text([{"text": "b"}], id="m1"),
            text("c", id="m1"),
            text("d", id="m2"),
        )
    ]
    assert said == [[], [TextDelta("a")], [], [], [TextDelta("b")], [TextDelta("c")], [TextDelta("\n\nd")]]


def test_done_ends_the_stream() -> None:
    turn = TurnStream()
    assert turn.feed(b"data: " + text("a") + b"\n\n") == [TextDelta("a")]
    done_before = turn.done
    assert turn.feed(b"data: [DONE]\n\n") == []
    assert (done_before, turn.done) == (False, True)
    assert turn.end() == []


def test_frames_without_a_blank_line_before_done() -> None:
    turn = TurnStream()
    assert turn.feed(b"data: " + stop("end_turn") + b"\ndata: [DONE]\n\n") == [Stop("end_turn")]


def test_stream_that_breaks_off_inside_a_frame_keeps_what_was_whole() -> None:
    turn = TurnStream()
    assert turn.feed(b"data: " + text("a") + b"\n\ndata: " + text("b")[:20]) == [TextDelta("a")]
    assert turn.end() == []
    assert not turn.frames.over


def test_batch_is_all_that_one_read_completes() -> None:
    turn = TurnStream()
    read = b"".join(b"data: " + data + b"\n\n" for data in (text("a"), frame("ping"), text("b"), stop("end_turn")))
    assert turn.feed(read) == [TextDelta("a"), TextDelta("b"), Stop("end_turn")]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_fields = ["content", "id", "reasoning", "tool_call", "tool_calls", "stop_reason", "seq_id", "run_id", "message"]
_odd = st.builds(
    lambda kind, rest: json.dumps({**rest, "message_type": kind}).encode(),
    st.sampled_from(KINDS) | _json,
    st.dictionaries(st.sampled_from(_fields) | st.text(), _json, max_size=4),
)


@given(data=st.binary() | _odd)
def test_any_frame_is_read_or_refused(data: bytes) -> None:
    try:
        said = decode(data)
    except UpstreamInvalid:
        return
    msgspec.to_builtins([event for event in said if not isinstance(event, Failure)])


_ids = st.sampled_from([None, "m1", "m2"])
_numbers = st.none() | st.integers(0, 9)
_runs = st.sampled_from([None, "run-1", "run-2"])
_usual = st.one_of(
    st.builds(
        lambda said, m, n, run: text(said, id=m, seq_id=n, run_id=run), st.text(max_size=5), _ids, _numbers, _runs
    ),
    st.builds(lambda said, m, n: thought(said, id=m, seq_id=n), st.text(max_size=5), _ids, _numbers),
    st.builds(lambda n, run: frame("ping", seq_id=n, run_id=run), _numbers, _runs),
    st.just(frame("tea")),
    st.just(frame("approval_request_message", tool_call=CALL)),
)


@given(frames=st.lists(_usual, max_size=20))
def test_frames_say_the_same_in_one_read_and_in_many(frames: list[bytes]) -> None:
    events = [b"data: " + data + b"\n\n" for data in frames]
    whole, many, bytewise = TurnStream(), TurnStream(), TurnStream()
    said = whole.feed(b"".join(events))
    assert [event for data in events for event in many.feed(data)] == said
    assert [event for byte in b"".join(events) for event in bytewise.feed(bytes([byte]))] == said
    assert whole.frames.run_id == many.frames.run_id == bytewise.frames.run_id
    assert whole.frames.unknown == many.frames.unknown == bytewise.frames.unknown


def test_what_was_told_of_the_usage_adds_up() -> None:
    frames, batch = FrameDecoder(by_step=True), list[AgentEvent]()
    assert frames.used is None
    for prompt, completion in ((100, 20), (30, 4)):
        told = {"message_type": "usage_statistics", "prompt_tokens": prompt, "completion_tokens": completion}
        frames.decode(json.dumps(told).encode(), batch)
    assert batch == [Usage(100, 20), Usage(30, 4)]
    assert frames.used == Usage(130, 24)
