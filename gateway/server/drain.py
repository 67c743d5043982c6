"""The graceful end, in steps that lose nobody's request.

``/ready`` says so at once and answers ask for their connections to be closed, while who still comes is served. After a
few seconds, or when nobody comes any more, newcomers are turned away: but not while turns wait here for results of the
client's tools, which come as requests. Requests under way finish, and those on connections that are open; what is left
when the grace is over is ended in-band.
"""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Protocol

import structlog
from aiohttp import web

from gateway import keys
from gateway.letta.backend import AgentBackend

ACCEPTING: Final = 5.0
"""Seconds for which newcomers are served: balancers ask for readiness every one to two seconds."""
LOOK: Final = 0.1
"""Seconds between two looks for turns that wait for results."""
QUIET: Final = 0.25
"""Seconds without a request after which nobody is held to come any more."""
CROSSING: Final = 1.5
"""The same for requests on connections that are open: a balancer may keep them back for the second that it takes to
hear that the port is closed, and a request that crosses the closing of its connection is lost."""


class Door(Protocol):
    """Where clients come in."""

    @property
    def connections(self) -> int:
        """Return how many are open."""
        ...

    async def shut(self) -> None:
        """Let no newcomers in; who is connected stays."""
        ...


class DrainSwitch:
    """Whether the gateway is going away, and whether requests of the API are under way."""

    def __init__(self) -> None:
        self.draining = False
        self.requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._last = -math.inf

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as under way."""
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            self._last = time.monotonic()
            if not self.requests:
                self._idle.set()

    def is_quiet(self, seconds: float) -> bool:
        """Tell whether no request was under way for ``seconds``."""
        return not self.requests and time.monotonic() >= self._last + seconds

    async def quiet(self, seconds: float) -> None:
        """Wait until it is."""
        while not self.is_quiet(seconds):
            await self._idle.wait()
            await asyncio.sleep(max(0.0, self._last + seconds - time.monotonic()))


async def drain(app: web.Application, door: Door, grace: float) -> None:
    """Let requests and turns go on for ``grace`` seconds, then end them."""
    log = structlog.get_logger("gateway.server")
    turns, requests, forwarder, letta = app[keys.TURNS], app[keys.DRAIN], app[keys.FORWARDER], app[keys.BACKEND]
    begun = asyncio.get_running_loop().time()
    begin(app)
    log.info("draining", open_turns=turns.held, parked=letta.parked, requests=requests.requests, grace=grace)
    ending = min(ACCEPTING, grace / 2)
    try:
        async with asyncio.timeout(grace):
            with suppress(TimeoutError):
                async with asyncio.timeout(ending):
                    await _quiet(app, QUIET)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(begun + grace - ending):
                    await _nothing_parked(letta)
            if not requests.is_quiet(CROSSING if door.connections else QUIET):
                await door.shut()
                await _quiet(app, CROSSING)
    except TimeoutError:
        log.warning("time is up", open_turns=turns.held, requests=requests.requests)
    if letta.parked:
        log.warning("turns that wait for results are ended", parked=letta.parked)
    if forwarder is not None:
        forwarder.end()
    await turns.end()


async def _quiet(app: web.Application, seconds: float) -> None:
    requests, turns = app[keys.DRAIN], app[keys.TURNS]
    while turns.held or not requests.is_quiet(seconds):
        await requests.quiet(seconds)
        await turns.idle()


async def _nothing_parked(letta: AgentBackend) -> None:
    while letta.parked:  # noqa: ASYNC110 - they come and go where nobody tells, and this is seldom
        await asyncio.sleep(LOOK)


def begin(app: web.Application) -> None:
    """Turn readiness off, so that whoever balances the load looks elsewhere."""
    app[keys.DRAIN].draining = True
    app[keys.METRICS].draining.set(1)
