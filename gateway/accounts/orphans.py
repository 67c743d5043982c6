"""Turns that nobody is going to settle: of gateways that are no more, and those whose figures could not be had."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import msgspec
from sqlalchemy import Select, bindparam, select

from gateway.accounts.bookkeeping import RUNNING
from gateway.accounts.instances import Instances
from gateway.errors import AgentGone
from gateway.letta.backend import AgentBackend, SentTurn
from gateway.storage.engine import Database
from gateway.storage.tables import turns
from gateway.translation.agent_events import Usage

_AT_ONCE: Final = 500
"""Names in one statement: databases bound its parameters."""

_COLUMNS: Final = select(turns.c.id, turns.c.agent_id, turns.c.conversation_id, turns.c.started_at).where(
    turns.c.status == RUNNING
)
_BY_INSTANCE: Final = _COLUMNS.where(turns.c.instance.in_(bindparam("names", expanding=True)))
_BY_ID: Final = _COLUMNS.where(turns.c.id.in_(bindparam("names", expanding=True)))
_INSTANCES: Final = select(turns.c.instance).where(turns.c.status == RUNNING).distinct()


class Orphan(msgspec.Struct, frozen=True):
    """A turn that was perhaps sent; ``started_at`` is in UTC seconds."""

    id: str
    agent_id: str
    conversation_id: str | None
    started_at: float


class Orphans:
    """Finds them, and asks Letta what they took."""

    def __init__(self, database: Database, backend: AgentBackend, instances: Instances) -> None:
        self._database = database
        self._backend = backend
        self._instances = instances

    async def find(self, forsaken: AbstractSet[str]) -> list[Orphan]:
        """Return turns of gateways that are no more, and those of these ids; raises ``StorageUnavailable``."""
        async with self._database.read() as connection:
            running: set[str] = set((await connection.execute(_INSTANCES)).scalars())
        gone = await self._instances.gone(running)
        found = await self._read(_BY_INSTANCE, sorted(gone)) + await self._read(_BY_ID, sorted(forsaken))
        return list({orphan.id: orphan for orphan in found}.values())

    async def taken(self, orphan: Orphan) -> Usage | None:
        """Stop a turn, and return what it took; None where Letta knows nothing of it. Raises the backend's errors."""
        sent = SentTurn(
            mark=orphan.id,
            agent_id=orphan.agent_id,
            conversation_id=orphan.conversation_id,
            sent_at=orphan.started_at,
        )
        try:
            return await self._backend.spent(sent)
        except AgentGone:
            return None

    async def _read(self, statement: Select[Any], names: Sequence[str]) -> list[Orphan]:
        found: list[Orphan] = []
        for start in range(0, len(names), _AT_ONCE):
            async with self._database.read() as connection:
                rows = await connection.execute(statement, [{"names": names[start : start + _AT_ONCE]}])
                found += [Orphan(row.id, row.agent_id, row.conversation_id, row.started_at) for row in rows]
        return found
