"""Which agent is a user's own, and what it is called."""

import time
from collections.abc import Callable
from typing import Final

from gateway.accounts.agents import PersonalAgents
from gateway.accounts.errors import InvalidToken
from gateway.accounts.profiles import Profiles
from gateway.accounts.recent import Recent
from gateway.errors import AgentGone
from gateway.letta.backend import Agent, AgentBackend

MOST_KNOWN: Final = 10_000
"""Agents whose names are remembered."""


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
        agent_id = await self.id_of(user_id)
        known = self._named.get(agent_id)
        if known is not None:
            return known
        ticket = self._named.ticket()
        found = next((agent for agent in await self._backend.find_agents(agent_id) if agent.id == agent_id), None)
        if found is None:
            raise AgentGone(should_retry=False)
        self._named.put(agent_id, found, ticket)
        return found
