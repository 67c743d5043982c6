"""The names by which handlers and middleware reach state: typed, and nowhere else."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import msgspec
from aiohttp import web

from gateway.conversations.attempts import Attempts
from gateway.conversations.chats import Chats
from gateway.conversations.responses import Responses
from gateway.conversations.turns import TurnRegistry
from gateway.letta.backend import AgentBackend
from gateway.letta.catalog import Catalog
from gateway.letta.local import LocalLetta
from gateway.letta.probe import Probe
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.storage.engine import Database
from gateway.tasks import TaskSet

Access = Literal["api", "open", "operator"]
"""Who may call a route: holders of an API key, everybody, or the operator and trusted networks."""


class RequestNotes(msgspec.Struct):
    """What handlers tell the log of a request: filled in as it becomes known; times are in seconds."""

    owner: str | None = None
    client: str | None = None
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

    async def idle(self) -> None:
        """Wait until none is."""
        ...


SETTINGS = web.AppKey("settings", Settings)
METRICS = web.AppKey("metrics", Metrics)
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
IS_OPERATOR: web.AppKey[Callable[[web.Request], bool]] = web.AppKey("is_operator")

REQUEST_ID = web.RequestKey("request_id", str)
NOTES = web.RequestKey("notes", RequestNotes)
RESPONSE_HEADERS = web.RequestKey("response_headers", dict[str, str])
"""Headers that go out with the answer, whoever makes it, streams included."""
BODY: web.RequestKey[JsonBody] = web.RequestKey("body")
