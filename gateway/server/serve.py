"""The life of the process: listen, serve, and go when asked, gracefully the first time and at once the second."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import aiohttp.http_parser
import msgspec
import structlog
import uvloop
from aiohttp import web

from gateway import keys
from gateway.errors import GatewayError, StorageUnavailable
from gateway.letta.backend import AgentBackend
from gateway.letta.embedded import EmbeddedFailed
from gateway.letta.local import LocalLetta, running_local_letta
from gateway.metrics import Metrics
from gateway.server import descriptors, drain, logs, stacks
from gateway.server.accounts import account_secrets
from gateway.server.app import build_app, build_operations_app
from gateway.server.listener import RETIRING, Listener
from gateway.server.local_letta import local_config
from gateway.server.notify import ServiceManager
from gateway.server.waiting import build_waiting_app, opened
from gateway.settings import Origin, Settings, check_reachable
from gateway.storage.address import Address, PostgresServer, address_of
from gateway.storage.engine import Database, StorageLimits
from gateway.storage.failures import StorageFailed
from gateway.storage.opening import has_wal_reset_bug
from gateway.tasks import TaskSet
from middleware.chain import build_chain

PROBES: Final = 16
"""Connections to the metrics port: of what ``descriptors.RESERVE`` keeps."""
SOON: Final = 1.0
"""Seconds that PostgreSQL may take until it is waited for in public."""
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AFTER_GRACE: Final = 20.0
"""Seconds that the end may take once the grace is over: turns settled, connections closed, a local Letta ended."""

_log: Final = structlog.get_logger("gateway.server")
_ALLOCATIONS: Final = 2_000
"""After so many new objects more than went, the youngest are looked through."""


class StartFailed(Exception):
    """The gateway cannot start here; the message says why in one line."""


def run(settings: Settings, announce: Callable[[str], None], origins: Mapping[str, Origin] | None = None) -> None:
    """Serve until a signal ends it; ``announce`` gets the banner. Raises ``SettingError`` or ``StartFailed``.

    ``origins`` tell the operator where the settings came from.
    """
    if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
        raise StartFailed("aiohttp runs without its C parser: install a wheel of it, not a pure-Python build.")
    logs.configure(settings.environment, settings.log_level)
    descriptors.raise_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, announce, origins))


async def _serve(settings: Settings, announce: Callable[[str], None], origins: Mapping[str, Origin] | None) -> None:
    signals, metrics, tasks, manager = SignalCount(), Metrics(), TaskSet(), ServiceManager(os.environ)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(stacks.told_when_asked())
        stack.callback(manager.close)
        stack.push_async_callback(tasks.close, 1.0)
        local, address = None, _address(settings)
        # What is wrong with the settings is said before anything is started.
        check_reachable(settings)
        account_secrets(settings, is_shared=isinstance(address, PostgresServer))
        if not settings.letta_base_url:
            build_chain(settings)
            local = await _started_local(stack, settings, metrics, tasks, signals)
            if local is None:
                return
            settings = msgspec.structs.replace(settings, letta_base_url=local.url, letta_api_key=local.child.token)
        doors = Doors(settings)
        stack.push_async_callback(doors.close)

        async def wait() -> None:
            await doors.open_for_now(build_waiting_app(settings, metrics, tasks))
            manager.starting("Waiting for the database")

        limits = StorageLimits(connections=settings.database_connections)
        database = await _opened(address, limits, tasks, signals, wait)
        if database is None:
            return
        stack.push_async_callback(database.close)
        app = build_app(settings, database, metrics=metrics, local=local, origins=origins)
        await _listen(app, doors, signals, manager, announce)


def _address(settings: Settings) -> Address:
    try:
        return address_of(settings.database_url, Path(settings.home))
    except StorageFailed as error:
        raise StartFailed(str(error)) from None


async def _opened(
    address: Address,
    limits: StorageLimits,
    tasks: TaskSet,
    signals: "SignalCount",
    wait: Callable[[], Awaitable[None]],
) -> Database | None:
    """Open the database; ``wait`` is called where PostgreSQL is not there soon. None where a signal came first."""
    opening = tasks.spawn(_tried(address, limits), "open database")
    interrupted = tasks.spawn(signals.first.wait(), "first signal")
    # A file is there soon or not at all, and who opens one that another gateway has is not to be in its way.
    watched = {opening, interrupted} if isinstance(address, PostgresServer) else {opening}
    try:
        done, _ = await asyncio.wait(watched, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
        if not done and interrupted in watched:
            await wait()
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (opening, interrupted):
            task.cancel()
        await asyncio.wait({opening, interrupted})
    if opening.cancelled():
        return None
    database = opening.result()
    if isinstance(database, StorageFailed):
        raise StartFailed(str(database))
    return database


async def _tried(address: Address, limits: StorageLimits) -> Database | StorageFailed:
    try:
        return await opened(address, limits)
    except StorageFailed as error:
        return error


async def _started_local(
    stack: contextlib.AsyncExitStack, settings: Settings, metrics: Metrics, tasks: TaskSet, signals: "SignalCount"
) -> LocalLetta | None:
    """Start a local Letta that ends with the stack; None where a signal came first."""
    starting = tasks.spawn(_entered(stack, settings, metrics, tasks), "start local letta")
    interrupted = tasks.spawn(signals.first.wait(), "first signal")
    await asyncio.wait({starting, interrupted}, return_when=asyncio.FIRST_COMPLETED)
    interrupted.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return None
    local = starting.result()
    if isinstance(local, EmbeddedFailed):
        raise StartFailed(str(local))
    return local


async def _entered(
    stack: contextlib.AsyncExitStack, settings: Settings, metrics: Metrics, tasks: TaskSet
) -> LocalLetta | EmbeddedFailed:
    try:
        return await stack.enter_async_context(running_local_letta(local_config(settings), metrics, tasks))
    except EmbeddedFailed as error:
        return error


def _spare_the_collector() -> None:
    """Have garbage looked for seldom: a request leaves none behind that does not go by itself.

    What is loaded by now stays: it need not be walked again while streams wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, *gc.get_threshold()[1:])


