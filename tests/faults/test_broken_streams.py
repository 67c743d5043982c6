"""F4, F5, F6: streams that break off, or are not what they should be, through the whole gateway."""

from collections.abc import AsyncIterator

import openai
import pytest

from tests.faults.chaos_upstream import (
    BEGIN,
    END,
    BadLetta,
    Script,
    Step,
    body,
    breaks_off,
    done,
    fails,
    frame,
    frame_bytes,
    head,
    ping,
    resets,
    says,
    sends,
    stops,
    usage,
    waits,
)
from tests.faults.gateways import Gateway, served
from tests.letta import recorded
from tests.server.wire import Answer

CANARY = "canary-of-the-upstream"
CHUNKED = pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "to the end"])
CUTS = pytest.mark.parametrize("cut", [resets(), breaks_off()], ids=["rst", "fin"])


@pytest.fixture
async def gateway(letta: BadLetta) -> AsyncIterator[Gateway]:
    async with served(letta) as running:
        yield running


async def both(letta: BadLetta, gateway: Gateway, *script: Step) -> tuple[Answer, Answer]:
    """Play a script to a client that streams and to one that does not."""
    letta.plays(*script)
    streamed, whole = await gateway.chat(stream=True), await gateway.chat()
    assert streamed.status in (200, whole.status)
    return streamed, whole


def last_code(answer: Answer) -> str:
    """Return the code of the error that ends a stream, or is its status; see that it ends there."""
    if answer.status != 200:
        return answer.code
    assert answer.complete
    assert "[DONE]" not in answer.events
    reasons = [choice["finish_reason"] for event in answer.events[:-1] for choice in event["choices"]]
    assert not any(reasons), "never a good end"
    return str(answer.events[-1]["error"]["code"])


def is_hello(streamed: Answer, whole: Answer) -> None:
    """See that both clients have the whole answer."""
    assert (streamed.status, streamed.text, streamed.events[-1]) == (200, "Hello", "[DONE]")
    assert streamed.events[-2]["choices"][0]["finish_reason"] == "stop"
    assert whole.status == 200, whole
    assert whole.json()["choices"][0]["message"]["content"] == "Hello"


# F4: cut off ---------------------------------------------------------------------------------------------------------


@CHUNKED
@CUTS
async def test_cut_after_the_headers(letta: BadLetta, gateway: Gateway, cut: Step, *, chunked: bool) -> None:
    streamed, whole = await both(letta, gateway, head(chunked=chunked), cut)
    for answer in (streamed, whole):
        assert (answer.status, answer.code) == (502, "upstream_stream_truncated")
        assert answer.header("x-should-retry") == "false"
    assert len(letta.posted) == 2


@CHUNKED
@CUTS
async def test_cut_after_the_ping(letta: BadLetta, gateway: Gateway, cut: Step, *, chunked: bool) -> None:
    for answer in await both(letta, gateway, head(chunked=chunked), ping(), cut):
        assert (answer.status, answer.code) == (502, "upstream_stream_truncated")


@CHUNKED
@CUTS
async def test_cut_in_mid_stream(letta: BadLetta, gateway: Gateway, cut: Step, *, chunked: bool) -> None:
    streamed, whole = await both(letta, gateway, head(chunked=chunked), ping(), says("Hel"), cut)
    assert (streamed.text, last_code(streamed)) == ("Hel", "upstream_stream_truncated")
    assert (whole.status, whole.code) == (502, "upstream_stream_truncated")
    await gateway.settled(1)
    assert gateway.figure("upstream_errors_total", code="upstream_stream_truncated") == 2
    assert gateway.figure("turns_total", outcome="failed") == 2


@pytest.mark.parametrize("end", [b"20\r\ndata: {", '1e\r\ndata: {"content": "\u00e9'.encode()[:-1]])
@CUTS
async def test_cut_in_mid_chunk(letta: BadLetta, gateway: Gateway, cut: Step, end: bytes) -> None:
    streamed, whole = await both(letta, gateway, *BEGIN, says("Hel"), sends(end), cut)
    assert last_code(streamed) == "upstream_stream_truncated"
    assert (whole.status, whole.code) == (502, "upstream_stream_truncated")


async def test_chunks_of_garbage(letta: BadLetta, gateway: Gateway) -> None:
    streamed, whole = await both(letta, gateway, *BEGIN, says("Hel"), waits(0.05), sends(b"zz\r\ncanary"), waits(0.05))
    assert streamed.text == "Hel"
    assert last_code(streamed) == "upstream_stream_truncated"
    assert whole.code == "upstream_stream_truncated"
    streamed, whole = await both(letta, gateway, head(), sends(b"zz\r\ncanary"))
    assert {streamed.status, whole.status} == {502}
    assert "canary" not in str(streamed) + str(whole) + gateway.logs.text


