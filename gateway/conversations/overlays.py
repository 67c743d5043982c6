"""Whose turn on an agent may show it instructions: a block that is attached to an agent is seen by all its turns."""

import asyncio
from collections import deque
from typing import Final

from gateway.errors import ConversationBusy

WAIT: Final = 30.0
"""Seconds that a turn waits for one with an overlay on the same agent."""


class _Agent:
    def __init__(self) -> None:
        self.turns = 0
        self.is_overlaid = False
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def lifted(self) -> None:
        """Wait until the overlay is gone."""
        free = asyncio.get_running_loop().create_future()
        self.waiting.append(free)
        try:
            await free
        finally:
            if free in self.waiting:
                self.waiting.remove(free)


class OverlayGates:
    """Counts the turns of each agent, and keeps others out while one of them has an overlay."""

    def __init__(self) -> None:
        self._agents: dict[str, _Agent] = {}
        self._left_on: set[str] = set()

    async def enter(self, agent_id: str) -> None:
        """Count a turn, once the agent has no overlay; raises ``ConversationBusy`` where that takes too long."""
        agent = self._agents.setdefault(agent_id, _Agent())
        agent.turns += 1
        try:
            async with asyncio.timeout(WAIT):
                while agent.is_overlaid:
                    await agent.lifted()
        except BaseException as error:
            self.leave(agent_id)
            if isinstance(error, TimeoutError):
                raise ConversationBusy from None
            raise

    def overlay(self, agent_id: str) -> bool:
        """Let the turn that has just entered have an overlay; False where another turn would see it."""
        agent = self._agents[agent_id]
        if agent.turns > 1:
            return False
        agent.is_overlaid = True
        self._left_on.add(agent_id)
        return True

    def is_left_on(self, agent_id: str) -> bool:
        """Tell whether the agent shows an overlay that could not be taken off: nobody's turn may begin under it."""
        return agent_id in self._left_on

    def taken_off(self, agent_id: str) -> None:
        """Note that the agent shows no overlay (any more)."""
        self._left_on.discard(agent_id)

    def lift(self, agent_id: str) -> None:
        """Note that the turn with the overlay is over; unless ``taken_off`` was told, the agent shows it still."""
        agent = self._agents[agent_id]
        agent.is_overlaid = False
        while agent.waiting:
            free = agent.waiting.popleft()
            if not free.done():
                free.set_result(None)

    def leave(self, agent_id: str) -> None:
        """Count a turn no more."""
        agent = self._agents[agent_id]
        agent.turns -= 1
        if not agent.turns:
            del self._agents[agent_id]
