"""S17: what costs a client 10 KiB must not cost the gateway more than 1 MiB or long work, whatever it says."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator

from tests.faults.chaos_upstream import BEGIN, END, BadLetta, says
from tests.faults.gateways import rss
from tests.server.running import JSON
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.server.wire import connect, request

MIB = 1_048_576
SMALL = 10_240
MOST_WORK = 0.1
"""Seconds of processor time for one of them: nothing else is answered meanwhile."""
CHAT = "/v1/chat/completions"


def post(body: bytes | str, **headers: str) -> bytes:
    """Write a request with any body."""
    return request("POST", CHAT, {**JSON, **headers}, body.encode() if isinstance(body, str) else body)


def chat(**fields: object) -> bytes:
    return post(json.dumps({"model": "friend", "messages": [{"role": "user", "content": "Hi"}], **fields}))


def doubling(keyword: str, last: object) -> bytes:
    """Ask for an answer by a schema whose references double at each of 25 levels."""
    levels = {f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(25)} | {"a25": last}
    schema = {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": levels}
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def hostile() -> Iterator[bytes]:
    """Yield requests of up to 10 KiB that were made to cost much."""
    yield post("[" * 9_900)
    yield post('{"a":' * 1_900)
    yield post('{"model":"friend","messages":' + "[" * 4_900 + "]" * 4_900 + "}")
    yield post('{"n":' + "9" * 9_900 + "}")
    yield post('{"n":1e' + "9" * 9_900 + "}")
    yield post('{"model":"' + "\\u0000" * 1_600 + '"}')
    yield post('{"model":"' + "\\ud800" * 1_600 + '"}')
    yield post("{" + ",".join(f'"k{number}":0' for number in range(1_000)) + "}")
    yield post("{" + ",".join('"k":0' for _ in range(1_500)) + "}")
    yield post(b"\xff" * 9_000)
    yield post(b"\xef\xbb\xbf{}")
    yield post(b"\x1f\x8b" + b"\0" * 9_000, **{"Content-Encoding": "gzip"})
    yield chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 250}])
    yield chat(messages=[{"role": "user", "content": "a"}] * 250)
    yield chat(model="x" * 9_000)
    yield chat(model="\U0001f600" * 700)
    yield chat(stop=["x"] * 1_500)
    yield chat(metadata={f"k{number}": "v" for number in range(500)})
    yield chat(tools=[{"type": "function", "function": {"name": "f"}}] * 150)
    yield doubling("anyOf", {"type": "null"})
    yield doubling("allOf", {})
    url = "data:image/png;base64," + "A" * 9_000
    yield chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    yield request("GET", "/" + "a" * 8_000)
    yield request("GET", "/v1/models/" + "%2e%2e%2f" * 800)
    yield request("GET", "/v1/models?" + "a=b&" * 2_000)
    yield request("GET", "/v1/models/" + "%F0%9F%98%80" * 600)
    yield request("GET", "/health", [(f"X-{number}", "v") for number in range(1_000)])
    yield request("GET", "/health", [("X-Forwarded-For", "127.0.0.1," * 800)])
    yield request("GET", "/health", [("Authorization", "Bearer " + "k" * 7_900)])
    yield request("GET", "/v1/models", [("Cookie", "a=b; " * 1_500)])
    yield request("GET", "/v1/models", [("Accept", "*/*;q=0.1," * 700), ("Range", "bytes=" + "0-1," * 500)])
    yield request("GET", "/v1/models", [("Upgrade", "websocket"), ("Connection", "upgrade")])
    yield (
        b"POST "
        + CHAT.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + (b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 1_500 + b"0\r\n\r\n")
    )
    yield (
        b"POST "
        + CHAT.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        + (b"1;" + b"x" * 9_000 + b"\r\n \r\n0\r\n\r\n")
    )
    yield b"GET / HTTP/1.1\r\n" + b"\r\n" * 4_000
    yield b"\r\n" * 5_000
    yield b"\0" * 10_000
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" * 1_000
    yield b"\x16\x03\x01\x02\x00\x01" + b"\xff" * 9_000
    yield request("POST", CHAT, {**JSON, "Content-Length": "99999999999"}, b"{")
    yield request("POST", CHAT, {**JSON, "Expect": "100-continue", "Content-Length": "10"})
    yield request("GET", "/health") * 150  # as many as 10 KiB hold, in one go
    yield request("GET", "/metrics") * 100


def scrambled(count: int) -> Iterator[bytes]:
    """Yield requests of which pieces were cut out, doubled or replaced."""
    chance = random.Random(17)
    seeds = [wants[:SMALL] for wants in hostile()] + [chat(), chat(stream=True)]
    for _ in range(count):
        wants = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(wants) or 1)
            size = chance.randint(1, 64)
            match chance.randrange(3):
                case 0:
                    del wants[start : start + size]
                case 1:
                    wants[start:start] = wants[start : start + size] * chance.randint(1, 5)
                case _:
                    wants[start : start + size] = chance.randbytes(size)
        yield bytes(wants[:SMALL])


async def throw(gateway: GatewayProcess, wants: bytes, *, waits: bool = True) -> None:
    """Send it and read what comes; who does not wait says at once that nothing follows, which ends a turn."""
    async with connect(gateway.port) as client:
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError):
            await client.send(wants)
            if not waits:
                client.writer.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.reader.read(65_536), 0.5)


def cpu(gateway: GatewayProcess) -> float:
    """Return the processor time of a process, in seconds."""
    with open(f"/proc/{gateway.process.pid}/stat") as stat:  # noqa: PTH123
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def test_small_requests_cost_little(letta: BadLetta) -> None:
    letta.plays(*BEGIN, says('{"x":1}'), *END)
    async with gateway_process(letta.url, LETTA_GATEWAY_RATE_LIMIT="1000000/minute") as gateway:
        for wants in [*hostile(), *hostile()]:  # what is loaded and kept once is no amplification
            await throw(gateway, wants)
        worst, costly = 0, b""
        longest, laborious = 0.0, b""
        for wants in hostile():
            assert len(wants) <= 1.2 * SMALL, wants[:50]
            before, started = rss(gateway.process.pid), cpu(gateway)
            await throw(gateway, wants)
            grown, spent = rss(gateway.process.pid) - before, cpu(gateway) - started
            if grown > worst:
                worst, costly = grown, wants
            if spent > longest:
                longest, laborious = spent, wants
        print(f"the worst of them: {worst / 1024:.0f} KiB for {costly[:60]!r}")
        print(f"the most laborious: {longest:.2f} s for {laborious[:60]!r}")
        assert worst <= MIB
        assert longest <= MOST_WORK, laborious
        before, started = rss(gateway.process.pid), cpu(gateway)
        count = 400
        for wants in scrambled(count):
            await throw(gateway, wants, waits=False)
        grown, spent = rss(gateway.process.pid) - before, cpu(gateway) - started
        print(f"{count} scrambled requests: RSS {grown / MIB:+.2f} MiB, {spent / count * 1000:.2f} ms of CPU each")
        assert grown <= 2 * MIB
        assert spent / count < 0.02
        assert (await gateway.ask("GET", "/health")).status == 200
    assert "Traceback" not in gateway.errors


async def test_many_at_once(letta: BadLetta) -> None:
    """Held open all together, they still cost less than 1 MiB each."""
    async with gateway_process(letta.url, LETTA_GATEWAY_RATE_LIMIT="1000000/minute") as gateway:
        for wants in hostile():
            await throw(gateway, wants)
        before, started = rss(gateway.process.pid), time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            for number, wants in enumerate([*hostile()] * 4):
                client = await stack.enter_async_context(connect(gateway.port))
                with contextlib.suppress(ConnectionError):
                    await client.send(wants[: len(wants) - number % 3])
            await asyncio.sleep(0.3)
            grown = rss(gateway.process.pid) - before
            assert (await gateway.ask("GET", "/health")).status == 200
        print(f"164 hostile requests at once: RSS {grown / MIB:+.1f} MiB in {time.monotonic() - started:.1f} s")
        assert grown < 10 * MIB
    assert "Traceback" not in gateway.errors
