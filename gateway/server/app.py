"""The composition root: the parts of a gateway, put together; tests pass their own."""

import uuid
from collections.abc import Mapping

import msgspec
from aiohttp import web

from gateway import keys
from gateway.conversations.attempts import Attempts
from gateway.conversations.chats import Chats
from gateway.conversations.outcomes import Outcomes
from gateway.conversations.responses import Responses
from gateway.conversations.turns import TurnRegistry
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.backend import AgentBackend
from gateway.letta.catalog import Catalog
from gateway.letta.deadlines import Limits
from gateway.letta.detect import DetectedBackend, Kind, kind_at
from gateway.letta.local import LocalLetta
from gateway.letta.probe import Probe
from gateway.letta.rest import RestBackend, RestConfig
from gateway.live_settings.current import LiveSettings
from gateway.live_settings.stored import StoredSettings
from gateway.metrics import Metrics
from gateway.server import cors, logs
from gateway.server.accounts import Accounts, account_secrets
from gateway.server.client_address import TrustedNetworks
from gateway.server.drain import DrainSwitch
from gateway.server.edge import first_middleware, operator_rule, response_headers
from gateway.server.figures import watch
from gateway.server.lifecycle import (
    accounts_context,
    backend_context,
    closing_context,
    company_context,
    live_settings_context,
    loop_lag_context,
    services_context,
    sweep_context,
    tasks_context,
    traffic_context,
)
from gateway.server.live import LiveChatPolicy, LiveServerTools, LiveTurnPolicy
from gateway.server.routes import OPERATIONS, PAGE, ROUTES, add_routes
from gateway.server.shared import shared_state
from gateway.settings import LETTA_CLOUD, Origin, Settings
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from gateway.ui.recent_errors import RecentErrors
from gateway.ui.traffic import Traffic
from middleware.chain import build_chain


def build_app(
    settings: Settings,
    database: Database,
    *,
    backend: AgentBackend | None = None,
    metrics: Metrics | None = None,
    local: LocalLetta | None = None,
    origins: Mapping[str, Origin] | None = None,
) -> web.Application:
    """Return the gateway as an application; raises ``SettingError`` for what cannot be built.

    Made inside a running event loop, as the connections to Letta belong to it; the database is the caller's to close.
    ``origins`` tell the operator where the settings came from.
    """
    chain = build_chain(settings)  # first: what may fail comes before what must be closed
    metrics, tasks = metrics or Metrics(), TaskSet()
    live = LiveSettings(settings, origins)
    letta = backend or build_backend(settings, metrics, tasks, server_tools=LiveServerTools(live))
    instance, secrets = str(uuid.uuid4()), account_secrets(settings, is_shared=database.is_shared)
    shared = shared_state(live, metrics, tasks, instance=instance, forwarding_key=secrets.forwarding_key)
    accounts = Accounts(live, database, letta, tasks, instance=instance, tally=shared.tally, open_turns=lambda: turns)
    trusted = TrustedNetworks(settings.trusted_networks)
    errors = RecentErrors()
    app = web.Application(middlewares=[first_middleware(trusted, shared.forwarder, errors), *chain])
    app[keys.SETTINGS] = settings
    app[keys.LIVE] = live
    app[keys.STORED_SETTINGS] = StoredSettings(live, database)
    app[keys.RECENT_ERRORS] = errors
    app[keys.TRAFFIC] = Traffic(metrics)
    live.on_change(lambda now: logs.set_level(now.log_level))
    app[keys.METRICS] = metrics
    app[keys.TASKS] = tasks
    app[keys.BACKEND] = letta
    app[keys.PROBES] = {
        "letta": Probe(letta.ping, tasks),
        "database": Probe(database.ping, tasks),
        **shared.probes(tasks),
    }
    app[keys.CATALOG] = Catalog(letta, tasks, settings.models_ttl)
    app[keys.DATABASE] = database
    app[keys.RESPONSES] = Responses(database)
    app[keys.ATTEMPTS] = Attempts(Outcomes(database, tasks), tasks, shared.places)
    accounts.hand_over(app)
    watch(metrics, database, accounts.ledger)
    app[keys.TURNS] = turns = TurnRegistry(
        letta, accounts.ledger, LiveTurnPolicy(live), metrics, tasks, locks=shared.locks
    )
    app[keys.CHATS] = Chats(turns, letta, database, LiveChatPolicy(live), tasks, places=shared.places)
    app[keys.LIMITS] = shared.limits
    app[keys.FORWARDER] = shared.forwarder
    app[keys.DRAIN] = DrainSwitch()
    app[keys.LOCAL] = local
    app[keys.IS_OPERATOR] = operator_rule(accounts.operator_key, trusted)
    add_routes(app, (*ROUTES, *PAGE, *(cors.PREFLIGHT if settings.cors_origins else ())))
    app.on_response_prepare.append(response_headers(frozenset(settings.cors_origins)))
    app.cleanup_ctx.extend(
        [
            backend_context,
            services_context,
            closing_context(shared.company),
            tasks_context,
            loop_lag_context,
            accounts_context,
            live_settings_context,
            traffic_context,
            sweep_context,
            company_context(shared.company),
        ]
    )
    return app


def build_operations_app(main: web.Application) -> web.Application:
    """Return the application of the metrics port: operations alone, open to whoever reaches the port."""
    chain = msgspec.structs.replace(
        main[keys.SETTINGS], middleware=("request_id", "error_boundary", "body_guard", "auth"), middleware_config={}
    )
    app = web.Application(middlewares=[first_middleware(TrustedNetworks(())), *build_chain(chain)])
    app[keys.METRICS] = main[keys.METRICS]
    app[keys.PROBES] = main[keys.PROBES]
    app[keys.DRAIN] = main[keys.DRAIN]
    app[keys.LOCAL] = main[keys.LOCAL]
    app[keys.IS_OPERATOR] = _anybody
    add_routes(app, OPERATIONS)
    app.on_response_prepare.append(response_headers(frozenset()))
    return app


async def _anybody(request: web.Request) -> bool:
    _ = request
    return True


def build_backend(
    settings: Settings, metrics: Metrics, tasks: TaskSet, *, server_tools: Mapping[str, tuple[str, ...]] | None = None
) -> AgentBackend:
    """Return the backend for the Letta server that the settings name.

    ``server_tools`` takes the place of the settings' own, where they may change.
    """
    tools = settings.server_tools if server_tools is None else server_tools
    url, key = settings.letta_base_url, settings.letta_api_key or None

    def make(kind: Kind) -> AgentBackend:
        if kind == "app_server":
            config = AppServerConfig(url, key, _limits(settings), tools, parked_timeout=settings.tool_wait)
            return AppServerBackend(config, metrics, tasks)
        return RestBackend(RestConfig(url, key, settings.letta_project or None, _limits(settings)), metrics, tasks)

    if url.startswith("ws"):
        return make("app_server")
    if url == LETTA_CLOUD:
        return make("rest")
    return DetectedBackend(lambda: kind_at(url, key, settings.connect_timeout), make, tasks)


def _limits(settings: Settings) -> Limits:
    return Limits(
        connect=settings.connect_timeout,
        first_event=settings.first_event_timeout,
        silence=settings.silence_timeout,
        turn=settings.turn_timeout,
    )
