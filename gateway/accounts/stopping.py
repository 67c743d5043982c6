"""Turns that are not to go on are ended: of users who are blocked or deleted, of agents that are no more theirs.

Those of this gateway end at once. Other gateways of the same database look every few seconds whether theirs may go on,
and are waited for by what the ledger says.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

import structlog
from sqlalchemy import select

from gateway.accounts.bookkeeping import RUNNING, may_be_user
from gateway.storage.engine import Database
from gateway.storage.tables import turns, user_profiles

WAIT: Final = 10.0
"""Seconds for which turns of other gateways are waited for: they look every two seconds."""
PAUSE: Final = 0.25
"""Seconds between two looks at the ledger."""

_log: Final = structlog.get_logger("gateway.accounts")


class OpenTurn(Protocol):
    """A turn that Letta works on."""

    @property
    def owner(self) -> str:
        """Name the owner."""
        ...

    @property
    def agent_id(self) -> str:
        """Name the agent."""
        ...


class Turns(Protocol):
    """The turns of this gateway."""

    @property
    def open(self) -> Iterable[OpenTurn]:
        """Return the turns that Letta works on."""
        ...

    async def stop(self, owner: str) -> None:
        """End the turns of an owner, and see them settled."""
        ...

    async def retire(self, agent_ids: AbstractSet[str]) -> None:
        """End the turns of agents, see them settled, and let none begin any more."""
        ...


class NoTurns:
    """The ``Turns`` of a process that has none: the command line's."""

    open: Iterable[OpenTurn] = ()

    async def stop(self, owner: str) -> None:
        """Do nothing: there is nothing to end."""

    async def retire(self, agent_ids: AbstractSet[str]) -> None:
        """Do nothing: the same."""


class Stopping:
    """Ends turns in all gateways; ``turns`` are those of this one. Every method raises ``StorageUnavailable``."""

    def __init__(
        self, database: Database, turns: Callable[[], Turns], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._turns = turns
        self._clock = clock

    async def stop(self, user_id: str) -> None:
        """End the turns of a user who is blocked by now, and see them settled within some seconds."""
        await self._turns().stop(user_id)
        await self._others_ended(user_id, None)

    async def retire(self, user_id: str, agent_ids: AbstractSet[str]) -> None:
        """End the turns of agents that are no more the user's, and see them settled within some seconds."""
        await self._turns().retire(agent_ids)
        await self._others_ended(user_id, agent_ids)

    async def look(self) -> None:
        """End those turns of this gateway that other gateways want ended."""
        users = {turn.owner for turn in self._turns().open if may_be_user(turn.owner)}
        if not users:
            return
        columns = user_profiles.c.id, user_profiles.c.letta_agent_id, user_profiles.c.is_blocked
        async with self._database.read() as connection:
            rows = (await connection.execute(select(*columns).where(user_profiles.c.id.in_(sorted(users))))).all()
        agents = {row.id: row.letta_agent_id for row in rows if not row.is_blocked}
        for user_id in sorted(users - agents.keys()):
            await self._turns().stop(user_id)
        former = {turn.agent_id for turn in self._turns().open if agents.get(turn.owner) not in (None, turn.agent_id)}
        if former:
            await self._turns().retire(former)

    async def _others_ended(self, user_id: str, agent_ids: AbstractSet[str] | None) -> None:
        """Wait until no gateway has a turn of the user's, or of these agents, but not for long."""
        if not self._database.is_shared:
            return
        running = select(turns.c.id).where(turns.c.owner == user_id, turns.c.status == RUNNING).limit(1)
        if agent_ids is not None:
            running = running.where(turns.c.agent_id.in_(sorted(agent_ids)))
        until = self._clock() + WAIT
        while True:
            async with self._database.read() as connection:
                if (await connection.execute(running)).one_or_none() is None:
                    return
            if self._clock() >= until:
                _log.warning("turns not ended yet in another gateway", user=user_id)
                return
            await asyncio.sleep(PAUSE)
