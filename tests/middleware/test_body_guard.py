import asyncio
import contextlib
import gc
import json
import time
import zlib
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from gateway.errors import InvalidRequest
from middleware.body_guard import MAX_PARTS, check_json
from tests.server.running import JSON, Running, chat_body, serving, settings
from tests.server.wire import request

URL = "/v1/chat/completions"
MIB = 1_048_576


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving(settings(max_body=2 * MIB, body_timeout=0.4)) as running:
        yield running


def chunked(*pieces: bytes) -> bytes:
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in (*pieces, b""))


NOT_JSON = {
    "empty": b"",
    "blank": b"  \n ",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "text": b'"text"',
    "half": b'{"model":',
    "trailing junk": chat_body() + b"x",
    "two documents": chat_body() + chat_body(),
    "name twice": b'{"model":"friend","model":"foe"}',
    "name twice, deep below": b'{"a":[{"b":{"c":1,"c":2}}]}',
    "byte order mark": b"\xef\xbb\xbf" + chat_body(),
    "UTF-16": chat_body().decode().encode("utf-16"),
    "UTF-16 without mark": chat_body().decode().encode("utf-16-le"),
    "Latin-1": '{"model":"é"}'.encode("latin-1"),
    "cut in a character": '{"model":"é"}'.encode()[:-3],
    "single quotes": b"{'model':'friend'}",
    "form": b"model=friend",
    "comment": b'{"model":"friend" /* x */}',
    "lists 100,000 deep": b'{"a":' + b"[" * 100_000,
    "objects 100,000 deep": b'{"a":' * 100_000,
    "closed lists 100,000 deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5,000 digits": b'{"n":' + b"9" * 5_000 + b"}",
    "a million digits": b'{"n":' + b"9" * 1_000_000 + b"}",
    "1e999": b'{"temperature":1e999}',
    "-1e999": b'{"temperature":-1e999}',
    "NaN": b'{"temperature":NaN}',
    "Infinity": b'{"temperature":Infinity}',
    "-Infinity": b'{"temperature":-Infinity}',
    "lone high surrogate": b'{"model":"\\ud800"}',
    "lone low surrogate": b'{"model":"\\uDC00x"}',
    "lone surrogate in a name": b'{"\\ud800":1}',
    "surrogates the wrong way round": b'{"model":"\\udc00\\ud800"}',
    "control character": b'{"model":"a\nb"}',
    "a million values": b'{"messages":[' + b"0," * 1_000_000 + b"0]}",
    "a million lists": b'{"messages":[' + b"[]," * 600_000 + b"0]}",
    "a leading zero": b'{"n":01}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_not_one_json_object(gateway: Running, body: bytes) -> None:
    answer = await gateway.ask("POST", URL, JSON, body)
    assert (answer.status, answer.code) == (400, "invalid_json"), answer
    assert gateway.backend.turns == []


ODD_JSON = {
    "minus zero": b'{"temperature":-0}',
    "nul in a text": b'{"a":"\\u0000"}',
    "a pair of surrogates": b'{"a":"\\ud83d\\ude00"}',
    "an escaped backslash before ud800": b'{"a":"\\\\ud800"}',
    "300 lists deep": b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
    "30 digits": b'{"a":123456789012345678901234567890}',
    "a megabyte of text": b'{"a":"' + b"x" * MIB + b'"}',
    "blanks around": b" \r\n {} \t",
}


@pytest.mark.parametrize("body", ODD_JSON.values(), ids=ODD_JSON.keys())
def test_odd_but_one_json_object(body: bytes) -> None:
    check_json(body)
    msgspec.json.decode(body)


COSTLY = {
    "numbers": b'{"a":[' + b"0," * (MAX_PARTS - 10) + b"0]}",
    "fractions": b'{"a":[' + b"1.5," * (MIB // 4) + b"0]}",
    "powers": b'{"a":[' + b"1e9," * (MIB // 4) + b"0]}",
    "lists": b'{"a":[' + b"[]," * (MAX_PARTS // 2 - 10) + b"0]}",
    "objects": b'{"a":[' + b"{}," * (MAX_PARTS // 2 - 10) + b"0]}",
    "small objects": b'{"a":[' + b'{"x":1},' * (MIB // 8) + b"0]}",
    "names": b"{" + b",".join(b'"k%d":0' % n for n in range(MIB // 11)) + b"}",
    "long numbers": b'{"a":[' + (b"9" * 4_300 + b",") * (MIB // 4_301) + b"0]}",
    "one long fraction": b'{"a":0.' + b"1" * MIB + b"}",
    "one long exponent": b'{"a":1e' + b"9" * MIB + b"}",
    "one long text": b'{"a":"' + b"x" * MIB + b'"}',
    "escapes": b'{"a":"' + b"\\u00e9" * (MIB // 6) + b'"}',
    "surrogate pairs": b'{"a":"' + b"\\ud83d\\ude00" * (MIB // 12) + b'"}',
    "backslashes": b'{"a":"' + b"\\\\" * (MIB // 2) + b'"}',
    "never closed": b'{"a":"' + b"x" * MIB,
    "blanks": b"{" + b" " * MIB + b"}",
    "commas in a text": b'{"a":"' + b"," * MIB + b'"}',
}


@pytest.fixture
def frozen() -> Iterator[None]:
    """Keep what pytest has loaded out of the collector's sight, as ``serve`` does with what the gateway has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY.keys())
def test_a_mebibyte_costs_less_than_100_ms(body: bytes) -> None:
    """On a machine on which that is much: on a slow one, less than a few times what plain parsing takes there."""
    limit, costs = max(0.1, 4 * plain_cost(body)), []
    for _ in range(4):
        started = time.thread_time()
        try:
            check_json(body)
        except InvalidRequest as error:
            assert error.code == "invalid_json"  # noqa: PT017 - either is well, what counts is the time
        costs.append(time.thread_time() - started)
        if costs[-1] < limit:
            return
    pytest.fail(f"{min(costs):.3f} s, {limit:.3f} allowed")


def plain_cost(body: bytes) -> float:
    started = time.thread_time()
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(body)
    return time.thread_time() - started


async def test_large_body_does_not_stop_the_streams() -> None:
    body = chat_body("x" * 8 * MIB, tools=[]) + b" "
    numbers = b'{"model":"friend","messages":[' + b"0," * (MAX_PARTS - 10) + b"0]}"
    async with serving() as gateway, measured_lag() as lag:
        for sent in (body, numbers):
            await gateway.ask("POST", URL, JSON, sent)
    assert max(lag) < 0.25


async def test_body_over_the_limit_by_its_own_word(gateway: Running) -> None:
    async with gateway.connect() as connection:
        await connection.send(request("POST", URL, {**JSON, "Content-Length": str(2 * MIB + 1)}))
        answer = await connection.answer()
    assert (answer.status, answer.code) == (413, "request_too_large")


async def test_chunked_body_over_the_limit(gateway: Running) -> None:
    body = chunked(*[b" " * 65_536] * 40)
    answer = await gateway.ask("POST", URL, {**JSON, "Transfer-Encoding": "chunked"}, body)
    assert (answer.status, answer.code) == (413, "request_too_large")


async def test_chunked_body_within_the_limit(gateway: Running) -> None:
    body = chunked(*[chat_body()[n : n + 7] for n in range(0, len(chat_body()), 7)])
    answer = await gateway.ask("POST", URL, {**JSON, "Transfer-Encoding": "chunked"}, body)
    assert answer.status == 200


async def test_body_of_exactly_the_limit(gateway: Running) -> None:
    body = chat_body()
    answer = await gateway.ask("POST", URL, JSON, body + b" " * (2 * MIB - len(body)))
    assert answer.status == 200


@pytest.mark.parametrize(
    "encoding", ["gzip", "deflate", "br", "zstd", "compress", "gzip, gzip", "x-unknown", "identity, gzip", "GZIP"]
)
async def test_compressed_body(gateway: Running, encoding: str) -> None:
    answer = await gateway.ask("POST", URL, {**JSON, "Content-Encoding": encoding}, zlib.compress(chat_body()))
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


async def test_identity_is_no_encoding(gateway: Running) -> None:
    answer = await gateway.ask("POST", URL, {**JSON, "Content-Encoding": "identity"}, chat_body())
    assert answer.status == 200


async def test_gzip_bomb_does_not_stop_the_loop(gateway: Running) -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(b"\0" * MIB) for _ in range(200)) + packer.flush()
    async with measured_lag() as lag:
        for headers in ({"Content-Encoding": "gzip"}, {"Content-Encoding": "gzip", "X-Api-Key": "none"}):
            answer = await gateway.ask("POST", URL, {**JSON, **headers}, bomb)
            assert answer.status == 415
    assert max(lag) < 0.05


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json; charset=utf-16",
        "application/json; charset=latin-1",
        "application/json, text/plain",
        "application/json; boundary=x",
        "text/json",
        "\x01",
        "application/json" + " " * 8_000 + "x",
        "application/json; charset" + " " * 8_000 + "x",
    ],
)
async def test_other_media_type(gateway: Running, content_type: str) -> None:
    started = time.process_time()
    answer = await gateway.ask("POST", URL, {"Content-Type": content_type}, chat_body())
    if content_type != "\x01":
        assert (answer.status, answer.code) == (415, "unsupported_media_type")
    else:
        assert (answer.status, answer.code) == (400, "malformed_request")
    assert time.process_time() - started < 0.1, "a header must not keep the processor busy"


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        'application/json; charset="utf8"',
        "application/json;",
        "application/json ; charset = utf-8 ;",
    ],
)
async def test_json_in_utf8(gateway: Running, content_type: str) -> None:
    answer = await gateway.ask("POST", URL, {"Content-Type": content_type}, chat_body())
    assert answer.status == 200


async def test_body_that_stops_arriving(gateway: Running) -> None:
    async with gateway.connect() as connection:
        await connection.send(request("POST", URL, {**JSON, "Content-Length": "100"}) + b'{"model":')
        started = time.monotonic()
        answer = await connection.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert 0.3 < time.monotonic() - started < 2


async def test_body_that_trickles(gateway: Running) -> None:
    async with gateway.connect() as connection:
        await connection.send(request("POST", URL, {**JSON, "Content-Length": "100"}))
        reading = asyncio.get_running_loop().create_task(connection.answer())
        while not reading.done():
            await connection.send(b" ")
            await asyncio.sleep(0.05)
        assert reading.result().status == 408


async def test_body_with_broken_chunks(gateway: Running) -> None:
    answer = await gateway.ask("POST", URL, {**JSON, "Transfer-Encoding": "chunked"}, b'5\r\n{"mod\r\nzz\r\nxx')
    assert answer.status == 400
    assert answer.code in ("invalid_body", "malformed_request")


async def test_client_that_goes_away_in_its_body(gateway: Running) -> None:
    async with gateway.connect() as connection:
        await connection.send(request("POST", URL, {**JSON, "Content-Length": "100"}) + b"{")
        connection.abort()
    await asyncio.sleep(0.05)
    assert 'status="499"' in gateway.exposed()


async def test_body_of_a_stranger_is_not_read() -> None:
    async with serving(settings(api_keys=("sk-one",), body_timeout=30.0)) as gateway, gateway.connect() as connection:
        await connection.send(request("POST", URL, {**JSON, "Content-Length": "1000000"}))
        answer = await connection.answer()
        assert (answer.status, answer.code) == (401, "invalid_api_key")


async def test_get_needs_no_media_type(gateway: Running) -> None:
    answer = await gateway.ask("GET", "/v1/models", {"Content-Type": "text/plain"})
    assert answer.status == 200


class measured_lag:  # noqa: N801 - read as a verb
    """How late the loop is, every few milliseconds, while the context lasts."""

    async def __aenter__(self) -> list[float]:
        self._lag = [0.0]
        self._task = asyncio.get_running_loop().create_task(self._watch())
        return self._lag

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.02)
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + 0.005
            await asyncio.sleep(0.005)
            self._lag.append(time.monotonic() - due)
