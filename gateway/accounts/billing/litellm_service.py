"""A LiteLLM proxy's management API: how it is asked, and what its answers hold (litellm 1.106.2)."""

from collections.abc import Mapping
from datetime import datetime
from typing import Final, TypeVar

import msgspec
import structlog

from gateway.accounts.remote import RemoteConfig, RemoteService, Reply
from gateway.errors import BackendError, UpstreamAuthFailed

T = TypeVar("T")

OK: Final = 200
NOT_FOUND: Final = 404
CONFLICT: Final = 409

_log: Final = structlog.get_logger("gateway.accounts")


class NewAccount(msgspec.Struct, frozen=True, kw_only=True):
    """A user who is to be, with a first key; money is in US dollars, None is no limit."""

    user_id: str
    user_email: str | None
    key_alias: str
    max_budget: float | None
    budget_duration: str | None
    user_role: str = "internal_user"
    auto_create_key: bool = True


class NewKey(msgspec.Struct, frozen=True):
    """A key that is to be."""

    user_id: str
    key_alias: str


class BudgetChange(msgspec.Struct, frozen=True):
    """What a user may spend from now on; None is no limit."""

    user_id: str
    max_budget: float | None
    budget_duration: str | None


class KeyNames(msgspec.Struct, frozen=True):
    """Keys by their plain text or their SHA-256."""

    keys: list[str]


class KeyName(msgspec.Struct, frozen=True):
    """A key by its plain text or its SHA-256."""

    key: str


class UserNames(msgspec.Struct, frozen=True):
    """Users by their ids."""

    user_ids: list[str]


class MadeKey(msgspec.Struct, frozen=True):
    """A key that was made: its plain text is told once."""

    key: str


class KeyRow(msgspec.Struct, frozen=True):
    """A key that there is; ``token`` is its SHA-256."""

    token: str


class UserRow(msgspec.Struct, frozen=True):
    """A user's budget, and what of it is spent in its period, in US dollars."""

    spend: float = 0.0
    max_budget: float | None = None
    budget_reset_at: datetime | None = None


class Account(msgspec.Struct, frozen=True):
    """A user with their keys."""

    user_info: UserRow | None = None
    keys: list[KeyRow] = []


class DayFigures(msgspec.Struct, frozen=True):
    """The sums of a day."""

    spend: float = 0.0


class Day(msgspec.Struct, frozen=True):
    """What happened on a day (``2026-11-21``, UTC)."""

    date: str
    metrics: DayFigures


class ActivityPage(msgspec.Struct, frozen=True):
    """Whether there are more days."""

    has_more: bool = False


class Activity(msgspec.Struct, frozen=True):
    """What happened by day; one day may stand on two pages."""

    results: list[Day]
    metadata: ActivityPage = ActivityPage()


class ModelPrice(msgspec.Struct, frozen=True):
    """What a model's tokens cost, in US dollars each; None is nothing, and for what was cached: as the rest."""

    input_cost_per_token: float | None = None
    output_cost_per_token: float | None = None
    cache_read_input_token_cost: float | None = None


class ModelRow(msgspec.Struct, frozen=True):
    """One of the deployments that a model has."""

    model_name: str
    model_info: ModelPrice = ModelPrice()


class ModelRows(msgspec.Struct, frozen=True):
    """All deployments."""

    data: list[ModelRow]


class LitellmService:
    """Asks with the master key; ``close`` frees the connections."""

    def __init__(self, base_url: str, master_key: str, *, service: RemoteService | None = None) -> None:
        self._headers = {"Authorization": f"Bearer {master_key}"}
        self._service = service or RemoteService(RemoteConfig("The billing service", "billing", base_url))

    async def close(self) -> None:
        """Close all connections."""
        await self._service.close()

    async def get(self, path: str, kind: type[T], query: Mapping[str, str]) -> T | None:
        """Return what is asked for, and None where it does not exist; raises ``BackendError``."""
        reply = await self._service.ask("GET", path, headers=self._headers, query=query)
        return None if reply.status == NOT_FOUND else self._service.decoded(self._good(reply), kind)

    async def post(self, path: str, body: msgspec.Struct, kind: type[T]) -> T:
        """Have something made or changed, and return what is told of it; raises ``BackendError``."""
        reply = await self._service.ask("POST", path, headers=self._headers, body=body)
        return self._service.decoded(self._good(reply), kind)

    async def post_unless(self, status: int, path: str, body: msgspec.Struct, kind: type[T]) -> T | None:
        """Do as ``post``; None for this status."""
        reply = await self._service.ask("POST", path, headers=self._headers, body=body)
        return None if reply.status == status else self._service.decoded(self._good(reply), kind)

    def not_ready(self) -> BackendError:
        """Return the error of an account that is not what it has to be just now."""
        return self._service.unavailable()

    def _good(self, reply: Reply) -> Reply:
        if reply.status == OK:
            return reply
        if reply.status in (401, 403):
            raise UpstreamAuthFailed(
                "The billing service refused the gateway's key. The operator should check LITELLM_MASTER_KEY.",
                code="billing_auth_failed",
                should_retry=False,
            )
        _log.warning("billing service refused a request", status=reply.status)
        raise self._service.invalid()
