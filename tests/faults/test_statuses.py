"""F11, F12: every status that Letta, or whatever stands before it, may answer; nothing of it is ever shown."""

import email.utils
import time
from collections.abc import AsyncIterator

import openai
import pytest

from gateway.conversations import turns
from tests.faults.chaos_upstream import ANSWER, BadLetta, Step, answers, head, sends, status
from tests.faults.gateways import Gateway, served
from tests.server.wire import Answer

CANARY = "canary-of-the-upstream"
HEADERS = {
    "X-Canary": CANARY,
    "WWW-Authenticate": f'Basic realm="{CANARY}"',
    "Set-Cookie": f"session={CANARY}",
    "Server": CANARY,
    "X-Request-Id": CANARY,
    "x-should-retry": CANARY,
}
DETAIL = f'{{"detail":"{CANARY}"}}'
HTML = f"<html><title>{CANARY}</title></html>"
BUSY = f'{{"detail":{{"code":"CONVERSATION_BUSY","message":"{CANARY}"}}}}'
PENDING = f'{{"detail":{{"code":"PENDING_APPROVAL","message":"{CANARY}"}}}}'


@pytest.fixture
async def gateway(letta: BadLetta) -> AsyncIterator[Gateway]:
    """Serve; at the end see that no word of the upstream stands in any line."""
    async with served(letta, models_ttl=600, queue_wait=0.15) as running:
        assert (await running.get("/v1/models")).status == 200
        yield running
        assert CANARY not in running.logs.text
        assert CANARY not in running.exposed()


async def answered(letta: BadLetta, gateway: Gateway, step: Step) -> Answer:
    """Play an answer to both kinds of client, and return what they got."""
    letta.plays(step)
    streamed, whole = await gateway.chat(stream=True), await gateway.chat()
    for answer in (streamed, whole):
        assert CANARY not in str(answer)
        assert answer.header("set-cookie") is None
    assert (streamed.status, streamed.body) == (whole.status, whole.body)
    return streamed


@pytest.mark.parametrize(
    ("number", "body", "ours", "code", "retry"),
    [
        (400, DETAIL, 400, "upstream_rejected", "false"),
        (401, DETAIL, 502, "upstream_auth_failed", "false"),
        (402, DETAIL, 429, "insufficient_quota", "false"),
        (403, DETAIL, 502, "upstream_auth_failed", "false"),
        (404, DETAIL, 404, "model_not_found", None),
        (408, DETAIL, 504, "upstream_timeout", "false"),
        (409, BUSY, 409, "conversation_busy", "true"),
        (409, DETAIL, 409, "conversation_busy", "true"),
        (409, HTML, 409, "conversation_busy", "true"),
        (409, PENDING, 409, "pending_approval", "false"),
        (413, DETAIL, 400, "upstream_rejected", "false"),
        (418, DETAIL, 502, "upstream_error", "false"),
        (422, DETAIL, 400, "upstream_rejected", "false"),
        (429, DETAIL, 429, "upstream_rate_limited", "true"),
        (500, DETAIL, 502, "upstream_error", "false"),
        (502, HTML, 502, "upstream_error", "false"),
        (503, HTML, 503, "upstream_unavailable", "false"),
        (504, HTML, 504, "upstream_timeout", "false"),
        (599, "", 502, "upstream_error", "false"),
        (204, "", 502, "upstream_error", "false"),
        (304, "", 502, "upstream_error", "false"),
    ],
)
async def test_status_of_a_turn(
    letta: BadLetta, gateway: Gateway, number: int, body: str, ours: int, code: str, retry: str | None
) -> None:
    for text in dict.fromkeys((body, "")):
        expected = ("conversation_busy", "true") if number == 409 and not text else (code, retry)
        answer = await answered(letta, gateway, status(number, HEADERS, text))
        assert answer.status == ours
        assert (answer.code, answer.header("x-should-retry")) == expected
        if code == "model_not_found":  # the listing is asked for again
            break
    if ours >= 500 or number in (402, 429):
        assert gateway.figure("upstream_errors_total", code=code) >= 2
    letta.plays(*ANSWER)
    assert (await gateway.chat(stream=True)).text == "Hello", "the thread is free"


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(letta: BadLetta, gateway: Gateway, number: int) -> None:
    answer = await answered(letta, gateway, status(number, {**HEADERS, "Location": f"{letta.url}/v1/{CANARY}"}))
    assert (answer.status, answer.code) == (502, "upstream_error")
    assert not any(CANARY in line for line in letta.lines)
    assert len(letta.posted) == 2


