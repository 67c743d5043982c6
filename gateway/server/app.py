"""The composition root: the parts of a gateway, put together; tests pass their own."""

import msgspec
from aiohttp import web

from gateway import keys
from gateway.conversations.attempts import Attempts
from gateway.conversations.chats import ChatPolicy, Chats
from gateway.conversations.outcomes import Outcomes
from gateway.conversations.responses import Responses
from gateway.conversations.turns import TurnPolicy, TurnRegistry
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.backend import AgentBackend
from gateway.letta.catalog import Catalog
from gateway.letta.deadlines import Limits
from gateway.letta.detect import DetectedBackend, Kind, kind_at
from gateway.letta.local import LocalLetta
from gateway.letta.probe import Probe
from gateway.letta.rest import RestBackend, RestConfig
from gateway.metrics import Metrics
from gateway.server import cors
from gateway.server.accounts import Accounts
from gateway.server.client_address import TrustedNetworks
from gateway.server.descriptors import turns_that_fit
from gateway.server.drain import DrainSwitch
from gateway.server.edge import first_middleware, operator_rule, response_headers
from gateway.server.figures import watch
from gateway.server.lifecycle import (
    accounts_context,
    backend_context,
    closing_context,
    company_context,
    loop_lag_context,
    services_context,
    sweep_context,
    tasks_context,
)
from gateway.server.routes import OPERATIONS, ROUTES, add_routes
from gateway.server.shared import shared_state
from gateway.settings import LETTA_CLOUD, Settings
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from middleware.chain import build_chain


def build_app(
    settings: Settings,
    database: Database,
    *,
    backend: AgentBackend | None = None,
    metrics: Metrics | None = None,
    local: LocalLetta | None = None,
) -> web.Application:
    """Return the gateway as an application; raises ``SettingError`` for what cannot be built.

    Made inside a running event loop, as the connections to Letta belong to it; the database is the caller's to close.
    """
    chain = build_chain(settings)  # first: what may fail comes before what must be closed
    metrics, tasks = metrics or Metrics(), TaskSet()
    letta = backend or build_backend(settings, metrics, tasks)
    accounts = Accounts(settings, database, letta, tasks)
    shared = shared_state(
        settings, metrics, tasks, instance=accounts.instances.id, forwarding_key=accounts.forwarding_key
    )
    trusted = TrustedNetworks(settings.trusted_networks)
    app = web.Application(middlewares=[first_middleware(trusted, shared.forwarder), *chain])
    app[keys.SETTINGS] = settings
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
    app[keys.ATTEMPTS] = Attempts(Outcomes(database), tasks, shared.places)
    accounts.hand_over(app)
    watch(metrics, database, accounts.ledger)
    app[keys.TURNS] = turns = TurnRegistry(
        letta, accounts.ledger, turn_policy(settings), metrics, tasks, locks=shared.locks
    )
    app[keys.CHATS] = Chats(turns, letta, database, chat_policy(settings), tasks, places=shared.places)
    app[keys.LIMITS] = shared.limits
    app[keys.FORWARDER] = shared.forwarder
    app[keys.DRAIN] = DrainSwitch()
    app[keys.LOCAL] = local
    app[keys.IS_OPERATOR] = operator_rule(settings, trusted)
    add_routes(app, (*ROUTES, *cors.PREFLIGHT) if settings.cors_origins else ROUTES)
    app.on_response_prepare.append(response_headers(frozenset(settings.cors_origins)))
    app.cleanup_ctx.extend(
        [
            backend_context,
            services_context,
            closing_context(shared.company),
            tasks_context,
            loop_lag_context,
            accounts_context,
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
    app[keys.IS_OPERATOR] = lambda _: True
    add_routes(app, OPERATIONS)
    app.on_response_prepare.append(response_headers(frozenset()))
    return app


def build_backend(settings: Settings, metrics: Metrics, tasks: TaskSet) -> AgentBackend:
    """Return the backend for the Letta server that the settings name."""
    url, key = settings.letta_base_url, settings.letta_api_key or None

    def make(kind: Kind) -> AgentBackend:
        if kind == "app_server":
            config = AppServerConfig(
                url, key, _limits(settings), settings.server_tools, parked_timeout=settings.tool_wait
            )
            return AppServerBackend(config, metrics, tasks)
        return RestBackend(RestConfig(url, key, settings.letta_project or None, _limits(settings)), metrics, tasks)

    if url.startswith("ws"):
        return make("app_server")
    if url == LETTA_CLOUD:
        return make("rest")
    return DetectedBackend(lambda: kind_at(url, key, settings.connect_timeout), make, tasks)


def chat_policy(settings: Settings) -> ChatPolicy:
    """Return which conversations requests go to."""
    # A block is seen by all turns of its agent, and only this gateway's are known here: replicas put the text in words.
    has_replicas = bool(settings.redis_url)
    says_it = has_replicas and settings.system_prompts == "overlay"
    return ChatPolicy(
        conversation=settings.conversation,
        system_prompts="message" if says_it else settings.system_prompts,
        tool_activity=settings.tool_activity,
        tool_wait=settings.tool_wait,
        remembers=has_replicas or not settings.database_url,
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        connect=settings.connect_timeout,
        first_event=settings.first_event_timeout,
        silence=settings.silence_timeout,
        turn=settings.turn_timeout,
    )


def turn_policy(settings: Settings) -> TurnPolicy:
    """Return how turns are held."""
    return TurnPolicy(
        on_disconnect=settings.on_disconnect,
        queue_depth=settings.queue_depth,
        queue_wait=settings.queue_wait,
        max_turns=settings.max_turns or turns_that_fit(),
    )
