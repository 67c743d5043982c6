"""The names by which handlers and middleware reach state: typed, and nowhere else."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Final, Literal, Protocol, TypeAlias

import msgspec
from aiohttp import web

from gateway.accounts import credentials, operator_sessions, user_keys
from gateway.accounts.agents import PersonalAgents
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.blocking import Blocking
from gateway.accounts.export import Export
from gateway.accounts.history import History
from gateway.accounts.identity.protocol import IdentityProvider
from gateway.accounts.operator_key import OperatorKey
from gateway.accounts.operator_sessions import OperatorSession, OperatorSessions
from gateway.accounts.own_agents import OwnAgents
from gateway.accounts.profiles import Profiles
from gateway.accounts.registration import Registration
from gateway.accounts.usage import UsageReports
from gateway.accounts.user_keys import UserKeys
from gateway.conversations.attempts import Attempts
from gateway.conversations.chats import Chats
from gateway.conversations.responses import Responses
from gateway.conversations.turns import TurnRegistry
from gateway.errors import HeldElsewhere
from gateway.letta.backend import AgentBackend
from gateway.letta.catalog import Catalog
from gateway.letta.local import LocalLetta
from gateway.letta.probe import Probe
from gateway.live_settings.current import LiveSettings
from gateway.live_settings.stored import StoredSettings
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.shared_state.limits import RequestLimits
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from gateway.ui.recent_errors import RecentErrors
from gateway.ui.traffic import Traffic

OPERATOR_COOKIE: Final = operator_sessions.COOKIE
PERSONAL_KEY: Final = user_keys.PREFIX
"""What users' personal keys begin with."""
Access = Literal["api", "open", "operator", "user", "admin", "page"]
"""Who may call a route: holders of an API key, everybody, the operator and trusted networks, users by an access token,
the operator by the operator key alone, or the operator's page by its session."""


Caller: TypeAlias = credentials.Caller
"""Who asks, by the credential alone."""


class Credentials(Protocol):
    """Who knows the users' credentials."""

    async def caller_of_key(self, key: str) -> Caller | None:
        """Return whose personal key this is; None where it is nobody's. Raises ``StorageUnavailable``."""
        ...

    async def caller_of_token(self, token: str) -> Caller:
        """Return whose access token this is; raises a 401 of the tree, or ``StorageUnavailable``."""
        ...

    def forget(self, user_id: str) -> None:
        """Look at a user again before the next answer: something of theirs was changed or deleted."""
        ...


class Accounts(Protocol):
    """What is done about users beside requests."""

    async def start(self) -> None:
        """Settle what gateways that are no more left behind; raises ``StorageUnavailable``."""
        ...

    async def look(self) -> None:
        """See what other gateways want ended; raises ``StorageUnavailable``."""
        ...

    async def sweep(self, now: float) -> None:
        """Do what is done now and then; ``now`` is in UTC seconds. Raises ``StorageUnavailable``."""
        ...

    async def end(self) -> None:
        """Write down what is not written yet, once no turn is held."""
        ...

    async def close(self) -> None:
        """Close the connections to other services."""
        ...


class RequestNotes(msgspec.Struct):
    """What handlers tell the log of a request: filled in as it becomes known; times are in seconds."""

    owner: str | None = None
    client: str | None = None
    is_forwarded: bool | None = None
    """Whether another gateway took the request, and handed it on to this one."""
    model: str | None = None
    outcome: str | None = None
    error_code: str | None = None
    first_token: float | None = None
    chunks: int | None = None


class JsonBody(Protocol):
    """A request's body: read once, within its limits, known to be one JSON object's text."""

    async def read(self) -> bytes:
        """Return the body; raises ``InvalidRequest``, ``PayloadTooLarge`` or ``RequestTimeout``."""
        ...


