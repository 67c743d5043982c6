"""Which agent is a user's own, and what it is called."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from gateway.accounts.agents import PersonalAgents
from gateway.accounts.errors import InvalidToken
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.recent import Recent
from gateway.errors import AgentGone, GatewayError
from gateway.letta.backend import Agent, AgentBackend

MOST_KNOWN: Final = 10_000
"""Agents whose names are remembered."""
NAME_WAIT: Final = 1.0
"""Seconds that an answer waits for a name which it can do without."""

_log: Final = structlog.get_logger("gateway.accounts")


class OwnAgents:
    """The users' own agents, each made when first asked for; Letta is asked for names again after ``ttl`` seconds.

    Raises what ``PersonalAgents.ensure`` does, and ``InvalidToken`` where the user is gone.
    """

    def __init__(
        self,
        profiles: Profiles,
        agents: PersonalAgents,
        backend: AgentBackend,
        ttl: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._profiles = profiles
        self._agents = agents
        self._backend = backend
        self._named: Recent[str, Agent] = Recent(MOST_KNOWN, ttl, clock)

    async def id_of(self, user_id: str) -> str:
        """Return the id of a user's agent."""
        profile = await self._profiles.find(user_id)
        if profile is None:
            raise InvalidToken
        agent_id = (await self._agents.ensure(profile)).letta_agent_id
        assert agent_id is not None  # noqa: S101 - that is what it ensures
        return agent_id

    async def of(self, user_id: str) -> Agent:
        """Return a user's agent; raises ``AgentGone`` where Letta has it no more."""
        return await self._agent(await self.id_of(user_id))

    async def name_of(self, profile: Profile) -> str | None:
        """Return what a user's agent is called; None without one, and where Letta does not tell within a second."""
        if profile.letta_agent_id is None:
            return None
        try:
            async with asyncio.timeout(NAME_WAIT):
                return (await self._agent(profile.letta_agent_id)).name
        except (GatewayError, TimeoutError) as error:
            reason = error.code if isinstance(error, GatewayError) else "timeout"
            _log.debug("agent's name not known", user=profile.id, code=reason)
            return None

    async def _agent(self, agent_id: str) -> Agent:
        known = self._named.get(agent_id)
        if known is not None:
            return known
        ticket = self._named.ticket()
        found = next((agent for agent in await self._backend.find_agents(agent_id) if agent.id == agent_id), None)
        if found is None:
            raise AgentGone(should_retry=False)
        self._named.put(agent_id, found, ticket)
        return found
