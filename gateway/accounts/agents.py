"""Every user's own agent on Letta: made once, found again by its tag, renewed, deleted."""

import asyncio
from collections.abc import Callable, Coroutine
from collections.abc import Set as AbstractSet
from typing import Any, Final

import msgspec
import structlog
from sqlalchemy import update

from gateway.accounts.billing.protocol import Billing
from gateway.accounts.errors import InvalidToken, ProvidersUnsupported
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.stopping import Stopping
from gateway.errors import GatewayError
from gateway.letta.backend import PERSONAL_TAG, Agent, AgentBackend, AgentSpec, MemoryBlock
from gateway.storage.engine import Database
from gateway.storage.tables import user_profiles
from gateway.tasks import TaskSet

LONGEST_NAME: Final = 40
"""Characters of a user's name that their agent's name begins with."""
DIGITS: Final = 12
"""Characters of a user's id that an agent's name ends with."""

_log: Final = structlog.get_logger("gateway.accounts")


class AgentConfig(msgspec.Struct, frozen=True):
    """What users' agents are made of; None is what Letta has as its default."""

    model: str | None = None
    embedding: str | None = None
    tools: tuple[str, ...] = ()


class PersonalAgents:
    """The agents of users: one for each, however often and wherever it is asked for.

    Work on a user's agent outlives the request that asked for it, and serves all who ask meanwhile. Between gateways
    that share a database the row decides whose agent it is; who comes second deletes what it made.
    """

    def __init__(
        self,
        *,
        backend: AgentBackend,
        profiles: Profiles,
        billing: Billing,
        database: Database,
        config: AgentConfig,
        stopping: Stopping,
        tasks: TaskSet,
    ) -> None:
        self._backend = backend
        self._profiles = profiles
        self._billing = billing
        self._database = database
        self._config = config
        self._stopping = stopping
        self._tasks = tasks
        self._making: dict[str, asyncio.Task[Profile]] = {}
        self._renewing: dict[str, asyncio.Task[Profile]] = {}

    async def ensure(self, profile: Profile) -> Profile:
        """Return the profile with its agent, which is found or made where it has none.

        One that another biller paid for is given to this one, with what it remembers. Raises ``InvalidToken`` where the
        user is gone, and the errors of Letta, the biller and the database.
        """
        if self._is_complete(profile):
            return profile
        return await self._shared(self._making, profile.id, self._make)

    async def ensure_within(self, profile: Profile, seconds: float) -> Profile:
        """Return the profile with its agent, as ``ensure`` does; raises ``TimeoutError``, and the work goes on."""
        async with asyncio.timeout(seconds):
            return await self.ensure(profile)

    async def reset(self, profile: Profile) -> Profile:
        """Give the user a fresh agent, end the turns of the one before and delete it; raises as ``ensure`` does."""
        return await self._shared(self._renewing, profile.id, self._renew)

    async def delete(self, user_id: str, agent_id: str | None = None) -> None:
        """End the turns of all agents of a user's, that one included; delete these and their provider.

        Raises the errors of Letta and the database.
        """
        for work in (self._making, self._renewing):
            if user_id in work:
                await asyncio.wait({work[user_id]})
        found = {agent.id for agent in await self._backend.find_tagged(tag_of(user_id))}
        await self._delete(user_id, found | ({agent_id} if agent_id is not None else set()))
        provider = self._billing.provider_name(user_id)
        if provider is not None:
            await self._backend.delete_provider(provider)

    async def _shared(
        self,
        work: dict[str, asyncio.Task[Profile]],
        user_id: str,
        start: Callable[[str], Coroutine[Any, Any, Profile]],
    ) -> Profile:
        """Join the work on a user's agent that is under way, or start it."""
        if user_id not in work:
            task = work[user_id] = self._tasks.spawn(start(user_id), "personal agent")
            task.add_done_callback(lambda _: work.pop(user_id))
        return await asyncio.shield(work[user_id])

    async def _make(self, user_id: str) -> Profile:
        profile = await self._profile(user_id)
        if self._is_complete(profile):
            return profile
        before = profile.letta_agent_id
        if before is not None:
            # It is found again by its tag, so that one who dies in between leaves none that somebody else pays for.
            profile = await self._profiles.change(user_id, letta_agent_id=None) or profile
        profile = await self._billing.open_account(profile)
        found = await self._backend.find_tagged(tag_of(user_id))
        if found:
            agent = min(found, key=lambda agent: (agent.id != before, agent.created, agent.id))
            await self._backend.set_provider(agent.id, self._spec(profile))
        else:
            agent = await self._backend.create_agent(self._spec(profile))
        profile = await self._give(profile, agent)
        if not self._billing.is_open(profile):
            return await self._profiles.change(user_id, litellm_key=None) or profile
        return profile

    def _is_complete(self, profile: Profile) -> bool:
        return profile.letta_agent_id is not None and self._billing.is_open(profile)

    async def _renew(self, user_id: str) -> Profile:
        if user_id in self._making:
            await asyncio.wait({self._making[user_id]})
        before = await self._billing.open_account(await self._profile(user_id))
        found = {agent.id for agent in await self._backend.find_tagged(tag_of(user_id))}
        agent = await self._backend.create_agent(self._spec(before))
        profile = await self._give(before, agent)
        if before.letta_agent_id is not None:
            found.add(before.letta_agent_id)
        await self._delete_former(profile, found - {profile.letta_agent_id})
        return profile

    async def _profile(self, user_id: str) -> Profile:
        profile = await self._profiles.find(user_id)
        if profile is None:
            raise InvalidToken
        return profile

    async def _give(self, profile: Profile, agent: Agent) -> Profile:
        """Make this the user's agent, unless another gateway has given them one meanwhile."""
        is_given = await self._write(profile, agent.id)
        try:
            current = await self._profile(profile.id)
        except InvalidToken:
            await self._backend.delete_agent(agent.id)
            raise
        if not is_given and current.letta_agent_id != agent.id:
            await self._backend.delete_agent(agent.id)
        return current

    async def _write(self, profile: Profile, agent_id: str) -> bool:
        column, before = user_profiles.c.letta_agent_id, profile.letta_agent_id
        statement = (
            update(user_profiles)
            .where(user_profiles.c.id == profile.id, column.is_(None) if before is None else column == before)
            .values(letta_agent_id=agent_id)
        )
        async with self._database.write() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def _delete_former(self, profile: Profile, former: AbstractSet[str]) -> None:
        """Delete agents that are the user's no more; those that stay go with the next fresh start."""
        try:
            await self._delete(profile.id, former)
        except GatewayError as error:
            _log.warning("former agent not deleted", user=profile.id, code=error.code)

    async def _delete(self, user_id: str, agent_ids: AbstractSet[str]) -> None:
        """Delete agents once their turns are settled: what a turn took nobody could say afterwards."""
        await self._stopping.retire(user_id, agent_ids)
        for agent_id in sorted(agent_ids):
            await self._backend.delete_agent(agent_id)

    def _spec(self, profile: Profile) -> AgentSpec:
        provider = self._billing.provider_of(profile)
        if provider is not None and not self._backend.capabilities.providers:
            raise ProvidersUnsupported
        return AgentSpec(
            name=name_of(profile),
            model=self._config.model,
            embedding=self._config.embedding,
            tools=self._config.tools,
            blocks=blocks_of(profile),
            tags=(PERSONAL_TAG, tag_of(profile.id)),
            provider=provider,
        )


def tag_of(user_id: str) -> str:
    """Return the tag by which a user's agent is found."""
    return f"{PERSONAL_TAG}:{user_id}"


def name_of(profile: Profile) -> str:
    """Return what a user's agent is called: letters that every Letta takes, and no two users' alike."""
    readable = "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in profile.name)
    words = "-".join(readable.split())[:LONGEST_NAME].strip("-") or "user"
    return f"{words}-{profile.id.replace('-', '')[:DIGITS]}"


def blocks_of(profile: Profile) -> tuple[MemoryBlock, ...]:
    """Return what a new agent has in its memory."""
    return (
        MemoryBlock(
            "human",
            f"Name: {profile.name}" if profile.name else "Nothing is known yet.",
            description="What is known of the user: who they are, what they like, what they asked to be remembered.",
        ),
        MemoryBlock(
            "persona",
            "I am this user's personal assistant. I am friendly and to the point, and I keep what matters to them in "
            "my memory.",
            description="Who the agent is, and how it behaves towards the user.",
        ),
    )
