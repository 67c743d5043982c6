"""The agents of a Letta server as models: which name means which agent.

An agent of a user's own is nobody's model: whoever owns one does not come by here.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from gateway.errors import ModelNotFound
from gateway.letta.backend import PERSONAL_TAG, Agent, AgentBackend
from gateway.tasks import TaskSet

MAX_NAME: Final = 200
"""Characters of an agent's name that serves as a model's id: it stands in every chunk and in URLs."""
MAX_RESOLVED: Final = 10_000
"""Names that are remembered between listings."""


class Models(msgspec.Struct, frozen=True):
    """One listing: agents by model id, in the server's order, and by agent id."""

    by_model: dict[str, Agent]
    by_id: dict[str, Agent]

    def get(self, model: str) -> Agent | None:
        """Return the agent that a model id or an agent id names, exactly."""
        return self.by_model.get(model) or self.by_id.get(model)


def models_of(agents: Iterable[Agent]) -> Models:
    """Give each agent but users' own its model id: its name, or its id where the name is shared, taken, or unfit."""
    by_id = {agent.id: agent for agent in agents if PERSONAL_TAG not in agent.tags}
    names = Counter(agent.name for agent in by_id.values())
    by_model = {
        (agent.name if names[agent.name] == 1 and _is_fit(agent.name, by_id) else agent.id): agent
        for agent in by_id.values()
    }
    return Models(by_model, by_id)


def _is_fit(name: str, by_id: dict[str, Agent]) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable() and name.strip() == name and name not in by_id


class Catalog:
    """The models of a backend, kept for some seconds and asked for again when a name is not among them."""

    def __init__(
        self, backend: AgentBackend, tasks: TaskSet, ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backend = backend
        self._tasks = tasks
        self._ttl = ttl
        self._clock = clock
        self._models: Models | None = None
        self._expires = 0.0
        self._resolved: dict[str, tuple[Agent, float]] = {}
        self._listing: asyncio.Task[Models] | None = None

    async def models(self) -> Models:
        """Return the listing, fresh within its time to live; raises the backend's error, never stale names."""
        if self._models is not None and self._clock() < self._expires:
            return self._models
        return await self._refresh()

    async def resolve(self, model: str) -> Agent:
        """Return the agent of a model id or agent id; raises ``ModelNotFound`` once Letta has been asked.

        It asks for this one name, never for all agents: a chat does not wait for a listing, and unknown names cannot
        make the gateway list.
        """
        if not model.isprintable() or len(model) > MAX_NAME:
            raise ModelNotFound(model)  # no agent's model id is like that
        known = self._known(model)
        if known is not None:
            return known
        found = models_of(await self._backend.find_agents(model)).get(model)
        if found is None:
            raise ModelNotFound(model)
        if len(self._resolved) >= MAX_RESOLVED:
            self._resolved.clear()
        self._resolved[model] = (found, self._clock() + self._ttl)
        return found

    def _known(self, model: str) -> Agent | None:
        now = self._clock()
        if self._models is not None and now < self._expires:
            listed = self._models.get(model)
            if listed is not None:
                return listed
        agent, expires = self._resolved.get(model, (None, 0.0))
        return agent if now < expires else None

    def forget(self) -> None:
        """Drop the listing: Letta said that an agent of it is gone."""
        self._models = None
        self._resolved.clear()

    async def _refresh(self) -> Models:
        # One listing serves all who ask while it is under way; it outlives the one who asked first.
        if self._listing is None or self._listing.done():
            self._listing = self._tasks.spawn(self._list(), "list agents")
        return await asyncio.shield(self._listing)

    async def _list(self) -> Models:
        models = models_of(await self._backend.agents())
        self._models = models
        self._expires = self._clock() + self._ttl
        return models
