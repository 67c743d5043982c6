"""Settings -> everything about users, put together."""

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import structlog
from aiohttp import web

from gateway import keys
from gateway.accounts.agents import AgentConfig, PersonalAgents
from gateway.accounts.billing.litellm import LitellmBilling, LitellmConfig
from gateway.accounts.billing.local import LocalBilling, Price
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.blocking import Blocking
from gateway.accounts.brute_force import GuardConfig, LoginGuard
from gateway.accounts.credentials import UserCredentials
from gateway.accounts.deletion import Deletion
from gateway.accounts.export import Export
from gateway.accounts.history import History
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.identity.protocol import IdentityProvider
from gateway.accounts.identity.supabase import SupabaseConfig, SupabaseIdentity
from gateway.accounts.instances import Instances
from gateway.accounts.ledger import Ledger
from gateway.accounts.operator_key import OperatorKey
from gateway.accounts.operator_sessions import OperatorSessions
from gateway.accounts.own_agents import OwnAgents
from gateway.accounts.profiles import Budget, Profiles
from gateway.accounts.registration import Registration
from gateway.accounts.secrets import SecretFailed, Secrets, secrets_of
from gateway.accounts.stopping import NoTurns, Stopping, Turns
from gateway.accounts.usage import UsageReports
from gateway.accounts.user_keys import UserKeys
from gateway.letta.backend import AgentBackend
from gateway.live_settings.current import LiveSettings
from gateway.settings import SettingError, Settings, budget_of, is_loopback
from gateway.shared_state.tally import Tally
from gateway.storage.engine import Database
from gateway.tasks import TaskSet

Purge: TypeAlias = Callable[[float], Awaitable[None]]
"""Forgets what is over by a time, in UTC seconds."""

PURGE_PERIOD: Final = 3_600.0
"""Seconds between two looks for sessions that are over."""

_log: Final = structlog.get_logger("gateway.accounts")


class Accounts:
    """The parts that know users, and what they do beside requests."""

    def __init__(
        self,
        live: LiveSettings,
        database: Database,
        backend: AgentBackend,
        tasks: TaskSet,
        *,
        instance: str | None = None,
        tally: Tally | None = None,
        open_turns: Callable[[], Turns] = NoTurns,
    ) -> None:
        settings = live.configured
        secrets = account_secrets(settings, is_shared=database.is_shared)
        self.operator_key = OperatorKey(settings.operator_key, LoginGuard(tally=tally, whose="operator"))
        self.operator_sessions = OperatorSessions(
            database, secrets.operator_key, settings.operator_key, held=self.operator_key
        )
        self.profiles = Profiles(database)
        self.user_keys = UserKeys(database, secrets)
        self.identity, self._purge = _identity(settings, database, secrets, guard_of(settings, tally))
        self.billing = _billing(settings, self.profiles, secrets)
        self.instances = Instances(database, instance or str(uuid.uuid4()), should_be_alone=not settings.redis_url)
        self.history = History(database, self.instances)
        self.ledger = Ledger(
            database, self.billing, backend, tasks, self.instances, default_budget=default_budget(settings)
        )
        self.usage = UsageReports(database, default_budget=default_budget(settings))
        self.stopping = Stopping(database, open_turns)
        self.agents = PersonalAgents(
            backend=backend,
            profiles=self.profiles,
            billing=self.billing,
            database=database,
            config=AgentConfig(settings.user_model or None, settings.user_embedding or None, settings.user_tools),
            stopping=self.stopping,
            tasks=tasks,
        )
        self.own_agents = OwnAgents(self.profiles, self.agents, backend, settings.models_ttl)
        self.deletion = Deletion(
            database=database,
            identity=self.identity,
            profiles=self.profiles,
            agents=self.agents,
            billing=self.billing,
            stopping=self.stopping,
            forget=self._forget,
        )
        self.blocking = Blocking(
            profiles=self.profiles,
            identity=self.identity,
            billing=self.billing,
            stopping=self.stopping,
            forget=self._forget,
        )
        self.registration = Registration(
            identity=self.identity,
            profiles=self.profiles,
            agents=self.agents,
            deletion=self.deletion,
            is_open=lambda: is_registration_open(live.current),
        )
        self.credentials = UserCredentials(
            self.identity, self.user_keys, self.profiles, complete=self.registration.complete
        )
        self.export = Export(
            database,
            backend,
            own_agents=self.own_agents,
            history=self.history,
            usage=self.usage,
            user_keys=self.user_keys,
        )
        self._purge_at = 0.0

    def hand_over(self, app: web.Application) -> None:
        """Put the parts where handlers find them."""
        app[keys.ACCOUNTS] = self
        app[keys.BILLING] = self.billing
        app[keys.BLOCKING] = self.blocking
        app[keys.CREDENTIALS] = self.credentials
        app[keys.EXPORT] = self.export
        app[keys.HISTORY] = self.history
        app[keys.IDENTITY] = self.identity
        app[keys.OPERATOR_KEY] = self.operator_key
        app[keys.OPERATOR_SESSIONS] = self.operator_sessions
        app[keys.OWN_AGENTS] = self.own_agents
        app[keys.PERSONAL_AGENTS] = self.agents
        app[keys.PROFILES] = self.profiles
        app[keys.REGISTRATION] = self.registration
        app[keys.USAGE] = self.usage
        app[keys.USER_KEYS] = self.user_keys

    async def start(self) -> None:
        """Settle what gateways that are no more left behind; raises ``StorageUnavailable``."""
        await self.ledger.start()
        await self._reconcile_history()

    async def look(self) -> None:
        """End the turns that other gateways want ended; raises ``StorageUnavailable``."""
        await self.stopping.look()

    async def sweep(self, now: float) -> None:
        """Finish deletions, settle what dead gateways left, forget what is old; raises ``StorageUnavailable``."""
        await self._reconcile_history()
        await self.deletion.sweep(now)
        if now >= self._purge_at:
            await self._purge(now)
            self._purge_at = now + PURGE_PERIOD

    async def end(self) -> None:
        """Write down what is not written yet, once no turn is held."""
        await self.ledger.end()

    async def close(self) -> None:
        """Close the connections to those who know passwords and prices."""
        await self.identity.close()
        await self.billing.close()

    def _forget(self, user_id: str) -> None:
        self.credentials.forget(user_id)

    async def _reconcile_history(self) -> None:
        count = await self.history.reconcile()
        if count:
            _log.info("answers of dead gateways ended", answers=count)


