"""Users billed by a LiteLLM proxy: each has an account and a key there, by which Letta reaches their agent's model.

What a turn cost is counted here by LiteLLM's own prices, at once; what LiteLLM says itself comes some seconds later, as
it writes its books in batches, and is what ``spent`` tells.
"""

import hashlib
import secrets as random
import uuid
from fractions import Fraction
from typing import Final

import msgspec
import structlog

from gateway.accounts.billing.litellm_prices import MICROS, LitellmPrices, micros_of
from gateway.accounts.billing.litellm_service import (
    CONFLICT,
    NOT_FOUND,
    Account,
    Activity,
    BudgetChange,
    KeyName,
    KeyNames,
    LitellmService,
    MadeKey,
    ModelRow,
    ModelRows,
    NewAccount,
    NewKey,
    UserNames,
    UserRow,
)
from gateway.accounts.billing.protocol import Spent, SpentDay
from gateway.accounts.profiles import Budget, Profile, Profiles
from gateway.accounts.recent import Recent
from gateway.accounts.secrets import Secrets
from gateway.errors import BudgetExceeded
from gateway.letta.backend import ModelProvider
from gateway.translation.agent_events import Usage

FRESH: Final = 5.0
"""Seconds for which a user's spending is taken to be what it was."""
MOST: Final = 10_000
"""Users whose spending is remembered."""
TRIES: Final = 3
"""How often a key is made where another gateway makes one for the same user."""
DAYS_AT_ONCE: Final = 1_000
"""Rows of a page: LiteLLM has one for each day, key, model and provider."""
MOST_PAGES: Final = 100
DURATIONS: Final = {"day": "1d", "month": "1mo", "total": None}
"""LiteLLM's names of UTC's days and months: it begins a new one at midnight, as we do."""

_log: Final = structlog.get_logger("gateway.accounts")


class LitellmConfig(msgspec.Struct, frozen=True):
    """Where the proxy is, as Letta reaches it too, and what a user may spend who has no budget of their own."""

    base_url: str
    master_key: str
    default_budget: Budget | None = None

    def __repr__(self) -> str:
        """Show no key."""
        return f"LitellmConfig(base_url={self.base_url!r})"


