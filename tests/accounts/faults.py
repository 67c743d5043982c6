"""Steps of a saga that fail, or hang, before or after they had their effect."""

import asyncio
from typing import Literal, TypeAlias

import msgspec

from gateway.accounts.billing.protocol import Spent
from gateway.accounts.errors import AccountExists, InvalidCredentials
from gateway.accounts.identity.protocol import NewUser, Tokens, Verified
from gateway.accounts.profiles import Budget, Profile
from gateway.errors import UpstreamUnavailable
from gateway.letta.backend import Agent, AgentSpec, Capabilities, ModelProvider
from gateway.letta.scripted import ScriptedBackend
from gateway.translation.agent_events import Usage

Fault: TypeAlias = Literal["fails before", "fails after", "hangs before", "hangs after"]


class Faults:
    """Counts the steps that are taken; the one of the number ``at`` goes wrong, once."""

    def __init__(self, at: int | None = None, fault: Fault = "fails before") -> None:
        self.at = at
        self.fault = fault
        self.taken: list[str] = []
        self.hanging = asyncio.Event()

    async def before(self, name: str) -> None:
        """Begin a step."""
        self.taken.append(name)
        await self._perhaps("before")

    async def after(self) -> None:
        """End the step that was begun last."""
        await self._perhaps("after")

    async def _perhaps(self, moment: str) -> None:
        if len(self.taken) - 1 != self.at or not self.fault.endswith(moment):
            return
        self.at = None
        if self.fault.startswith("hangs"):
            self.hanging.set()
            await asyncio.Event().wait()
        raise UpstreamUnavailable(retry_after=1.0, should_retry=True)


class FaultyBackend(ScriptedBackend):
    """A Letta whose answers about agents are steps."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.capabilities = Capabilities(providers=True)
        self.faults = faults
        self.made: list[AgentSpec] = []

    async def find_tagged(self, tag: str) -> list[Agent]:
        await self.faults.before("find")
        found = [agent for agent in self.listed if tag in agent.tags]
        await self.faults.after()
        return found

    async def create_agent(self, spec: AgentSpec) -> Agent:
        await self.faults.before("create")
        await asyncio.sleep(0)
        self.made.append(spec)
        agent = Agent(f"agent-{len(self.made)}", spec.name, len(self.made), spec.tags)
        self.listed.append(agent)
        await self.faults.after()
        return agent

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        await self.faults.before("set provider")
        self.providers[agent_id] = spec.provider
        await self.faults.after()

    async def delete_agent(self, agent_id: str) -> None:
        await self.faults.before("delete")
        self.listed = [agent for agent in self.listed if agent.id != agent_id]
        await self.faults.after()

    async def delete_provider(self, name: str) -> None:
        await self.faults.before("delete provider")
        self.gone_providers.append(name)
        await self.faults.after()


class FaultyBilling:
    """A biller with accounts of its own, whose answers are steps."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.accounts: set[str] = set()
        self.blocked: set[str] = set()
        self.budgets: dict[str, Budget | None] = {}
        self.strangers: set[str] = set()
        """Users of another biller's, until they have an account here."""

    def is_open(self, profile: Profile) -> bool:
        return profile.id not in self.strangers

    async def open_account(self, profile: Profile) -> Profile:
        await self.faults.before("open account")
        self.accounts.add(profile.id)
        self.strangers.discard(profile.id)
        await self.faults.after()
        return profile

    async def close_account(self, profile: Profile) -> None:
        await self.faults.before("close account")
        self.accounts.discard(profile.id)
        await self.faults.after()

    def provider_of(self, profile: Profile) -> ModelProvider | None:
        return ModelProvider(self.provider_name(profile.id), "http://biller.invalid/v1", "sk-provider")

    def provider_name(self, user_id: str) -> str:
        return f"provider-{user_id}"

    async def admit(self, owner: str) -> None:
        return

    async def cost(self, model: str, usage: Usage) -> int:
        return usage.prompt_tokens

    async def spent(self, profile: Profile, first_day: str, last_day: str) -> Spent | None:
        return None

    async def set_blocked(self, profile: Profile, *, is_blocked: bool) -> None:
        await self.faults.before("block account" if is_blocked else "unblock account")
        (self.blocked.add if is_blocked else self.blocked.discard)(profile.id)
        await self.faults.after()

    async def set_budget(self, profile: Profile, budget: Budget | None) -> None:
        await self.faults.before("set budget")
        self.budgets[profile.id] = budget
        await self.faults.after()

    async def close(self) -> None:
        return


class Known(msgspec.Struct):
    """A user as an identity provider knows them."""

    id: str
    password: str
    is_confirmed: bool = True


class FaultyIdentity:
    """An identity provider of its own, as Supabase is one; its answers are steps."""

    def __init__(self, faults: Faults, *, confirms: bool = False) -> None:
        self.faults = faults
        self.confirms = confirms
        self.users: dict[str, Known] = {}
        self.blocked: set[str] = set()

    async def register(self, email: str, password: str, address: str | None) -> Tokens | NewUser:
        await self.faults.before("register")
        number = len(self.users) + 1
        user = self.users.setdefault(
            email, Known(f"00000000-0000-4000-8000-{number:012}", password, is_confirmed=not self.confirms)
        )
        if user.password != password:
            raise AccountExists
        await self.faults.after()
        return self._tokens(email, user) if user.is_confirmed else NewUser(user.id, email)

    async def login(self, email: str, password: str, address: str) -> Tokens:
        await self.faults.before("login")
        user = self.users.get(email)
        if user is None or user.password != password:
            raise InvalidCredentials
        await self.faults.after()
        return self._tokens(email, user)

    async def refresh(self, refresh_token: str, address: str) -> Tokens:
        raise NotImplementedError

    async def logout(self, token: str, verified: Verified, *, everywhere: bool) -> None:
        raise NotImplementedError

    async def verify(self, access_token: str) -> Verified:
        raise NotImplementedError

    async def change_password(self, token: str, verified: Verified, current: str, new: str) -> Tokens:
        raise NotImplementedError

    async def set_password(self, user_id: str, new: str) -> bool:
        raise NotImplementedError

    async def delete(self, user_id: str) -> None:
        await self.faults.before("delete identity")
        self.users = {email: user for email, user in self.users.items() if user.id != user_id}
        await self.faults.after()

    async def set_blocked(self, user_id: str, *, is_blocked: bool) -> None:
        await self.faults.before("block identity" if is_blocked else "unblock identity")
        (self.blocked.add if is_blocked else self.blocked.discard)(user_id)
        await self.faults.after()

    def jwks(self) -> bytes:
        return b'{"keys": []}'

    async def close(self) -> None:
        return

    @staticmethod
    def _tokens(email: str, user: Known) -> Tokens:
        return Tokens(f"access of {user.id}", f"refresh of {user.id}", 900, user.id, email)
