"""A Letta V1 server that plays what a test gives it: bytes of streams, such as the recorded ones, and its answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from aiohttp import web

AGENT: Final = {"id": "agent-00000000-0000-4000-8000-000000000001", "name": "friend"}
STREAM: Final = {"Content-Type": "text/event-stream"}


class PlayedLetta:
    """Plays ``streams`` in order, each for one turn; ``holds`` keeps the turn open after it, ``begins`` silent before,
    and ``answers`` the server silent to all that is asked.

    ``asked`` are the requests: method, path with query, body; ``cancelled`` the runs that were cancelled, ``live`` and
    ``most`` the turns under way, now and at most.
    """

    def __init__(self, *streams: bytes) -> None:
        self.streams = list(streams)
        self.holds = asyncio.Event()
        self.holds.set()
        self.begins = asyncio.Event()
        self.begins.set()
        self.answers = asyncio.Event()
        self.answers.set()
        self.agents: list[dict[str, Any]] = [AGENT]
        self.refuses: tuple[int, str] | None = None
        self.password = ""
        self.version = "0.16.8"
        self.is_hidden = False
        self.asked: list[tuple[str, str, Any]] = []
        self.cancelled: list[str] = []
        self.live = 0
        self.most = 0
        self.url = ""

    @property
    def turns(self) -> list[tuple[str, Any]]:
        """Return the paths and bodies of the turns."""
        return [(path, body) for method, path, body in self.asked if method == "POST" and "messages" in (body or {})]

    def paths(self, method: str) -> list[str]:
        """Return what was asked for by a method."""
        return [path for asked, path, _ in self.asked if asked == method]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer anything."""
        body: Any = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path_qs, body))
        await self.answers.wait()
        if self.is_hidden:
            return web.Response(status=404, text="There is nothing here (yet).")
        if request.path == "/v1/health/":
            return web.json_response({"version": self.version, "status": "ok"})
        if self.password and request.headers.get("Authorization") != f"Bearer {self.password}":
            return web.json_response({"detail": f"{request.headers.get('Authorization')} is wrong"}, status=401)
        if request.path.endswith("/cancel"):
            self.cancelled += body["run_ids"]
            return web.json_response({})
        if request.path == "/v1/agents/":
            return web.json_response(self._page(request))
        if request.path.endswith("/recompile"):
            return web.json_response("You are Milo.")
        if request.path == "/v1/conversations/":
            return web.json_response({"id": "conv-1"})
        if request.method == "DELETE":
            return web.json_response({})
        if self.refuses is not None:
            return web.Response(status=self.refuses[0], text=self.refuses[1])
        return await self._play(request)

    def _page(self, request: web.Request) -> list[dict[str, Any]]:
        named = [agent for agent in self.agents if request.query.get("name") in {None, agent["name"]}]
        ids = [agent["id"] for agent in named]
        start = ids.index(request.query["after"]) + 1 if "after" in request.query else 0
        return named[start : start + int(request.query["limit"])]

    async def _play(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        self.live += 1
        self.most = max(self.most, self.live)
        try:
            await self.begins.wait()
            await response.prepare(request)
            await response.write(self.streams.pop(0))
            await self.holds.wait()
        finally:
            self.live -= 1
        return response


@contextlib.asynccontextmanager
async def playing(*streams: bytes) -> AsyncIterator[PlayedLetta]:
    """Serve for as long as the context."""
    letta = PlayedLetta(*streams)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", letta.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        letta.url = f"http://{host}:{port}"
        yield letta
    finally:
        letta.holds.set()
        letta.begins.set()
        letta.answers.set()
        await runner.cleanup()
