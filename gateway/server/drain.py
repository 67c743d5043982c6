"""The graceful end: first ``/ready`` says so, then requests under way finish, then what is left is ended in-band."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from aiohttp import web

from gateway import keys


class DrainSwitch:
    """Whether the gateway is going away, and whether requests of the API are under way."""

    def __init__(self) -> None:
        self.draining = False
        self.requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as under way."""
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._idle.wait()


async def drain(app: web.Application, grace: float) -> None:
    """Let requests and turns go on for ``grace`` seconds, then end them; new ones are served until then."""
    log = structlog.get_logger("gateway.server")
    turns, requests = app[keys.TURNS], app[keys.DRAIN]
    begin(app)
    log.info("draining", open_turns=turns.held, requests=requests.requests, grace=grace)
    try:
        async with asyncio.timeout(grace):
            await requests.idle()
            await turns.idle()
    except TimeoutError:
        log.warning("time is up", open_turns=turns.held, requests=requests.requests)
    await turns.end()


def begin(app: web.Application) -> None:
    """Turn readiness off, so that whoever balances the load looks elsewhere."""
    app[keys.DRAIN].draining = True
    app[keys.METRICS].draining.set(1)
