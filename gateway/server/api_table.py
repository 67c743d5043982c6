"""What each route takes and answers: one row each, from which its description is made."""

from typing import Final, TypeAlias

import msgspec

from gateway.accounts.answers import (
    AdminUser,
    AdminUserPage,
    AgentStatus,
    ConfirmationAnswer,
    KeysAnswer,
    MemoryAnswer,
    MemoryBlockAnswer,
    NewKeyAnswer,
    SessionAnswer,
    UserAnswer,
)
from gateway.accounts.usage_answers import AllUsageAnswer, UsageAnswer
from gateway.errors import ErrorEnvelope
from gateway.handlers.operations import Readiness
from gateway.handlers.platform_admin import GivenPassword, NewUserAccount, UserChange, UserSearch
from gateway.handlers.platform_agent import MemoryChange
from gateway.handlers.platform_auth import Login, Logout, NewAccount, PasswordChange, Refresh
from gateway.handlers.platform_chat import HistoryQuery
from gateway.handlers.platform_usage import UsageDays
from gateway.handlers.platform_user import NewKey, ProfileChange
from gateway.translation.openai_types import ChatCompletion, ChatCompletionRequest, Model, ModelList
from gateway.translation.platform_types import (
    ChatAnswer,
    ChatRequest,
    Done,
    HistoryPage,
    Piece,
    Started,
    TokenCounts,
    ToolActivity,
)
from gateway.translation.responses_types import (
    DeletedResponse,
    InputItemList,
    InputItemsQuery,
    Response,
    ResponseQuery,
    ResponsesRequest,
)

