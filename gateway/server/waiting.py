"""The start while PostgreSQL is not there: the process lives, is not ready, answers 503, and tries until it is."""

import asyncio
from typing import Final

import msgspec
import structlog
from aiohttp import web

from gateway import keys
from gateway.accounts.operator_key import OperatorKey
from gateway.errors import StorageUnavailable
from gateway.letta.probe import Probe
from gateway.metrics import Metrics
from gateway.server import cors
from gateway.server.client_address import TrustedNetworks
from gateway.server.drain import DrainSwitch
from gateway.server.edge import first_middleware, operator_rule, response_headers
from gateway.server.routes import OPERATIONS, Route, add_routes
from gateway.settings import Settings
from gateway.storage.address import Address
from gateway.storage.engine import Database, StorageLimits
from gateway.storage.failures import StorageFailed
from gateway.tasks import TaskSet
from middleware.chain import build_chain

AGAIN: Final = 2.0
"""Seconds between two tries."""

_CHAIN: Final = ("request_id", "access_log", "metrics", "error_boundary", "body_guard", "auth")

_log: Final = structlog.get_logger("gateway.server")


async def opened(address: Address, limits: StorageLimits) -> Database:
    """Open the database, as often as it takes; raises ``StorageFailed`` for what does not pass by itself."""
    told = None
    while True:
        try:
            return await Database.open(address, limits)
        except StorageFailed as error:
            if not error.passes:
                raise
            if told != (told := str(error)):
                _log.warning("waiting for the database", reason=told, again_every=AGAIN)
        await asyncio.sleep(AGAIN)


def build_waiting_app(settings: Settings, metrics: Metrics, tasks: TaskSet) -> web.Application:
    """Return what answers until the database is open: operations, and 503 to whoever else asks."""
    chain = msgspec.structs.replace(settings, middleware=_CHAIN, middleware_config={})
    trusted = TrustedNetworks(settings.trusted_networks)
    app = web.Application(middlewares=[first_middleware(trusted), *build_chain(chain)])
    app[keys.SETTINGS] = settings
    app[keys.METRICS] = metrics
    app[keys.PROBES] = {"database": Probe(_unavailable, tasks)}
    app[keys.DRAIN] = DrainSwitch()
    app[keys.LOCAL] = None
    app[keys.IS_OPERATOR] = operator_rule(OperatorKey(settings.operator_key), trusted)
    preflight = cors.PREFLIGHT if settings.cors_origins else ()
    add_routes(app, (*OPERATIONS, *preflight, Route("*", "/{path:.*}", _refuse, "open")))
    app.on_response_prepare.append(response_headers(frozenset(settings.cors_origins)))
    app.on_response_prepare.append(_close)
    return app


async def _unavailable() -> None:
    raise StorageUnavailable


async def _refuse(request: web.Request) -> web.StreamResponse:
    _ = request
    error = StorageUnavailable()
    error.should_retry = True  # nothing was sent to anybody
    raise error


async def _close(request: web.Request, response: web.StreamResponse) -> None:
    """Keep no connection: the next request on it would meet the end of this application."""
    _ = request
    response.force_close()
