"""Responses that clients asked to store."""

from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Row, and_, delete, insert, select, update

from gateway.storage.engine import Database
from gateway.storage.tables import responses
from gateway.storage.text import check_fit, fits


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response; ``input_items`` is a JSON array, ``response`` a JSON object, ``created_at`` in UTC seconds."""

    id: str
    owner: str
    agent_id: str
    conversation_id: str | None
    previous_id: str | None
    input_items: bytes
    response: bytes
    status: str
    created_at: float


class Responses:
    """The stored responses, by owner and id: another owner's is none."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, stored: StoredResponse) -> None:
        """Store a new response; raises ``ValueError`` for text that cannot be stored, and ``StorageUnavailable``."""
        _check(stored)
        async with self._database.write() as connection:
            await connection.execute(insert(responses), [msgspec.structs.asdict(stored)])

    async def find(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return a response; raises ``StorageUnavailable``."""
        if not fits(owner) or not fits(response_id):
            return None
        async with self._database.read() as connection:
            row = (await connection.execute(select(responses).where(_is(owner, response_id)))).one_or_none()
        return None if row is None else _stored(row)

    async def update(self, stored: StoredResponse) -> bool:
        """Replace a response; False where it is not there (any more): what was deleted stays so.

        Raises ``ValueError`` for text that cannot be stored, and ``StorageUnavailable``.
        """
        _check(stored)
        statement = update(responses).where(_is(stored.owner, stored.id)).values(msgspec.structs.asdict(stored))
        async with self._database.write() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response; False where it is not there. Raises ``StorageUnavailable``."""
        if not fits(owner) or not fits(response_id):
            return False
        async with self._database.write() as connection:
            return (await connection.execute(delete(responses).where(_is(owner, response_id)))).rowcount == 1

    async def delete_all(self, owner: str) -> None:
        """Delete all responses of an owner; raises ``StorageUnavailable``."""
        if not fits(owner):
            return
        async with self._database.write() as connection:
            await connection.execute(delete(responses).where(responses.c.owner == owner))

    async def purge(self, before: float) -> None:
        """Delete what was created before that time, in UTC seconds; raises ``StorageUnavailable``."""
        async with self._database.write() as connection:
            await connection.execute(delete(responses).where(responses.c.created_at < before))


def _is(owner: str, response_id: str) -> ColumnElement[bool]:
    return and_(responses.c.owner == owner, responses.c.id == response_id)


def _check(stored: StoredResponse) -> None:
    check_fit(stored.id, stored.owner, stored.agent_id, stored.conversation_id, stored.previous_id, stored.status)


def _stored(row: Row[Any]) -> StoredResponse:
    return StoredResponse(
        id=row.id,
        owner=row.owner,
        agent_id=row.agent_id,
        conversation_id=row.conversation_id,
        previous_id=row.previous_id,
        input_items=row.input_items,
        response=row.response,
        status=row.status,
        created_at=row.created_at,
    )