@pytest.mark.parametrize(
    "step",
    [
        status(200, {"Content-Type": "text/html"}, HTML),
        status(200, {"Content-Type": "application/json"}, DETAIL),
        status(200, {"Content-Type": ""}, HTML),
        status(200, {"Content-Type": "text/event-streams"}, HTML),
        status(200),
        sends(f"HTTP/9.9 canary {CANARY}\r\n\r\n".encode()),
        sends(f"{CANARY}\r\n\r\n".encode()),
        sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"),
        sends(b"HTTP/1.1 200 OK\r\n" + b"X-Canary: " + CANARY.encode() * 2_000 + b"\r\n\r\n"),
        sends(b"HTTP/1.1 200 OK\r\nX\0: canary-of-the-upstream\r\n\r\n"),
    ],
    ids=["html", "json", "no type", "other type", "empty", "version", "no http", "lengths", "long header", "nul"],
)
async def test_answer_that_makes_no_sense(letta: BadLetta, gateway: Gateway, step: Step) -> None:
    answer = await answered(letta, gateway, step)
    assert (answer.status, answer.code) == (502, "upstream_invalid_response")
    assert answer.header("x-should-retry") == "false"
    assert len(letta.posted) == 2


async def test_compressed_stream(letta: BadLetta, gateway: Gateway) -> None:
    """Nobody asked for it: it is not unpacked, and no word of it goes on."""
    answer = await answered(letta, gateway, head(headers={"Content-Encoding": "gzip"}))
    assert answer.status == 502


@pytest.mark.parametrize("number", [409, 422, 500])
async def test_huge_body(letta: BadLetta, gateway: Gateway, number: int) -> None:
    answer = await answered(letta, gateway, status(number, HEADERS, DETAIL + CANARY * 1_000_000))
    assert answer.status in (400, 409, 502)


async def test_deep_body_of_a_conflict(letta: BadLetta, gateway: Gateway) -> None:
    answer = await answered(letta, gateway, status(409, {}, '{"detail":' + "[" * 30_000))
    assert answer.code == "conversation_busy"


