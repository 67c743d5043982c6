"""A service over HTTP that answers as it is told, and writes down what it was asked.

::

    async with recorded_service() as service:
        service.on("POST", "/signup", sample("supabase/signup"))     # in this order; the last one stays
        ...
        assert service.asked("POST", "/signup")[0].json() == {...}

A ``Sample`` is what a real service said, from ``tests/data/``, or made up where none was to be had.
"""

import asyncio
import contextlib
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

_DATA: Final = Path(__file__).parents[1] / "data"


class Sample(msgspec.Struct, frozen=True):
    """An answer; ``silent`` is none at all."""

    status: int = 200
    response: Any = None
    headers: Mapping[str, str] = {}
    silent: bool = False


class Asked(msgspec.Struct, frozen=True):
    """A request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body, decoded."""
        return json.loads(self.body)


def sample(name: str) -> Sample:
    """Return what a real service said: a file of ``tests/data``, without its ending."""
    return msgspec.json.decode((_DATA / f"{name}.json").read_bytes(), type=Sample)


class RecordedService:
    """A server on a port of its own; what it was not told about is a 404 without a body."""

    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self.port = 0
        self._answers: dict[tuple[str, str], deque[Sample]] = defaultdict(deque)

    @property
    def url(self) -> str:
        """Return where it is."""
        return f"http://127.0.0.1:{self.port}"

    def on(self, method: str, path: str, *answers: Sample) -> None:
        """Answer so from now on, in this order; the last answer stays."""
        self._answers[method, path] = deque(answers)

    def asked(self, method: str, path: str) -> list[Asked]:
        """Return what was asked there."""
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    def reply(self, asked: Asked) -> Sample:
        """Return what a request is answered."""
        told = self._answers[asked.method, asked.path]
        if not told:
            return Sample(404)
        return told.popleft() if len(told) > 1 else told[0]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Write a request down, and answer it."""
        asked = Asked(request.method, request.path, dict(request.query), dict(request.headers), await request.read())
        self.requests.append(asked)
        answer = self.reply(asked)
        if answer.silent:
            await asyncio.sleep(30)
        body = b"" if answer.response is None else json.dumps(answer.response).encode()
        return web.Response(
            status=answer.status, body=body, headers={"Content-Type": "application/json", **answer.headers}
        )


@contextlib.asynccontextmanager
async def recorded_service() -> AsyncIterator[RecordedService]:
    """Run one for as long as the context."""
    service = RecordedService()
    async with served(service):
        yield service


@contextlib.asynccontextmanager
async def served(service: RecordedService) -> AsyncIterator[None]:
    """Run this one for as long as the context."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    service.port = runner.addresses[0][1]
    try:
        yield
    finally:
        await runner.cleanup()