@CHUNKED
async def test_last_frame_has_no_blank_line(letta: BadLetta, gateway: Gateway, *, chunked: bool) -> None:
    """By the standard an event without its blank line is none: the stop reason may be half of another one."""
    unfinished = b'data: {"message_type":"stop_reason","stop_reason":"end_turn"}'
    streamed, whole = await both(letta, gateway, head(chunked=chunked), ping(), says("Hel"), body(unfinished))
    assert last_code(streamed) == "upstream_stream_truncated"
    assert whole.code == "upstream_stream_truncated"


@CHUNKED
@pytest.mark.parametrize("rest", [(), (usage(),), (usage(), done())], ids=["bare", "usage", "all"])
async def test_stop_reason_is_the_end(letta: BadLetta, gateway: Gateway, rest: Script, *, chunked: bool) -> None:
    is_hello(*await both(letta, gateway, head(chunked=chunked), ping(), says("Hel", "lo"), stops(), *rest))


@CUTS
@CHUNKED
async def test_cut_after_the_stop_reason(letta: BadLetta, gateway: Gateway, cut: Step, *, chunked: bool) -> None:
    is_hello(*await both(letta, gateway, head(chunked=chunked), ping(), says("Hel", "lo"), stops(), cut))


async def test_done_without_a_stop_reason(letta: BadLetta, gateway: Gateway) -> None:
    streamed, whole = await both(letta, gateway, *BEGIN, says("Hel"), done())
    assert last_code(streamed) == whole.code == "upstream_stream_truncated"


async def test_cancelled_by_somebody_else(letta: BadLetta, gateway: Gateway) -> None:
    """V1 ends such a stream without ``[DONE]``."""
    streamed, whole = await both(letta, gateway, *BEGIN, says("Hel"), stops("cancelled"))
    assert last_code(streamed) == "agent_run_cancelled"
    assert (whole.status, whole.code) == (502, "agent_run_cancelled")
    assert letta.cancels == [], "it is over"


# What Letta says of a failure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error_type", "detail", "number", "code"),
    [
        ("llm_rate_limit", "RATE_LIMIT_EXCEEDED: ", 429, "upstream_rate_limited"),
        ("llm_timeout", "", 504, "model_timeout"),
        ("llm_authentication", "UNAUTHENTICATED: ", 502, "model_auth_failed"),
        ("llm_error", "", 502, "model_error"),
        ("llm_error", "PAYMENT_REQUIRED: ", 429, "insufficient_quota"),
        ("insufficient_credits", "", 429, "insufficient_quota"),
        ("internal_error", "", 502, "agent_run_failed"),
        ("never_heard_of", "", 502, "agent_run_failed"),
    ],
)
@pytest.mark.parametrize("said", [(), (says("Hel"),)], ids=["at once", "in mid-stream"])
async def test_run_fails(
    letta: BadLetta, gateway: Gateway, error_type: str, detail: str, number: int, code: str, said: Script
) -> None:
    failure = fails(error_type, CANARY, detail + CANARY)
    streamed, whole = await both(letta, gateway, *BEGIN, *said, stops("error"), failure, done())
    assert (whole.status, whole.code, whole.header("x-should-retry")) == (number, code, "false")
    assert last_code(streamed) == code
    assert streamed.status == (200 if said else number)
    assert CANARY not in str(streamed) + str(whole) + gateway.logs.text
    assert letta.cancels == []


async def test_sdk_raises_an_in_stream_error(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*BEGIN, says("Hel"), breaks_off())
    heard = ""
    gateway.requests += 1
    async with gateway.sdk() as sdk:
        with pytest.raises(openai.APIError) as raised:  # noqa: PT012 - the error comes out of the iteration
            async for chunk in await sdk.chat.completions.create(
                model="friend", messages=[{"role": "user", "content": "Hi"}], stream=True
            ):
                heard += chunk.choices[0].delta.content or ""
    assert heard == "Hel"
    assert raised.value.code == "upstream_stream_truncated"
    assert "cut off" in raised.value.message
    assert len(letta.posted) == 1


# F5: malformed -------------------------------------------------------------------------------------------------------

HEL = frame_bytes(id="m", content="Hel")
LO = frame_bytes(id="m", content="lo")
STOP = b'data: {"message_type":"stop_reason","stop_reason":"end_turn"}\n\n'


