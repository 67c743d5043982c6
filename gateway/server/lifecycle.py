"""What lives as long as the application: each resource one context, opened and closed in the same function."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from gateway import keys
from gateway.metrics import Metrics

LAG_PERIOD: Final = 0.25
TASKS_CLOSE: Final = 2.0


async def backend_context(app: web.Application) -> AsyncIterator[None]:
    """Close the connections to Letta at the end."""
    yield
    await app[keys.BACKEND].close()


async def tasks_context(app: web.Application) -> AsyncIterator[None]:
    """See background tasks done before the connections that they use are closed."""
    yield
    await app[keys.TASKS].close(TASKS_CLOSE)


async def loop_lag_context(app: web.Application) -> AsyncIterator[None]:
    """Measure how late timers fire while the application runs."""
    task = app[keys.TASKS].spawn(_measure_lag(app[keys.METRICS]), "measure loop lag")
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _measure_lag(metrics: Metrics) -> None:
    now = asyncio.get_running_loop().time
    while True:
        due = now() + LAG_PERIOD
        await asyncio.sleep(LAG_PERIOD)
        metrics.loop_lag.observe(max(0.0, now() - due))
