"""What requests came to that may be sent again: a retry is answered the same, or refused, over a restart too."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import msgspec
from sqlalchemy import Connection, Row, bindparam, delete, select, update

from gateway.storage.engine import Database
from gateway.storage.group_commit import GroupCommit
from gateway.storage.tables import outcomes
from gateway.storage.text import check_fit, fits
from gateway.storage.upsert import insert_into, upsert
from gateway.tasks import TaskSet

MAX_BODY: Final = 2_097_152
"""Bytes of an answer that is kept."""
UNKNOWN: Final = 0
"""The status of an outcome whose answer is not kept, or not known to have ended."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; ``request`` is the digest of what was asked.

    ``ended_at`` is in UTC seconds; when it began, until it has ended.
    """

    owner: str
    key: str
    request: bytes
    status: int
    content_type: str
    body: bytes
    ended_at: float


class _Gone(msgspec.Struct, frozen=True):
    """An outcome that is to be forgotten."""

    owner: str
    key: str


_Entry: TypeAlias = Outcome | _Gone

_FORGET: Final = delete(outcomes).where(outcomes.c.owner == bindparam("of"), outcomes.c.key == bindparam("named"))
_FORGET_OLD: Final = _FORGET.where(outcomes.c.ended_at < bindparam("before"))


class Outcomes:
    """The answers that are kept, by owner and key."""

    def __init__(self, database: Database, tasks: TaskSet) -> None:
        self._database = database
        self._commits: GroupCommit[_Entry, None] = GroupCommit(database, tasks, _write)

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

    async def mark(self, outcome: Outcome) -> None:
        """Keep an outcome without an answer in the place of the one that the key has, together with others'.

        Raises ``ValueError`` for text that cannot be stored, and ``StorageUnavailable``.
        """
        check_fit(outcome.owner, outcome.key, outcome.content_type)
        await self._commits.submit(outcome)

    async def forget(self, owner: str, key: str) -> None:
        """Forget what the key's request came to; raises ``StorageUnavailable``."""
        if fits(owner) and fits(key):
            await self._commits.submit(_Gone(owner, key))

    async def forget_all(self, names: Iterable[tuple[str, str]], before: float) -> None:
        """Forget what was kept under these owners and keys before that time; raises ``StorageUnavailable``."""
        rows = [{"of": owner, "named": key, "before": before} for owner, key in names]
        if rows:
            async with self._database.write() as connection:
                await connection.execute(_FORGET_OLD, rows)

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


def _write(connection: Connection, entries: Sequence[_Entry]) -> list[None]:
    latest = {(entry.owner, entry.key): entry for entry in entries}
    gone = [{"of": owner, "named": key} for (owner, key), entry in latest.items() if isinstance(entry, _Gone)]
    kept = [msgspec.structs.asdict(entry) for entry in latest.values() if isinstance(entry, Outcome)]
    if gone:
        connection.execute(_FORGET, gone)
    if kept:
        connection.execute(upsert(connection.dialect, outcomes), kept)
    return [None] * len(entries)


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