async def test_interim_answer(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(sends(b"HTTP/1.1 103 Early Hints\r\nLink: </canary>\r\n\r\n"), *ANSWER)
    assert (await gateway.chat(stream=True)).text == "Hello"


# F9: busy ------------------------------------------------------------------------------------------------------------


async def test_busy_for_a_moment(letta: BadLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letta is at another client's turn: we keep our place and ask again, and the message arrives once."""
    monkeypatch.setattr(turns, "BUSY_PAUSE", 0.02)
    async with served(letta) as gateway:
        for _ in range(3):
            letta.plays_next(status(409, HEADERS, BUSY))
        assert (await gateway.chat(stream=True)).text == "Hello"
        assert len(letta.posted) == 4


async def test_sdk_and_a_busy_agent(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(status(409, HEADERS, BUSY))
    gateway.requests += 1
    async with gateway.sdk(max_retries=0) as sdk:
        with pytest.raises(openai.ConflictError) as raised:
            await sdk.chat.completions.create(model="friend", messages=[{"role": "user", "content": "Hi"}])
    assert raised.value.code == "conversation_busy"
    assert raised.value.response.headers["retry-after"] == "2"


# F11: Retry-After ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [429, 503])
@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        (None, 2, 2),
        ("7", 7, 7),
        ("0.2", 1, 1),
        ("0", 2, 2),
        ("-5", 2, 2),
        ("86400", 60, 60),
        ("9" * 400, 2, 2),
        ("1e9", 60, 60),
        ("nan", 2, 2),
        ("soon", 2, 2),
        ("7, 8", 2, 2),
        ("in 20", 10, 21),
        ("in -20", 2, 2),
        ("in 10000000", 60, 60),
        ("Fri, 99 Foo 2026 99:99:99 GMT", 2, 2),
        ("Fri, 20 Nov 99999999999 10:00:00 GMT", 1, 60),
    ],
    ids=lambda value: str(value)[:12],
)
async def test_retry_after(
    letta: BadLetta, gateway: Gateway, number: int, given: str | None, low: int, high: int
) -> None:
    if given and given.startswith("in "):  # as a date
        given = email.utils.formatdate(time.time() + int(given[3:]), usegmt=True)
    letta.plays(status(number, {"Retry-After": given} if given else {}, DETAIL))
    answer = await gateway.chat(stream=True)
    assert answer.status == number
    assert low <= int(answer.header("retry-after") or "0") <= high
    assert answer.header("x-should-retry") == ("true" if number == 429 else "false")
    assert len(letta.posted) == 1, "what was sent is not sent again by us"


async def test_two_retry_afters(letta: BadLetta, gateway: Gateway) -> None:
    raw = b"HTTP/1.1 429 X\r\nRetry-After: 7\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n"
    letta.plays(sends(raw))
    assert (await gateway.chat()).header("retry-after") in ("7", "9", "2")


@pytest.mark.parametrize(("number", "posts"), [(429, 3), (503, 1), (500, 1), (422, 1)])
async def test_sdk_retries_only_where_it_should(letta: BadLetta, gateway: Gateway, number: int, posts: int) -> None:
    letta.plays(status(number, {"Retry-After": "1"}, DETAIL))
    gateway.requests += posts
    async with gateway.sdk(max_retries=2) as sdk:
        with pytest.raises(openai.APIStatusError):
            await sdk.chat.completions.create(model="friend", messages=[{"role": "user", "content": "Hi"}])
    assert len(letta.posted) == posts


# The control plane ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "ours", "code"),
    [
        (status(401, HEADERS, DETAIL), 502, "upstream_auth_failed"),
        (status(403, HEADERS, DETAIL), 502, "upstream_auth_failed"),
        (status(404, HEADERS, DETAIL), 502, "upstream_invalid_response"),
        (status(422, HEADERS, DETAIL), 502, "upstream_invalid_response"),
        (status(429, HEADERS, DETAIL), 429, "upstream_rate_limited"),
        (status(500, HEADERS, HTML), 502, "upstream_error"),
        (status(503, HEADERS, HTML), 503, "upstream_unavailable"),
        (status(302, {"Location": f"/{CANARY}"}), 502, "upstream_error"),
        (status(200, {"Content-Type": "text/html"}, HTML), 502, "upstream_invalid_response"),
        (status(200), 502, "upstream_invalid_response"),
        (answers({"canary": CANARY}), 502, "upstream_invalid_response"),
        (answers([{"canary": CANARY}]), 502, "upstream_invalid_response"),
        (status(200, {}, b"\xff\xfe" + CANARY.encode()), 502, "upstream_invalid_response"),
        (status(200, {}, "[" * 100_000), 502, "upstream_invalid_response"),
        (status(200, {"Content-Encoding": "gzip"}, CANARY), 502, "upstream_invalid_response"),
        (sends(f"{CANARY}\r\n\r\n".encode()), 503, "upstream_unavailable"),
    ],
    ids=["401", "403", "404", "422", "429", "500", "503", "302", "html", "empty", "object", "rows", "bytes", "deep",
         "gzip", "no http"],
)  # fmt: skip
async def test_status_of_the_listing(letta: BadLetta, step: Step, ours: int, code: str) -> None:
    letta.listing = (step,)
    async with served(letta) as gateway:
        for answer in (await gateway.get("/v1/models"), await gateway.chat(), await gateway.get("/v1/models/friend")):
            assert CANARY not in str(answer)
            assert (answer.status, answer.code) == (ours, code)
        assert CANARY not in gateway.logs.text
    assert letta.posted == []
    assert not any(CANARY in line for line in letta.lines)
