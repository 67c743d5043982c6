"""Which model an agent answers with, as its server says: asked when a turn is settled, and remembered for a minute."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.errors import AgentGone, GatewayError
from gateway.letta.backend import AgentBackend
from gateway.storage.text import fits
from gateway.tasks import TaskSet

KEEP: Final = 60.0
"""Seconds for which an answer holds."""
MOST: Final = 10_000
"""Agents that are remembered."""
UNKNOWN: Final = ""
"""The model of an agent that is no more, or does not say."""


class _Known(NamedTuple):
    model: str
    until: float


class AgentModels:
    """The models of agents, by id."""

    def __init__(self, backend: AgentBackend, tasks: TaskSet, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._tasks = tasks
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._asking: dict[str, asyncio.Task[str]] = {}

    async def of(self, agent_id: str) -> str:
        """Return the agent's model; what was known last where the server cannot be asked.

        Raises the backend's errors where nothing is known.
        """
        known = self._known.get(agent_id)
        if known is not None and self._clock() < known.until:
            return known.model
        try:
            return await self._ask(agent_id)
        except GatewayError:
            if known is None:
                raise
            return known.model

    async def _ask(self, agent_id: str) -> str:
        """Ask once for all who want to know at the same time."""
        asking = self._asking.get(agent_id)
        if asking is None:
            asking = self._asking[agent_id] = self._tasks.spawn(self._fetch(agent_id), "ask for a model")
            asking.add_done_callback(lambda _: self._asking.pop(agent_id, None))
        return await asyncio.shield(asking)

    async def _fetch(self, agent_id: str) -> str:
        try:
            model = await self._backend.model(agent_id) or UNKNOWN
        except AgentGone:
            model = self._known[agent_id].model if agent_id in self._known else UNKNOWN
        model = model if fits(model) else UNKNOWN
        self._known[agent_id] = _Known(model, self._clock() + KEEP)
        self._known.move_to_end(agent_id)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return model