class Drain(Protocol):
    """Whether the gateway is going away, and which requests of the API are under way."""

    draining: bool
    requests: int

    def request(self) -> AbstractContextManager[None]:
        """Count a request as under way."""
        ...

    def is_quiet(self, seconds: float) -> bool:
        """Tell whether none was under way for ``seconds``."""
        ...

    async def quiet(self, seconds: float) -> None:
        """Wait until it is."""
        ...


class Forwarder(Protocol):
    """Hands requests on to the gateway that has what they are about."""

    async def forward(self, request: web.Request, error: HeldElsewhere) -> web.StreamResponse | None:
        """Answer with what the other gateway answers; None where that is no more, and the request was not heard."""
        ...

    def end(self) -> None:
        """End what is being handed on."""
        ...


SETTINGS = web.AppKey("settings", Settings)
LIVE = web.AppKey("live", LiveSettings)
"""The settings that can change, as they are now; ``SETTINGS`` is what was configured."""
STORED_SETTINGS = web.AppKey("stored_settings", StoredSettings)
METRICS = web.AppKey("metrics", Metrics)
RECENT_ERRORS = web.AppKey("recent_errors", RecentErrors)
TRAFFIC = web.AppKey("traffic", Traffic)
TASKS = web.AppKey("tasks", TaskSet)
BACKEND: web.AppKey[AgentBackend] = web.AppKey("backend")
PROBES: web.AppKey[dict[str, Probe]] = web.AppKey("probes")
CATALOG = web.AppKey("catalog", Catalog)
DATABASE = web.AppKey("database", Database)
ATTEMPTS = web.AppKey("attempts", Attempts)
RESPONSES = web.AppKey("responses", Responses)
CHATS = web.AppKey("chats", Chats)
TURNS = web.AppKey("turns", TurnRegistry)
DRAIN: web.AppKey[Drain] = web.AppKey("drain")
LOCAL: web.AppKey[LocalLetta | None] = web.AppKey("local")
ACCESS: web.AppKey[Callable[[web.Request], Access]] = web.AppKey("access")
LIMITS: web.AppKey[RequestLimits] = web.AppKey("limits")
FORWARDER: web.AppKey[Forwarder | None] = web.AppKey("forwarder")
IS_OPERATOR: web.AppKey[Callable[[web.Request], Awaitable[bool]]] = web.AppKey("is_operator")

CREDENTIALS: web.AppKey[Credentials] = web.AppKey("credentials")
IDENTITY: web.AppKey[IdentityProvider] = web.AppKey("identity")
BILLING: web.AppKey[Billing] = web.AppKey("billing")
BLOCKING = web.AppKey("blocking", Blocking)
PROFILES = web.AppKey("profiles", Profiles)
REGISTRATION = web.AppKey("registration", Registration)
PERSONAL_AGENTS = web.AppKey("personal_agents", PersonalAgents)
OPERATOR_KEY = web.AppKey("operator_key", OperatorKey)
OPERATOR_SESSIONS = web.AppKey("operator_sessions", OperatorSessions)
OWN_AGENTS = web.AppKey("own_agents", OwnAgents)
HISTORY = web.AppKey("history", History)
EXPORT = web.AppKey("export", Export)
USAGE = web.AppKey("usage", UsageReports)
USER_KEYS = web.AppKey("user_keys", UserKeys)
ACCOUNTS: web.AppKey[Accounts] = web.AppKey("accounts")

REQUEST_ID = web.RequestKey("request_id", str)
NOTES = web.RequestKey("notes", RequestNotes)
CALLER = web.RequestKey("caller", Caller)
ACCESS_TOKEN = web.RequestKey("access_token", str)
"""By what a user came in, for the identity service's own ear."""
OPERATOR_SESSION = web.RequestKey("operator_session", OperatorSession)
RESPONSE_HEADERS = web.RequestKey("response_headers", dict[str, str])
"""Headers that go out with the answer, whoever makes it, streams included."""
BODY: web.RequestKey[JsonBody] = web.RequestKey("body")
