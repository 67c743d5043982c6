"""What requests with an idempotency key came to: a retry is answered the same, over a restart too."""

from typing import Any, Final

import msgspec
from sqlalchemy import Row, delete, select, update

from gateway.storage.engine import Database
from gateway.storage.tables import outcomes
from gateway.storage.text import check_fit, fits
from gateway.storage.upsert import insert_into, upsert

MAX_BODY: Final = 2_097_152
"""Bytes of an answer that is kept."""
UNKNOWN: Final = 0
"""The status of an outcome whose answer is not kept, or not known to have ended."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; ``request`` is the digest of what was asked, ``ended_at`` is in UTC seconds."""

    owner: str
    key: str
    request: bytes
    status: int
    content_type: str
    body: bytes
    ended_at: float


class Outcomes:
    """The answers that are kept, by owner and key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, owner: str, key: str) -> Outcome | None:
        """Return what the key's request came to; raises ``StorageUnavailable``."""
        if not fits(owner) or not fits(key):
            return None
        statement = select(outcomes).where(outcomes.c.owner == owner, outcomes.c.key == key)
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _outcome(row)

    async def keep(self, outcome: Outcome) -> Outcome:
        """Keep an outcome unless the key has one; return the one that stands.

        Raises ``ValueError`` for a body over ``MAX_BODY`` or text that cannot be stored, and ``StorageUnavailable``.
        """
        check_fit(outcome.owner, outcome.key, outcome.content_type)
        if len(outcome.body) > MAX_BODY:
            raise ValueError(f"an outcome's body is at most {MAX_BODY} bytes")
        async with self._database.write() as connection:
            insert = insert_into(connection.dialect, outcomes).values(msgspec.structs.asdict(outcome))
            # A row that is there is set to its own owner, so that it is returned, and cannot be purged in between.
            insert = insert.on_conflict_do_update(
                index_elements=list(outcomes.primary_key), set_={"owner": insert.excluded.owner}
            )
            row = (await connection.execute(insert.returning(*outcomes.columns))).one()
        return _outcome(row)

    async def replace(self, outcome: Outcome) -> None:
        """Keep an outcome in the place of the one that the key has.

        Raises ``ValueError`` for a body over ``MAX_BODY`` or text that cannot be stored, and ``StorageUnavailable``.
        """
        check_fit(outcome.owner, outcome.key, outcome.content_type)
        if len(outcome.body) > MAX_BODY:
            raise ValueError(f"an outcome's body is at most {MAX_BODY} bytes")
        async with self._database.write() as connection:
            await connection.execute(upsert(connection.dialect, outcomes), [msgspec.structs.asdict(outcome)])

    async def forget(self, owner: str, key: str) -> None:
        """Forget what the key's request came to; raises ``StorageUnavailable``."""
        if not fits(owner) or not fits(key):
            return
        async with self._database.write() as connection:
            await connection.execute(delete(outcomes).where(outcomes.c.owner == owner, outcomes.c.key == key))

    async def blank(self, owner: str) -> None:
        """Keep no answer of an owner's any more, but that each was given; raises ``StorageUnavailable``."""
        if not fits(owner):
            return
        statement = update(outcomes).where(outcomes.c.owner == owner).values(status=UNKNOWN, body=b"")
        async with self._database.write() as connection:
            await connection.execute(statement)

    async def purge(self, before: float) -> None:
        """Forget what ended before that time, in UTC seconds; raises ``StorageUnavailable``."""
        async with self._database.write() as connection:
            await connection.execute(delete(outcomes).where(outcomes.c.ended_at < before))


def _outcome(row: Row[Any]) -> Outcome:
    return Outcome(
        owner=row.owner,
        key=row.key,
        request=row.request,
        status=row.status,
        content_type=row.content_type,
        body=row.body,
        ended_at=row.ended_at,
    )
