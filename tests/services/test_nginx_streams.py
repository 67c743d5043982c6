"""Streams through nginx: every chunk as it comes, and a thousand of them at once."""

import asyncio
import contextlib
import itertools
import statistics
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from gateway.letta.scripted import Pause, Script, ScriptedBackend, Step
from gateway.translation.agent_events import Stop, TextDelta
from tests.bench import targets
from tests.bench.driver import StreamClient, Tally
from tests.bench.processes import Child, raise_file_limit
from tests.server.running import FRIEND, chat_request, serving, settings
from tests.server.wire import Connection
from tests.services.nginx import API_KEY, KEY, PROXY, SERVER_NAME, nginx

WORDS: Final = 12
PAUSE: Final = 0.15
STREAMS: Final = 1_000


def slow_words() -> ScriptedBackend:
    """Return a backend whose agent says a word, thinks, and says the next one."""
    steps: list[Step] = []
    for number in range(WORDS):
        steps += [[TextDelta(f"word-{number} ")], Pause(PAUSE)]
    return ScriptedBackend([FRIEND], usual=Script((*steps, [Stop("end_turn")])))


async def arrivals(pieces: AsyncIterator[bytes]) -> list[float]:
    """Return when each word came, and see that they came in order."""
    now = asyncio.get_running_loop().time
    found = []
    text = b""
    async for piece in pieces:
        text += piece
        found += [now()] * piece.count(b"word-")
    assert b"".join(f"word-{number} ".encode() for number in range(WORDS)) in b"".join(words(text))
    return found


def words(text: bytes) -> list[bytes]:
    """Return the words of a stream's bytes."""
    return [part.split(b'"')[0] for part in text.split(b'"content":"')[1:]]


async def test_words_arrive_one_by_one(tmp_path: Path) -> None:
    """The time between two words, through nginx, is the time between them at the gateway: none waits for the next."""
    async with (
        serving(settings(api_keys=(API_KEY,)), slow_words()) as gateway,
        nginx(tmp_path, gateway.port) as running,
    ):
        async with gateway.connect() as direct:
            sent = await stream(direct)
        async with running.connect() as through:
            came = await stream(through)
    assert len(sent) == len(came) == WORDS
    for before, after in zip(gaps(sent), gaps(came), strict=True):
        assert after / before > 0.5, (gaps(sent), gaps(came))
    assert 0.8 < statistics.median(gaps(came)) / statistics.median(gaps(sent)) < 1.25
    assert 0.8 < (came[-1] - came[0]) / (sent[-1] - sent[0]) < 1.25


async def stream(connection: Connection) -> list[float]:
    await connection.send(chat_request(stream=True, headers=KEY))
    head = await connection.head()
    assert head.status == 200
    assert head.header("content-encoding") is None
    return await arrivals(connection.pieces())


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


async def test_words_arrive_one_by_one_over_http2(tmp_path: Path) -> None:
    async with (
        serving(settings(api_keys=(API_KEY,)), slow_words()) as gateway,
        nginx(tmp_path, gateway.port) as running,
    ):
        head, _, body = chat_request(stream=True).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/chat/completions")
        curl = await asyncio.create_subprocess_exec(
            *("curl", "--silent", "--show-error", "--no-buffer", "--http2", "--fail"),
            *("--cacert", tmp_path / "certificate.pem", "--resolve", f"{SERVER_NAME}:{running.port}:{PROXY}"),
            *("-H", f"Authorization: Bearer {API_KEY}", "-H", "Content-Type: application/json"),
            *("--write-out", "HTTP/%{http_version}", "--data-binary", body),
            f"https://{SERVER_NAME}:{running.port}/v1/chat/completions",
            stdout=asyncio.subprocess.PIPE,
        )
        assert curl.stdout is not None
        read = curl.stdout
        text = b""

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal text
            while piece := await read.read(65_536):
                text += piece
                yield piece

        came = await arrivals(pieces())
        assert await curl.wait() == 0
    assert text.endswith(b"HTTP/2")
    assert all(gap / PAUSE > 0.5 for gap in gaps(came)), gaps(came)


@pytest.mark.timeout(240)
async def test_a_thousand_streams(tmp_path: Path) -> None:
    """All are open at once, all are whole, with every chunk in order and (but for a few) by itself."""
    raise_file_limit()
    tally = Tally()
    with targets.upstream(STREAMS) as letta, targets.gateway(letta.port) as gateway:
        front_end = {"front_ends": f"{PROXY} 1;"}
        async with nginx(tmp_path, gateway.port, **front_end) as running:
            loop = asyncio.get_running_loop()
            for number in range(STREAMS):
                asked = gateway.request(targets.Asking(number, "events=50 interval=0.5"))
                client = StreamClient(tally, asked, 50, audited=True)
                await loop.create_connection(
                    lambda client=client: client,  # type: ignore[misc]
                    PROXY,
                    running.port,
                    ssl=running.tls,
                    server_hostname=SERVER_NAME,
                )
            most = len(tally.live)
            await tally.all_gone(90)
            memory = Child(running.pid).rss()
            reads = tally.reads
    print(f"{most} at once; nginx {memory / 2**20:.0f} MiB; {tally.deltas / reads:.2f} words a read")
    assert tally.errors == []
    assert tally.finished == most == STREAMS
    assert tally.deltas / reads < 1.1
    with contextlib.suppress(FileNotFoundError):
        assert "alert" not in running.errors
