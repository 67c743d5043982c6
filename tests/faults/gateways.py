"""A whole gateway against a bad Letta, and the proof that nothing is left of what it went through."""

import asyncio
import contextlib
import gc
import os
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import openai
from aiohttp import web

from gateway import keys
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.settings import Settings
from gateway.shared_state.memory import MemoryLocks
from tests.faults.chaos_upstream import BadLetta
from tests.server.recorded_logs import RecordedLogs, recorded_logs
from tests.server.running import JSON, chat_body, chat_request
from tests.server.wire import Answer, Connection, ask, connect
from tests.storage.late import LateDatabase

PATIENCE: Final = 5.0
GAUGES: Final = ("open_turns", "waiting_turns", "open_streams", "requests_in_flight")
SHORT: Final[dict[str, Any]] = {
    "connect_timeout": 0.5,
    "first_byte_wait": 2.0,
    "first_event_timeout": 0.7,
    "silence_timeout": 0.4,
    "turn_timeout": 5.0,
    "write_timeout": 0.5,
    "queue_wait": 3.0,
    "grace": 0.2,
    "rate_limit": "100000/minute",
}
"""Deadlines that a test can wait for."""


async def until(true: Callable[[], object], within: float = PATIENCE) -> float:
    """Wait until a callable says so, and return how long that took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not true():
        assert loop.time() - started < within, "it never came true"
        await asyncio.sleep(0.002)
    return loop.time() - started


def descriptors() -> int:
    """Return how many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count of names


class Gateway:
    """A gateway that serves on this loop; ``logs`` is what it wrote."""

    def __init__(self, app: web.Application, listener: Listener, logs: RecordedLogs) -> None:
        self.app = app
        self.listener = listener
        self.logs = logs
        self.tasks = len(app[keys.TASKS])
        self.requests = 0

    @property
    def port(self) -> int:
        """Return where it listens."""
        return self.listener.port

    def connect(self) -> contextlib.AbstractAsyncContextManager[Connection]:
        """Open a connection to it."""
        return connect(self.port)

    @contextlib.asynccontextmanager
    async def streaming(self, text: str = "Hi", **more: Any) -> AsyncIterator[Connection]:
        """Open a connection and send a request for a stream."""
        async with self.connect() as client:
            await self.send(client, text, **{"stream": True, **more})
            yield client

    async def send(self, client: Connection, text: str = "Hi", **more: Any) -> None:
        """Send a request for a chat completion."""
        self.requests += 1
        await client.send(chat_request(text, **more))

    async def get(self, path: str) -> Answer:
        """Ask for a path."""
        self.requests += path.startswith("/v1")
        return await ask(self.port, "GET", path)

    async def chat(self, text: str = "Hi", **more: Any) -> Answer:
        """Ask for one chat completion."""
        self.requests += 1
        return await ask(self.port, "POST", "/v1/chat/completions", JSON, chat_body(text, **more))

    @contextlib.asynccontextmanager
    async def sdk(self, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
        """Speak to it by the official SDK."""
        chosen: dict[str, Any] = {"timeout": 10.0, **options}
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="sk-any", **chosen
        ) as client:
            yield client

    def exposed(self) -> str:
        """Return its figures as Prometheus reads them."""
        return self.app[keys.METRICS].expose().decode()

    def figure(self, name: str, **labels: str) -> float:
        """Return one figure of its metrics; 0 where it does not stand."""
        wanted = "{" + ",".join(f'{label}="{value}"' for label, value in labels.items()) + "}" if labels else ""
        for line in self.exposed().splitlines():
            if line.startswith(f"letta_gateway_{name}{wanted} "):
                return float(line.split()[-1])
        return 0.0

    async def settled(self, within: float = PATIENCE) -> float:
        """Wait until no turn, task or lock is left, and return how long that took."""
        turns, tasks = self.app[keys.TURNS], self.app[keys.TASKS]
        took = await until(
            lambda: turns.held == 0 and len(tasks) <= self.tasks and all(self.figure(name) == 0 for name in GAUGES),
            within,
        )
        assert isinstance(turns._locks, MemoryLocks)
        assert len(turns._locks) == 0
        assert not turns._open
        return took

    async def logged_once(self, *, bugs: int = 0) -> None:
        """See one line per request in the access log, and no traceback at all."""
        lines: list[dict[str, Any]] = []

        def all_are_there() -> bool:
            lines[:] = self.logs.lines
            return len([1 for line in lines if line["event"] == "request" and "/v1" in line["route"]]) >= self.requests

        await until(all_are_there)
        asked = [line for line in lines if line["event"] == "request" and line["route"].startswith("/v1")]
        assert len(asked) == self.requests, asked
        assert len([line for line in lines if line["level"] in ("error", "critical")]) == bugs, lines
        assert "Traceback" not in self.logs.text
        told = [line for line in lines if line["event"] == "upstream failed"]
        assert len(told) <= self.requests


@contextlib.asynccontextmanager
async def served(letta: BadLetta | str, **changes: Any) -> AsyncIterator[Gateway]:
    """Serve for as long as the context; at its end see that nothing is left, and one log line per request."""
    url = letta if isinstance(letta, str) else letta.url
    with recorded_logs() as logs:
        database = LateDatabase()
        usual = {"letta_base_url": url, "port": 0, "secret_key": "a secret of the tests, 32 characters"}
        settings = Settings(**{**usual, **SHORT, **changes})
        app = build_app(settings, database)
        listener = Listener(app, "127.0.0.1", 0, stalled=settings.write_timeout)
        await listener.start()
        gateway = Gateway(app, listener, logs)
        try:
            yield gateway
            await gateway.settled()
            await gateway.logged_once()
        finally:
            await listener.stop()
            await database.close()


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """See at the end that no descriptor and no task is left that was not there before."""
    before_tasks, before_files = len(asyncio.all_tasks()), descriptors()
    yield
    gc.collect()
    await until(lambda: len(asyncio.all_tasks()) <= before_tasks)
    await until(lambda: descriptors() <= before_files)


def rss(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return resident * resource.getpagesize()
