"""A raw fake Letta V1 server as one asyncio Protocol: it streams time-stamped deltas at a steady beat.

It speaks just enough HTTP for well-behaved clients on loopback. The words of the user message say what to play
(`events=500 interval=0.02 delay=0`); what they leave out comes from the command line. `/v1/chat/completions` plays
the same deltas as OpenAI chunks, for proxies that know only that language.
"""

import argparse
import asyncio
import json
import re
import time
from collections import defaultdict
from typing import NamedTuple, Self, cast
from urllib.parse import parse_qs, urlsplit

import uvloop

from tests.bench.frames import Script, agent, agent_id, letta_script, openai_completion, openai_script, stamp

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WORD = re.compile(rb"\b(events|interval|delay)=([0-9.]+)")
_MODEL = re.compile(rb'"model": *"([^"]*)"')
_STREAMED = re.compile(rb'"stream": *true')
_GOLDEN = 0.6180339887498949


class Plan(NamedTuple):
    """What one stream plays: how many deltas, how far apart, and how long before the first (None: a staggered beat)."""

    events: int
    interval: float
    delay: float | None = None

    def changed_by(self, body: bytes) -> Self:
        """Read the words of a request over this plan."""
        words = dict(_WORD.findall(body))
        return self._replace(
            events=int(words.get(b"events", self.events)),
            interval=float(words.get(b"interval", self.interval)),
            delay=float(words[b"delay"]) if b"delay" in words else self.delay,
        )


class Metronome:
    """One timer for all streams: a wheel of millisecond slots, turned only while a stream waits in it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: defaultdict[int, list[Stream]] = defaultdict(list)
        self._past = 0
        self._turning = False

    def call(self, stream: "Stream", moment: int) -> None:
        """Let the stream beat at this millisecond."""
        if not self._turning:
            self._turning = True
            self._past = milliseconds()
            self._loop.call_later(0.001, self._turn)
        self._due[max(moment, self._past + 1)].append(stream)

    def _turn(self) -> None:
        now = milliseconds()
        while self._past < now:
            # Moved on first: a beat that is late is due again in a later turn, so each delta is a write of its own.
            self._past += 1
            for stream in self._due.pop(self._past, ()):
                stream.beat(now)
        self._turning = bool(self._due)
        if self._turning:
            self._loop.call_later(0.001, self._turn)


class Stream:
    """One answer that is being played."""

    def __init__(self, connection: "Connection", script: Script, plan: Plan, phase: float) -> None:
        self._connection = connection
        self._script = script
        self._left = plan.events
        self._interval = plan.interval * 1000
        delay = phase * plan.interval if plan.delay is None else plan.delay
        self._next = milliseconds() + delay * 1000

    def start(self) -> None:
        """Send the head and the opening at once; then follow the metronome, or play everything if there is no pause."""
        script = self._script
        self._connection.write(_STREAM_HEAD + script.opening)
        if not self._interval:
            self._connection.write(b"".join(script.before + stamp() + script.after for _ in range(self._left)))
            self._end()
        elif self._next <= milliseconds():
            self.beat(milliseconds())
        else:
            self._connection.metronome.call(self, int(self._next))

    def beat(self, now: int) -> None:
        """Send one delta, in one write, and ask for the next beat."""
        if self._connection.lost:
            return
        self._connection.write(self._script.before + stamp() + self._script.after)
        self._left -= 1
        if self._left <= 0:
            self._end()
            return
        self._next += self._interval
        self._connection.metronome.call(self, max(int(self._next), now + 1))

    def _end(self) -> None:
        self._connection.write(self._script.closing)
        self._connection.answered()


class Upstream:
    """What all connections share: the default plan, the agents, the metronome, a serial number for each answer."""

    def __init__(self, plan: Plan, agents: int) -> None:
        self.plan = plan
        self.agents = [agent(number) for number in range(agents)]
        self.numbers = {agent_id(number): number for number in range(agents)}
        self.metronome = Metronome()
        self.serial = 0

    def listing(self, query: str) -> list[object]:
        """Give one page of the agents by Letta's cursor: `after`, `limit`, `name`."""
        asked = {key: values[-1] for key, values in parse_qs(query).items()}
        if "name" in asked:
            return [one for one in self.agents if one["name"] == asked["name"]]
        start = self.numbers.get(asked["after"], len(self.agents)) + 1 if "after" in asked else 0
        return list(self.agents[start : start + int(asked.get("limit", 50))])


class Connection(asyncio.Protocol):
    """One client connection: requests one after the other, each answered before the next is read."""

    def __init__(self, upstream: Upstream) -> None:
        self.metronome = upstream.metronome
        self.lost = False
        self._upstream = upstream
        self._received = b""
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport's write at hand: it is called once for every delta."""
        self.write = cast("asyncio.Transport", transport).write

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the stream that is played fall silent."""
        self.lost = True

    def data_received(self, data: bytes) -> None:
        """Answer as soon as a request is whole."""
        self._received += data
        self._take_requests()

    def answered(self) -> None:
        """Go on with what came while the last answer was played."""
        self._busy = False
        if self._received:
            self._take_requests()

    def _take_requests(self) -> None:
        while not self._busy and (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._received, 0, end)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < whole:
                return
            line, body = self._received.split(b"\r\n", 1)[0], self._received[end + 4 : whole]
            self._received = self._received[whole:]
            method, target, _ = line.decode("latin-1").split(" ")
            self._answer(method, target, body)

    def _answer(self, method: str, target: str, body: bytes) -> None:
        parts = urlsplit(target)
        path = parts.path.rstrip("/")
        tail = path.rpartition("/")[2]
        if method == "POST" and path.endswith("/messages/stream"):
            self._play(body, openai=False)
        elif method == "POST" and path.endswith("/chat/completions"):
            self._play(body, openai=True)
        elif method == "GET" and path == "/v1/agents":
            self._reply(self._upstream.listing(parts.query))
        elif method == "GET" and tail in self._upstream.numbers:
            self._reply(self._upstream.agents[self._upstream.numbers[tail]])
        elif path == "/v1/health":
            self._reply({"version": "0.16.8", "status": "ok"})
        elif tail == "cancel":
            self._reply({})
        else:
            self._reply({"detail": "not found"}, b"404 Not Found")

    def _play(self, body: bytes, *, openai: bool) -> None:
        shared = self._upstream
        shared.serial += 1
        plan = shared.plan.changed_by(body)
        model = (_MODEL.search(body) or (b"", b"bench"))[1].decode()
        if openai and not _STREAMED.search(body):
            self._send(openai_completion(shared.serial, model, plan.events))
            return
        script = openai_script(shared.serial, model) if openai else letta_script(shared.serial, plan.events)
        self._busy = True
        Stream(self, script, plan, shared.serial * _GOLDEN % 1).start()

    def _reply(self, value: object, status: bytes = b"200 OK") -> None:
        self._send(json.dumps(value).encode(), status)

    def _send(self, body: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.write(head % (status, len(body)) + body)


def milliseconds() -> int:
    """Give the present moment as a slot of the wheel."""
    return int(time.monotonic() * 1000)


async def listen(port: int, plan: Plan, agents: int) -> asyncio.Server:
    """Open the fake server on loopback."""
    upstream = Upstream(plan, agents)
    return await asyncio.get_running_loop().create_server(lambda: Connection(upstream), "127.0.0.1", port, backlog=4096)


def main() -> None:
    """Serve until the end of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between two deltas of a stream")
    parser.add_argument("--agents", type=int, default=1)
    options = parser.parse_args()

    async def serve() -> None:
        server = await listen(options.port, Plan(options.events, options.interval), options.agents)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