class Doors:
    """The ports: the clients', and behind it the one for figures, where there is one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._listeners: list[Listener] = []

    @property
    def clients(self) -> Listener:
        """Return the clients' port, once it is open."""
        return self._listeners[0]

    async def open_for_now(self, app: web.Application) -> None:
        """Have an application answer until ``open``, on ports that are this gateway's own; raises ``StartFailed``."""
        self._make(app)
        for listener in self._listeners:
            await _reached(listener, listener.start_alone())

    async def open(self, app: web.Application) -> None:
        """Have an application answer from now on; raises ``StartFailed``."""
        if self._listeners:
            for listener, its_app in zip(self._listeners, self._apps(app), strict=True):
                await _reached(listener, listener.hand_over(its_app))
            return
        self._make(app)
        for listener in self._listeners:
            await _reached(listener, listener.start())

    async def close(self) -> None:
        """Take no more connections, end those that are open, and close the application."""
        while self._listeners:
            await self._listeners.pop(0).stop()

    def _make(self, app: web.Application) -> None:
        chosen = self._settings
        clients, *figures = self._apps(app)
        self._listeners = [
            Listener(clients, chosen.host, chosen.port, stalled=chosen.write_timeout, shared_port=chosen.shared_port),
            *(Listener(its_app, chosen.host, chosen.metrics_port, most=PROBES) for its_app in figures),
        ]

    def _apps(self, app: web.Application) -> list[web.Application]:
        return [app, build_operations_app(app)] if self._settings.metrics_port else [app]


async def _reached(listener: Listener, starting: Awaitable[None]) -> None:
    try:
        await starting
    except OSError as error:
        raise StartFailed(f"cannot listen on {listener.address}: {error.strerror or error}.") from None
    except StorageUnavailable as error:
        raise StartFailed(f"the database does not answer ({error.reason}): look after it, then start again.") from None


async def _listen(
    app: web.Application, doors: Doors, signals: "SignalCount", manager: ServiceManager, announce: Callable[[str], None]
) -> None:
    settings = app[keys.SETTINGS]
    try:
        await doors.open(app)
        port = doors.clients.port
        await _check_kind(settings, app[keys.BACKEND])
        _spare_the_collector()
        announce(banner(settings, port, app[keys.LOCAL]))
        app[keys.TASKS].spawn(_clean_up(app[keys.BACKEND]), "clean up letta")
        _warn_of_sqlite(app[keys.DATABASE])
        _log.info("serving", host=settings.host, port=port)
        manager.ready(f"Serving {settings.host}, port {port}")
        await signals.first.wait()
        manager.stopping(
            2 * RETIRING + settings.grace + AFTER_GRACE, f"Draining: open turns have {settings.grace:g} s to finish"
        )
        ending = app[keys.TASKS].spawn(_drained(app, doors.clients, settings.grace), "drain")
        hurry = app[keys.TASKS].spawn(signals.second.wait(), "second signal")
        await asyncio.wait({ending, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not ending.done():
            ending.cancel()
            await app[keys.TURNS].end()
    finally:
        await doors.close()
    _log.info("stopped")


async def _drained(app: web.Application, listener: Listener, grace: float) -> None:
    drain.begin(app)
    await listener.retire()  # before turns are ended: who is already connected is to be answered
    await drain.drain(app, listener, grace)


async def _check_kind(settings: Settings, backend: AgentBackend) -> None:
    """Refuse what this kind of Letta cannot do; where it does not answer yet, making an agent is refused later."""
    if settings.billing != "litellm":
        return
    try:
        await backend.ping()
    except GatewayError as error:
        _log.warning("letta does not answer: whether it can bill by litellm is not known yet", code=error.code)
        return
    if not backend.capabilities.providers:
        raise StartFailed(
            "LETTA_GATEWAY_BILLING=litellm needs a Letta V1 server, as agents of an App Server have no provider of "
            "their own: set it to local, or LETTA_BASE_URL to another server."
        )


def _warn_of_sqlite(database: Database) -> None:
    """Say once that no other program should write to the database; nothing is refused, as the gateway alone is safe."""
    if not database.is_shared and has_wal_reset_bug():
        _log.warning("this SQLite has the WAL-reset bug: let no other program write to gateway.db while it is in use")


async def _clean_up(backend: AgentBackend) -> None:
    """Remove what a gateway that was killed left on Letta, if that answers."""
    try:
        await backend.clean_up()
    except GatewayError as error:
        _log.debug("letta not cleaned up", code=error.code)


class SignalCount:
    """The signals that ask the process to go: the first politely, the second at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._got)

    def _got(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()


def banner(settings: Settings, port: int, local: LocalLetta | None = None) -> str:
    """Say where the gateway is, who answers, and how to try it."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}/v1"
    key = ' -H "Authorization: Bearer $API_KEY"' if settings.api_keys else ""
    lines = [f"Letta Gateway serves {url} (Letta at {settings.letta_base_url})"]
    if local is None:
        lines.append(f"  agents:  curl {url}/models{key}")
    else:
        hello = (
            f'{{"model": "{local.agent}", "stream": true, "messages": [{{"role": "user", "content": "Hello there"}}]}}'
        )
        lines += [
            f"  agent:   {local.agent}, on this machine: {local.note}",
            f"  try it:  curl -N {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{hello}'",
        ]
    if not settings.api_keys:
        lines.append("  no API key is set: only this machine is served")
    return "\n".join(lines)
