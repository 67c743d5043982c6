"""A gateway on a real socket inside the test's own event loop, with a scripted backend."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from gateway import keys
from gateway.letta.backend import Agent
from gateway.letta.embedded import EmbeddedLetta
from gateway.letta.local import LocalLetta
from gateway.letta.scripted import ScriptedBackend
from gateway.metrics import Metrics
from gateway.server.app import build_app
from gateway.server.listener import Listener
from gateway.server.routes import Route, add_routes
from gateway.settings import Settings
from gateway.tasks import TaskSet
from tests.server.wire import Answer, Connection, Headers, ask, connect, request
from tests.storage.late import late_database

FRIEND: Final = Agent("agent-00000000-0000-4000-8000-000000000001", "friend", 1_700_000_000)
JSON: Final = {"Content-Type": "application/json"}


def settings(**changes: Any) -> Settings:
    """Return settings that need no environment."""
    usual = {"letta_base_url": "http://letta.invalid", "port": 0, "secret_key": "a secret of the tests, 32 characters"}
    return Settings(**{**usual, **changes})


def chat_body(text: str = "Hi", *, model: str = "friend", **more: Any) -> bytes:
    """Return the body of a chat completion."""
    return msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": text}], **more})


def chat_request(text: str = "Hi", *, headers: dict[str, str] | None = None, **more: Any) -> bytes:
    """Return a whole request for a chat completion."""
    return request("POST", "/v1/chat/completions", {**JSON, **(headers or {})}, chat_body(text, **more))


def local_letta(*, model: str | None = None) -> LocalLetta:
    """Return a local Letta that was never started; with no model the scripted one answers."""
    child = EmbeddedLetta(Path("/nowhere"), {}, Metrics(), TaskSet())
    return LocalLetta(child, "Milo", model or "lmstudio/demo", is_scripted=model is None)


class Running:
    """A gateway that serves."""

    def __init__(self, app: web.Application, backend: ScriptedBackend, listener: Listener, host: str) -> None:
        self.app = app
        self.backend = backend
        self.listener = listener
        self.host = host

    @property
    def port(self) -> int:
        """Return where it listens."""
        return self.listener.port

    @property
    def metrics(self) -> Metrics:
        """Return its figures."""
        return self.app[keys.METRICS]

    def exposed(self) -> str:
        """Return its figures as Prometheus reads them."""
        return self.metrics.expose().decode()

    def connect(self) -> contextlib.AbstractAsyncContextManager[Connection]:
        """Open a connection to it."""
        return connect(self.port, self.host)

    async def ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b"", *, source: str | None = None
    ) -> Answer:
        """Send one request."""
        return await ask(self.port, method, target, headers, body, host=self.host, source=source)

    async def chat(self, text: str = "Hi", *, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        """Ask for one chat completion."""
        return await self.ask("POST", "/v1/chat/completions", {**JSON, **(headers or {})}, chat_body(text, **more))

    async def raw(self, data: bytes) -> Answer:
        """Send bytes and read an answer."""
        async with self.connect() as connection:
            await connection.send(data)
            return await connection.answer()


@contextlib.asynccontextmanager
async def serving(
    chosen: Settings | None = None,
    backend: ScriptedBackend | None = None,
    *,
    host: str = "127.0.0.1",
    local: LocalLetta | None = None,
) -> AsyncIterator[Running]:
    """Serve for as long as the context."""
    backend = backend or ScriptedBackend([FRIEND])
    async with late_database() as database:
        app = build_app(chosen or settings(), database, backend=backend, local=local)
        listener = Listener(app, host, 0)
        await listener.start()
        try:
            yield Running(app, backend, listener, host)
        finally:
            await listener.stop()


@contextlib.asynccontextmanager
async def one_route(handler: Handler) -> AsyncIterator[Callable[[], Awaitable[Answer]]]:
    """Serve one handler of the test's own behind a gateway's whole chain; the value asks it."""
    async with serving() as gateway:
        app = web.Application(middlewares=list(gateway.app.middlewares))
        app[keys.METRICS] = gateway.app[keys.METRICS]
        app[keys.DRAIN] = gateway.app[keys.DRAIN]
        app[keys.IS_OPERATOR] = gateway.app[keys.IS_OPERATOR]
        app.on_response_prepare.extend(gateway.app.on_response_prepare)
        add_routes(app, (Route("GET", "/fails", handler, "open"),))
        listener = Listener(app, "127.0.0.1", 0)
        await listener.start()
        try:
            yield lambda: ask(listener.port, "GET", "/fails")
        finally:
            await listener.stop()