Kind: TypeAlias = type[msgspec.Struct]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a route takes and answers.

    ``gives`` are answers by their status, None for those without a body; ``media`` is the type of what is no JSON, and
    ``streams`` tells that events may come instead: ``events`` are their names with their data, where they have names.
    ``headers`` are those that mean something, with what they mean.
    """

    gives: dict[int, Kind | None]
    takes: Kind | None = None
    is_body_needed: bool = True
    query: Kind | None = None
    media: str = "application/json"
    streams: bool = False
    events: dict[str, Kind] = {}
    headers: dict[str, str] = {}


class Alive(msgspec.Struct, frozen=True):
    """That the process is alive."""

    status: str


class KeySet(msgspec.Struct, frozen=True):
    """Public keys (RFC 7517)."""

    keys: tuple[msgspec.Raw, ...]


class Document(msgspec.Struct, frozen=True):
    """The description itself."""

    openapi: str
    info: msgspec.Raw
    paths: msgspec.Raw


class Everything(msgspec.Struct, frozen=True):
    """Everything that is kept of a user."""

    user: UserAnswer
    memory: tuple[MemoryBlockAnswer, ...]
    keys: tuple[msgspec.Raw, ...]
    usage: tuple[msgspec.Raw, ...]
    messages: tuple[msgspec.Raw, ...]
    responses: tuple[msgspec.Raw, ...]


_ONCE: Final = {
    "Idempotency-Key": "What the request is known by when it is sent again within a day: the agent hears it once."
}
_CHAT: Final = {
    **_ONCE,
    "X-Letta-Chat-Key": "The name of the chat, which has a conversation of its own.",
    "X-OpenWebUI-Chat-Id": "The same, as Open WebUI sends it.",
}
_EVENTS: Final[dict[str, Kind]] = {
    "start": Started,
    "reasoning": Piece,
    "text": Piece,
    "tool": ToolActivity,
    "usage": TokenCounts,
    "done": Done,
    "error": ErrorEnvelope,
}

_RESPONSE: Final = Shape(gives={200: Response})
_USER: Final = Shape(gives={200: AdminUser})
_GONE: Final = Shape(gives={204: None})

SHAPES: Final[dict[tuple[str, str], Shape]] = {
    ("GET", "/health"): Shape(gives={200: Alive}),
    ("GET", "/ready"): Shape(gives={200: Readiness, 503: Readiness}),
    ("GET", "/metrics"): Shape(gives={200: None}, media="text/plain"),
    ("GET", "/v1/models"): Shape(gives={200: ModelList}),
    ("GET", "/v1/models/{model}"): Shape(gives={200: Model}),
    ("POST", "/v1/chat/completions"): Shape(
        gives={200: ChatCompletion}, takes=ChatCompletionRequest, streams=True, headers=_CHAT
    ),
    ("POST", "/v1/responses"): Shape(gives={200: Response}, takes=ResponsesRequest, streams=True, headers=_CHAT),
    ("GET", "/v1/responses/{response}"): Shape(gives={200: Response}, query=ResponseQuery),
    ("DELETE", "/v1/responses/{response}"): Shape(gives={200: DeletedResponse}),
    ("GET", "/v1/responses/{response}/input_items"): Shape(gives={200: InputItemList}, query=InputItemsQuery),
    ("POST", "/v1/responses/{response}/cancel"): _RESPONSE,
    ("GET", "/.well-known/jwks.json"): Shape(gives={200: KeySet}),
    ("GET", "/api/v1/openapi.json"): Shape(gives={200: Document}),
    ("POST", "/api/v1/auth/register"): Shape(gives={201: SessionAnswer, 202: ConfirmationAnswer}, takes=NewAccount),
    ("POST", "/api/v1/auth/login"): Shape(gives={200: SessionAnswer}, takes=Login),
    ("POST", "/api/v1/auth/refresh"): Shape(gives={200: SessionAnswer}, takes=Refresh),
    ("POST", "/api/v1/auth/logout"): Shape(gives={204: None}, takes=Logout, is_body_needed=False),
    ("POST", "/api/v1/auth/password"): Shape(gives={200: SessionAnswer}, takes=PasswordChange),
    ("GET", "/api/v1/auth/me"): Shape(gives={200: UserAnswer}),
    ("POST", "/api/v1/chat/message"): Shape(
        gives={200: ChatAnswer}, takes=ChatRequest, streams=True, events=_EVENTS, headers=_ONCE
    ),
    ("GET", "/api/v1/chat/history"): Shape(gives={200: HistoryPage}, query=HistoryQuery),
    ("DELETE", "/api/v1/chat/history"): _GONE,
    ("GET", "/api/v1/agent/status"): Shape(gives={200: AgentStatus}),
    ("GET", "/api/v1/agent/memory"): Shape(gives={200: MemoryAnswer}),
    ("PATCH", "/api/v1/agent/memory/{label}"): Shape(gives={200: MemoryBlockAnswer}, takes=MemoryChange),
    ("POST", "/api/v1/agent/reset"): Shape(gives={200: AgentStatus}),
    ("GET", "/api/v1/user/profile"): Shape(gives={200: UserAnswer}),
    ("PATCH", "/api/v1/user/profile"): Shape(gives={200: UserAnswer}, takes=ProfileChange),
    ("GET", "/api/v1/user/usage"): Shape(gives={200: UsageAnswer}, query=UsageDays),
    ("GET", "/api/v1/user/export"): Shape(gives={200: Everything}),
    ("DELETE", "/api/v1/user"): _GONE,
    ("GET", "/api/v1/user/keys"): Shape(gives={200: KeysAnswer}),
    ("POST", "/api/v1/user/keys"): Shape(gives={201: NewKeyAnswer}, takes=NewKey),
    ("DELETE", "/api/v1/user/keys/{key}"): _GONE,
    ("GET", "/api/v1/admin/users"): Shape(gives={200: AdminUserPage}, query=UserSearch),
    ("POST", "/api/v1/admin/users"): Shape(gives={201: AdminUser, 202: ConfirmationAnswer}, takes=NewUserAccount),
    ("GET", "/api/v1/admin/users/{user}"): _USER,
    ("PATCH", "/api/v1/admin/users/{user}"): Shape(gives={200: AdminUser}, takes=UserChange),
    ("DELETE", "/api/v1/admin/users/{user}"): _GONE,
    ("POST", "/api/v1/admin/users/{user}/password"): Shape(gives={200: AdminUser}, takes=GivenPassword),
    ("POST", "/api/v1/admin/users/{user}/block"): _USER,
    ("POST", "/api/v1/admin/users/{user}/unblock"): _USER,
    ("GET", "/api/v1/admin/users/{user}/usage"): Shape(gives={200: UsageAnswer}, query=UsageDays),
    ("GET", "/api/v1/admin/usage"): Shape(gives={200: AllUsageAnswer}, query=UsageDays),
}