@pytest.mark.parametrize(
    "feed",
    [
        (HEL + LO + STOP).replace(b"\n", b"\r\n"),
        (HEL + LO + STOP).replace(b"\n", b"\r"),
        HEL.replace(b"\n", b"\r\n") + LO.replace(b"\n", b"\r") + STOP,
        b"\xef\xbb\xbf" + HEL + LO + STOP,
        b": a comment\n\n" + HEL + b":\n: another\n\n" + LO + STOP,
        b"retry: 10\nid: 7\n" + HEL + b"unknown: field\n" + LO + STOP,
        b"event: nobody_knows\n" + HEL + HEL + LO + STOP,
        HEL + frame_bytes("nobody_knows", content="x") + LO + STOP,
        HEL + b'data: {"no": "type"}\n\ndata: []\n\ndata: 7\n\ndata: null\n\n' + LO + STOP,
        HEL.replace(b"data: ", b"data:") + LO + STOP,
        HEL.replace(b", ", b",\ndata: ") + LO + STOP,
        (HEL + LO).replace(b"\n\n", b"\n") + STOP,
        b"\n\n\n" + HEL + b"\n\n\n\n" + LO + b"\n" + STOP,
        HEL + b"data:\n\n" + LO + STOP,
        frame_bytes(id="m", content="Hel", seq_id=3) * 3 + frame_bytes(id="m", content="lo", seq_id=4) + STOP * 2,
    ],
    ids=[
        "crlf", "cr", "mixed", "bom", "comments", "fields", "unknown event", "unknown type", "no frames", "no space",
        "multi-line", "no blank line", "blank lines", "empty data", "duplicate seq_id",
    ],
)  # fmt: skip
async def test_odd_and_harmless(letta: BadLetta, gateway: Gateway, feed: bytes) -> None:
    is_hello(*await both(letta, gateway, head(), body(feed)))


async def test_unknown_frames_are_counted(letta: BadLetta, gateway: Gateway) -> None:
    await both(letta, gateway, head(), body(HEL + frame_bytes("nobody_knows") * 3 + LO + STOP))
    await gateway.settled(1)
    assert gateway.figure("skipped_frames_total") == 6


@pytest.mark.parametrize(
    "bad",
    [
        b'data: {"message_type":"assistant_message","content":"canary\n\n',
        b'data: {"message_type":"assistant_message","content":{"canary":1}}\n\n',
        b'data: {"message_type":"stop_reason"}\n\n',
        b'data: {"message_type":"stop_reason","stop_reason":"canary"}\n\n',
        b"data: <html>canary</html>\n\n",
        b"data: \xff\xfe\x00canary\n\n",
        b"data: " + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n\n",
        b'data: {"message_type":"usage_statistics","prompt_tokens":' + b"9" * 5_000 + b"}\n\n",
    ],
    ids=["cut", "wrong type", "no reason", "strange reason", "html", "bytes", "deep", "long number"],
)
async def test_bad_frame(letta: BadLetta, gateway: Gateway, bad: bytes) -> None:
    streamed, whole = await both(letta, gateway, *BEGIN, body(HEL), waits(0.03), body(bad), body(LO), *END)
    assert last_code(streamed) == whole.code == "upstream_invalid_response"
    assert streamed.text == "Hel"
    assert whole.status == 502
    assert "canary" not in str(streamed) + str(whole) + gateway.logs.text
    await gateway.settled(3)
    assert {cancel.run_ids[0] for cancel in letta.cancels} <= {"run-1", "run-2"}


# F6: split -----------------------------------------------------------------------------------------------------------


def norm(answer: Answer) -> list[object]:
    """Return the events without what differs from one answer to the next."""
    return [{**event, "id": "", "created": 0} if isinstance(event, dict) else event for event in answer.events]


@pytest.mark.parametrize("piece", [1, 7])
async def test_split_anywhere(letta: BadLetta, gateway: Gateway, piece: int) -> None:
    words = ("\u00e9\u4f60\U0001f600", "a\r\nbc\x00d", "\ud800 alone \udfff", '\\n"')
    feed = b"".join(frame_bytes(id="m", content=word) for word in words)
    raw = 'data: {"message_type":"assistant_message","id":"m","content":"\u00e9\u4f60\U0001f600"}\r\n\r\n'.encode()
    letta.plays(*BEGIN, body(feed + raw), *END)
    together = await gateway.chat(stream=True)
    letta.plays(*BEGIN, body(feed + raw, piece=piece), *END)
    split = await gateway.chat(stream=True)
    assert (
        split.text == together.text == '\u00e9\u4f60\U0001f600a\r\nbc\x00d\ufffd alone \ufffd\\n"\u00e9\u4f60\U0001f600'
    )
    assert norm(split)[-3:] == norm(together)[-3:]
    assert split.events[-1] == "[DONE]"


@pytest.mark.parametrize("name", ["stream-text", "stream-reasoning", "stream-server-side-tool"])
async def test_recorded_stream_a_byte_at_a_time(letta: BadLetta, gateway: Gateway, name: str) -> None:
    letta.plays(head(chunked=False), body(recorded.stream(name)))
    together = await gateway.chat(stream=True, stream_options={"include_usage": True})
    letta.plays(head(chunked=False), body(recorded.stream(name), piece=1))
    split = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert norm(split) == norm(together)
    assert split.events[-1] == "[DONE]"


async def test_call_of_a_tool_that_no_client_offered(letta: BadLetta, gateway: Gateway) -> None:
    """A tool of the agent's own asks for approval, with neither a name nor arguments."""
    call = {"tool_call_id": "call-1", "name": None, "arguments": None}
    streamed, whole = await both(
        letta, gateway, *BEGIN, frame("approval_request_message", tool_call=call), stops("requires_approval"), done()
    )
    assert streamed.events[-2]["choices"][0]["finish_reason"] == "stop"
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