def account_secrets(settings: Settings, *, is_shared: bool) -> Secrets:
    """Return the secret from which tokens and stored secrets get their keys; raises ``SettingError``."""
    try:
        return secrets_of(settings.secret_key, Path(settings.home), is_shared=is_shared)
    except SecretFailed as error:
        raise SettingError(str(error)) from None


def is_registration_open(settings: Settings) -> bool:
    """Tell whether users may register themselves: on this machine they may, unless the operator says otherwise."""
    if settings.registration == "auto":
        return is_loopback(settings.host)
    return settings.registration == "open"


def default_budget(settings: Settings) -> Budget | None:
    """Return what users may spend for whom the operator has said nothing else."""
    if not settings.user_budget:
        return None
    budget = budget_of(settings.user_budget)
    return Budget(budget.micros, budget.period)


def guard_of(settings: Settings, tally: Tally | None) -> LoginGuard:
    """Return who slows down whoever guesses users' passwords, or registers many of them."""
    pace = GuardConfig().registration
    return LoginGuard(GuardConfig(registration=msgspec.structs.replace(pace, free=settings.registrations)), tally=tally)


def _identity(
    settings: Settings, database: Database, secrets: Secrets, guard: LoginGuard
) -> tuple[IdentityProvider, Purge]:
    if settings.identity == "supabase":
        config = SupabaseConfig(
            settings.supabase_url,
            settings.supabase_anon_key,
            service_key=settings.supabase_service_key,
            jwt_secret=settings.supabase_jwt_secret,
            jwt_issuer=settings.supabase_jwt_issuer,
        )
        supabase = SupabaseIdentity(config, database, guard=guard)
        return supabase, supabase.purge
    local = LocalIdentity(database, secrets, guard=guard)
    return local, local.purge


def _billing(settings: Settings, profiles: Profiles, secrets: Secrets) -> Billing:
    if settings.billing == "litellm":
        config = LitellmConfig(settings.litellm_base_url, settings.litellm_master_key, default_budget(settings))
        return LitellmBilling(config, profiles=profiles, secrets=secrets)
    prices = {model: Price(price.prompt, price.completion, price.cached) for model, price in settings.prices.items()}
    return LocalBilling(prices)
