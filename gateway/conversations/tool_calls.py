"""Tool calls that wait for the client's results: kept over a restart."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Row, Select, delete, select

from gateway.storage.engine import Database
from gateway.storage.tables import waiting_calls
from gateway.storage.text import check_fit, fits
from gateway.storage.upsert import upsert

_AT_ONCE: Final = 500
"""Ids in one statement: databases bound its parameters, clients bound nothing."""


class WaitingCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the agent waits for; ``asked_at`` is in UTC seconds, no conversation is the agent's own thread."""

    call_id: str
    owner: str
    agent_id: str
    conversation_id: str | None
    chat: str | None
    is_ephemeral: bool
    name: str
    asked_at: float


class WaitingCalls:
    """The calls that wait, by owner and id."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, calls: Sequence[WaitingCall]) -> None:
        """Keep calls, all of them or none; one that is known already is replaced.

        Raises ``ValueError`` for text that cannot be stored, and ``StorageUnavailable``.
        """
        for call in calls:
            check_fit(call.call_id, call.owner, call.agent_id, call.conversation_id, call.chat, call.name)
        if not calls:
            return
        rows = [msgspec.structs.asdict(call) for call in calls]
        async with self._database.write() as connection:
            await connection.execute(upsert(connection.dialect, waiting_calls), rows)

    async def find(self, call_ids: Sequence[str]) -> list[WaitingCall]:
        """Return the calls of these ids, whoever they belong to, oldest first; raises ``StorageUnavailable``."""
        wanted = sorted({call_id for call_id in call_ids if fits(call_id)})
        found: list[WaitingCall] = []
        for start in range(0, len(wanted), _AT_ONCE):
            ids = wanted[start : start + _AT_ONCE]
            found += await self._read(select(waiting_calls).where(waiting_calls.c.call_id.in_(ids)))
        return sorted(found, key=lambda call: call.asked_at)

    async def of_agent(self, owner: str, agent_id: str) -> list[WaitingCall]:
        """Return the calls of an owner's that an agent waits for, oldest first; raises ``StorageUnavailable``."""
        if not fits(owner) or not fits(agent_id):
            return []
        return await self._read(
            select(waiting_calls).where(waiting_calls.c.owner == owner, waiting_calls.c.agent_id == agent_id)
        )

    async def settle(self, owner: str, agent_id: str, conversation_id: str | None) -> None:
        """Forget all calls of a conversation, or of the agent's own thread; raises ``StorageUnavailable``."""
        if not all(text is None or fits(text) for text in (owner, agent_id, conversation_id)):
            return
        column = waiting_calls.c.conversation_id
        statement = delete(waiting_calls).where(
            waiting_calls.c.owner == owner,
            waiting_calls.c.agent_id == agent_id,
            column.is_(None) if conversation_id is None else column == conversation_id,
        )
        async with self._database.write() as connection:
            await connection.execute(statement)

    async def overdue(self, before: float) -> list[WaitingCall]:
        """Return the calls that were asked before that time, oldest first; raises ``StorageUnavailable``."""
        return await self._read(select(waiting_calls).where(waiting_calls.c.asked_at < before))

    async def _read(self, statement: Select[Any]) -> list[WaitingCall]:
        statement = statement.order_by(waiting_calls.c.asked_at, waiting_calls.c.call_id)
        async with self._database.read() as connection:
            return list(_calls((await connection.execute(statement)).all()))


def _calls(rows: Sequence[Row[Any]]) -> Iterator[WaitingCall]:
    for row in rows:
        yield WaitingCall(
            call_id=row.call_id,
            owner=row.owner,
            agent_id=row.agent_id,
            conversation_id=row.conversation_id,
            chat=row.chat,
            is_ephemeral=row.is_ephemeral,
            name=row.name,
            asked_at=row.asked_at,
        )