class LitellmBilling:
    """A ``Billing`` by a LiteLLM proxy."""

    def __init__(
        self, config: LitellmConfig, *, profiles: Profiles, secrets: Secrets, service: LitellmService | None = None
    ) -> None:
        self._config = config
        self._profiles = profiles
        self._secrets = secrets
        self._service = service or LitellmService(config.base_url, config.master_key)
        self._prices = LitellmPrices(self._models)
        self._admitted: Recent[str, bool] = Recent(MOST, FRESH)

    async def close(self) -> None:
        """Close all connections."""
        await self._service.close()

    # Accounts --------------------------------------------------------------------------------------------------------

    def is_open(self, profile: Profile) -> bool:
        """Tell whether the user has a key."""
        return profile.litellm_key is not None

    async def open_account(self, profile: Profile) -> Profile:
        """Make the user's account and key, and return the profile with the key; one that is there stays.

        A process that dies between the two, or another gateway that does the same, leaves keys that nobody knows: the
        one that is stored in the end is looked for at LiteLLM, and the others are deleted.
        """
        if self._key_of(profile) is not None:
            return profile
        key = await self._make_account(profile)
        for _ in range(TRIES):
            stored = await self._store(profile, key)
            if await self._keep_only(stored):
                return stored
            key = await self._make_key(profile.id)
        raise self._service.not_ready()

    async def close_account(self, profile: Profile) -> None:
        """Delete the user with all keys; LiteLLM keeps what they spent."""
        await self._service.post_unless(NOT_FOUND, "/user/delete", UserNames([profile.id]), msgspec.Raw)
        self._forget(profile.id)

    async def set_blocked(self, profile: Profile, *, is_blocked: bool) -> None:
        """Have LiteLLM refuse the user's key, or take it again."""
        key = self._key_of(profile)
        if key is not None:
            path = "/key/block" if is_blocked else "/key/unblock"
            await self._service.post_unless(NOT_FOUND, path, KeyName(key), msgspec.Raw)

    def provider_of(self, profile: Profile) -> ModelProvider | None:
        """Return the provider with the user's own key; raises ``UpstreamUnavailable`` for a user without an account."""
        key = self._key_of(profile)
        if key is None:
            raise self._service.not_ready()  # by the server's own provider somebody else would pay
        return ModelProvider(_provider_name(profile.id), f"{self._config.base_url.rstrip('/')}/v1", key)

    def provider_name(self, user_id: str) -> str:
        """Return what a user's provider is called."""
        return _provider_name(user_id)

    # Money -----------------------------------------------------------------------------------------------------------

    async def admit(self, owner: str) -> None:
        """Raise ``BudgetExceeded`` where the user's budget is used up, as LiteLLM has it; others have none there."""
        if not _is_user(owner):
            return
        may = self._admitted.get(owner)
        if may is None:
            ticket = self._admitted.ticket()
            account = await self._account(owner)
            may = account is None or not _is_used_up(account.user_info or UserRow())
            self._admitted.put(owner, may, ticket)
        if not may:
            raise BudgetExceeded

    async def cost(self, model: str, usage: Usage) -> int:
        """Return what a turn cost by LiteLLM's prices, in millionths of a US dollar, rounded up."""
        return await self._prices.cost(model, usage)

    async def spent(self, profile: Profile, first_day: str, last_day: str) -> Spent | None:
        """Return what LiteLLM says of these days; it is some seconds behind."""
        by_day: dict[str, Fraction] = {}
        query = {"start_date": first_day, "end_date": last_day, "user_id": profile.id, "page_size": str(DAYS_AT_ONCE)}
        for page in range(1, MOST_PAGES + 1):
            activity = await self._service.get("/user/daily/activity", Activity, {**query, "page": str(page)})
            if activity is None:
                break
            for day in activity.results:
                by_day[day.date] = by_day.get(day.date, Fraction()) + micros_of(day.metrics.spend)
            if not activity.metadata.has_more:
                break
        return Spent(tuple(SpentDay(day, round(by_day[day])) for day in sorted(by_day) if round(by_day[day])))

    async def set_budget(self, profile: Profile, budget: Budget | None) -> None:
        """Tell LiteLLM a user's budget; None is the default one. A user without an account gets it with that."""
        if profile.litellm_key is None:
            return  # LiteLLM would make a user of whom it knows nothing else
        await self._change_budget(profile.id, budget)
        self._forget(profile.id)

    # Keys ------------------------------------------------------------------------------------------------------------

    def _key_of(self, profile: Profile) -> str | None:
        return None if profile.litellm_key is None else self._secrets.decrypt(profile.litellm_key)

    async def _make_account(self, profile: Profile) -> str:
        """Make the user and a key, or a key where the user is there; return the key."""
        made = await self._new_account(profile, profile.email or None)
        if made is None and await self._account(profile.id) is None:
            made = await self._new_account(profile, None)  # somebody else has the address at LiteLLM
        if made is not None:
            return made.key
        await self._change_budget(profile.id, profile.budget)  # it may be another one than when the account was made
        return await self._make_key(profile.id)

    async def _new_account(self, profile: Profile, email: str | None) -> MadeKey | None:
        limit, duration = self._limit(profile.budget)
        account = NewAccount(
            user_id=profile.id,
            user_email=email,
            key_alias=_alias(profile.id),
            max_budget=limit,
            budget_duration=duration,
        )
        return await self._service.post_unless(CONFLICT, "/user/new", account, MadeKey)

    async def _change_budget(self, user_id: str, budget: Budget | None) -> None:
        limit, duration = self._limit(budget)
        await self._service.post("/user/update", BudgetChange(user_id, limit, duration), msgspec.Raw)

    async def _make_key(self, user_id: str) -> str:
        return (await self._service.post("/key/generate", NewKey(user_id, _alias(user_id)), MadeKey)).key

    async def _store(self, profile: Profile, key: str) -> Profile:
        """Store a key, and return the profile as it then is: with another key where another gateway came after."""
        await self._profiles.change(profile.id, litellm_key=self._secrets.encrypt(key))
        stored = await self._profiles.find(profile.id)
        if stored is None:  # the user was deleted meanwhile
            await self.close_account(profile)
            raise self._service.not_ready()
        return stored

    async def _keep_only(self, profile: Profile) -> bool:
        """Delete the user's keys but the stored one; False where LiteLLM does not have that one (any more)."""
        key = self._key_of(profile)
        account = await self._account(profile.id)
        tokens = [] if account is None else [row.token for row in account.keys]
        kept = "" if key is None else hashlib.sha256(key.encode()).hexdigest()
        if kept not in tokens:
            return False
        strays = [token for token in tokens if token != kept]
        if strays:
            await self._service.post_unless(NOT_FOUND, "/key/delete", KeyNames(strays), msgspec.Raw)
            _log.info("stray keys deleted at the billing service", user=profile.id, keys=len(strays))
        return True

    async def _account(self, user_id: str) -> Account | None:
        return await self._service.get("/user/info", Account, {"user_id": user_id})

    async def _models(self) -> list[ModelRow]:
        rows = await self._service.get("/model/info", ModelRows, {})
        return [] if rows is None else rows.data

    def _limit(self, budget: Budget | None) -> tuple[float | None, str | None]:
        budget = budget or self._config.default_budget
        return (None, None) if budget is None else (budget.micros / MICROS, DURATIONS[budget.period])

    def _forget(self, user_id: str) -> None:
        self._admitted.forget(lambda known, _: known == user_id)


def _alias(user_id: str) -> str:
    """Return a name for a key: LiteLLM takes each but once, so it says nothing but whose the key is."""
    return f"letta-gateway-{user_id}-{random.token_hex(4)}"


def _provider_name(user_id: str) -> str:
    return f"litellm-{user_id}"


def _is_user(owner: str) -> bool:
    try:
        return str(uuid.UUID(owner)) == owner
    except ValueError:
        return False


def _is_used_up(user: UserRow) -> bool:
    return user.max_budget is not None and user.spend >= user.max_budget
