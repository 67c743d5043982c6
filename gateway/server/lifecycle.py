"""What lives as long as the application: each resource one context, opened and closed in the same function."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeAlias

import structlog
from aiohttp import web

from gateway import keys
from gateway.errors import GatewayError
from gateway.metrics import Metrics
from gateway.server.shared import Company

LAG_PERIOD: Final = 0.25
STOOD_STILL: Final = 1.0
"""Seconds after which a timer that is late is worth a line in the log: every stream has waited for as long."""
TASKS_CLOSE: Final = 2.0
SWEEP_PERIOD: Final = 30.0
PURGE_PERIOD: Final = 3_600.0
LOOK_PERIOD: Final = 2.0
"""Seconds between two looks at what other gateways of the database have changed."""
KEEP_RESPONSES: Final = 2_592_000.0
"""Seconds for which responses are stored: thirty days, as OpenAI does."""

Context: TypeAlias = Callable[[web.Application], AsyncIterator[None]]

_log: Final = structlog.get_logger("gateway.server")


async def backend_context(app: web.Application) -> AsyncIterator[None]:
    """Close the connections to Letta at the end."""
    yield
    await app[keys.BACKEND].close()


async def services_context(app: web.Application) -> AsyncIterator[None]:
    """Close the connections to those who know passwords and prices."""
    yield
    await app[keys.ACCOUNTS].close()


def closing_context(company: Company | None) -> Context:
    """Return what leaves the other gateways, where there are any, once nothing is done any more."""

    async def context(_: web.Application) -> AsyncIterator[None]:
        yield
        if company is not None:
            await company.close()

    return context


def company_context(company: Company | None) -> Context:
    """Return what tells the other gateways, where there are any, that this one is there."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        telling = None if company is None else app[keys.TASKS].spawn(company.run(), "tell replicas")
        yield
        if company is not None and telling is not None:
            telling.cancel()
            company.stop()

    return context


async def accounts_context(app: web.Application) -> AsyncIterator[None]:
    """Settle what dead gateways left behind before anything is served, and write down the last figures at the end."""
    await app[keys.ACCOUNTS].start()
    yield
    await app[keys.ACCOUNTS].end()


async def live_settings_context(app: web.Application) -> AsyncIterator[None]:
    """Have stored settings hold before anything is served; see what other gateways change while it is."""
    stored, sessions = app[keys.STORED_SETTINGS], app[keys.OPERATOR_SESSIONS]
    await stored.load()
    await sessions.load()
    looking = app[keys.TASKS].spawn(_look(app), "look at changes") if app[keys.DATABASE].is_shared else None
    yield
    if looking is not None:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking


async def _look(app: web.Application) -> None:
    while True:
        await asyncio.sleep(LOOK_PERIOD)
        try:
            await app[keys.STORED_SETTINGS].load()
            await app[keys.OPERATOR_SESSIONS].load()
            await app[keys.ACCOUNTS].look()
        except GatewayError as error:
            _log.debug("changes of other gateways not seen", code=error.code)


async def traffic_context(app: web.Application) -> AsyncIterator[None]:
    """Note the figures now and then, so that the operator sees rates."""
    task = app[keys.TASKS].spawn(app[keys.TRAFFIC].run(), "note figures")
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def tasks_context(app: web.Application) -> AsyncIterator[None]:
    """See background tasks done before the connections that they use are closed."""
    yield
    await app[keys.TASKS].close(TASKS_CLOSE)


async def loop_lag_context(app: web.Application) -> AsyncIterator[None]:
    """Measure how late timers fire while the application runs, and tell when they are very late."""
    task = app[keys.TASKS].spawn(_measure_lag(app[keys.METRICS]), "measure loop lag")
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def sweep_context(app: web.Application) -> AsyncIterator[None]:
    """Give up tool calls that waited too long, and forget what is old, while the application runs."""
    task = app[keys.TASKS].spawn(_sweep(app), "sweep")
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _sweep(app: web.Application) -> None:
    purge_at = 0.0
    while True:
        await asyncio.sleep(SWEEP_PERIOD)
        now = time.time()
        try:
            await app[keys.CHATS].sweep(now)
            await app[keys.ACCOUNTS].sweep(now)
            await app[keys.ATTEMPTS].sweep()
            if now >= purge_at:
                await app[keys.ATTEMPTS].purge(now)
                await app[keys.RESPONSES].purge(now - KEEP_RESPONSES)
                purge_at = now + PURGE_PERIOD
        except GatewayError as error:
            _log.warning("not swept", code=error.code)


async def _measure_lag(metrics: Metrics) -> None:
    now = asyncio.get_running_loop().time
    while True:
        due = now() + LAG_PERIOD
        await asyncio.sleep(LAG_PERIOD)
        late = max(0.0, now() - due)
        metrics.loop_lag.observe(late)
        if late >= STOOD_STILL:
            _log.warning("event loop stood still", seconds=round(late, 1))
