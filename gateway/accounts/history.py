"""What users and their agents said to each other by the platform API.

A message of the user's is written with the answer that it is to get, before anything is sent: both or neither. The
answer is ``running`` until it is ended, once. What it took stands in the ledger alone, by the turn's name.
"""

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Integer, Row, Select, and_, bindparam, delete, func, insert, select, update

from gateway.accounts.errors import MessageNotFound
from gateway.accounts.instances import Instances
from gateway.errors import IdempotencyConflict
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import messages, turns
from gateway.storage.text import check_fit, fits
from gateway.translation.content import replaced
from gateway.translation.platform_types import (
    HistoryPage,
    Message,
    MessageStatus,
    MessageUsage,
    ToolActivity,
    dollars,
)

MAX_PAGE: Final = 4_194_304
"""Characters of one page, unless a single message is longer: a hundred long messages must not fill the memory."""
DELETED: Final = 10_000
"""Messages that one transaction deletes: others write too."""
EXPORTED: Final = 100
"""Messages that an export reads at once."""

_encode: Final = msgspec.json.Encoder().encode
_ACTIVITY: Final = msgspec.json.Decoder(tuple[ToolActivity, ...])


class Exchange(msgspec.Struct, frozen=True):
    """A user's message and the answer to it, by their names; ``is_named`` where a repeated request has the same."""

    user_id: str
    question_id: str
    answer_id: str
    is_named: bool = False


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as it stands at its end."""

    status: MessageStatus
    text: str
    reasoning: str = ""
    activity: tuple[ToolActivity, ...] = ()
    error_code: str | None = None
    turn_id: str | None = None


def new_exchange(user_id: str, key: str | None = None) -> Exchange:
    """Return names for a message and its answer: with a key, those of the user's request that had it before."""
    if key is None:
        return Exchange(user_id, _id(uuid.uuid4().bytes), _id(uuid.uuid4().bytes))
    named = hashlib.blake2b(f"{user_id}\n{key}".encode(), digest_size=32).digest()
    return Exchange(user_id, _id(named[:16]), _id(named[16:]), is_named=True)


def _id(made_of: bytes) -> str:
    return f"msg_{made_of.hex()}"


class History:
    """The messages of all users. Every method raises ``StorageUnavailable``."""

    def __init__(self, database: Database, instances: Instances, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._instances = instances
        self._now = now

    async def begin(self, exchange: Exchange, text: str) -> Message:
        """Write down a user's message, with a place for its answer, and return it.

        One of the same name that failed is replaced; raises ``IdempotencyConflict`` where one did not.
        """
        check_fit(exchange.user_id)
        now = self._now()
        question = Message(
            id=exchange.question_id, role="user", status="complete", text=replaced(text), created_at=now, ended_at=now
        )
        answer = Message(id=exchange.answer_id, role="assistant", status="running", text="", created_at=now)
        rows = [self._row(exchange.user_id, message) for message in (question, answer)]
        async with self._database.write() as connection:
            if exchange.is_named:
                await _make_room(connection, exchange)
            await connection.execute(insert(messages), rows)
        return question

    async def note_turn(self, exchange: Exchange, turn_id: str) -> None:
        """Write down by which turn an answer comes."""
        statement = update(messages).where(_is(exchange)).values(turn_id=turn_id)
        async with self._database.write() as connection:
            await connection.execute(statement)

    async def end(self, exchange: Exchange, ended: Ended) -> Message | None:
        """End an answer, and return it as it is kept; None where it was deleted meanwhile.

        It is this gateway's to say how it ended, even where another one has taken this one for dead.
        """
        statement = (
            update(messages)
            .where(_is(exchange))
            .values(
                status=ended.status,
                turn_id=ended.turn_id,
                text=replaced(ended.text),
                reasoning=replaced(ended.reasoning),
                activity=_encode(ended.activity).decode(),
                error_code=ended.error_code,
                ended_at=self._now(),
            )
        )
        async with self._database.write() as connection:
            await connection.execute(statement)
            row = (await connection.execute(KEPT.where(_is(exchange)))).one_or_none()
        return None if row is None else _message(row)

    async def refuse(self, exchange: Exchange, error_code: str | None) -> None:
        """Call a message failed that the agent surely never got, and its answer with it."""
        statement = (
            update(messages)
            .where(_is_either(exchange))
            .values(status="failed", error_code=error_code, ended_at=self._now())
        )
        async with self._database.write() as connection:
            await connection.execute(statement)

    async def page(self, user_id: str, before: str | None, limit: int) -> HistoryPage:
        """Return a user's newest messages, newest first: those before the message ``before``, ``limit`` at most.

        There are fewer where they are long. Raises ``MessageNotFound`` where ``before`` is no message of this user's.
        """
        async with self._database.read() as connection:
            place = {"user": user_id, "before": NEWEST}
            if before is not None:
                place["before"] = await _position(connection, user_id, before)
            sizes = list(await connection.execute(SIZES, {**place, "most": limit + 1}))
            last = _last_that_fits(sizes, limit)
            if last is None:
                return HistoryPage([], None)
            data = [_message(row) for row in await connection.execute(PAGE, {**place, "last": last})]
        has_more = bool(sizes) and sizes[-1].position < last
        return HistoryPage(data, data[-1].id if data and has_more else None)

    async def export(self, user_id: str) -> AsyncIterator[Message]:
        """Yield all messages of a user, newest first."""
        cursor: str | None = None
        while True:
            try:
                page = await self.page(user_id, cursor, EXPORTED)
            except MessageNotFound:
                return  # deleted while it was exported: nothing older is left
            for message in page.data:
                yield message
            cursor = page.next_cursor
            if cursor is None:
                return

    async def delete(self, user_id: str) -> None:
        """Forget all messages that a user has by now; an answer under way is not kept any more."""
        if not fits(user_id):
            return
        place = messages.c.position
        async with self._database.read() as connection:
            newest = select(func.max(place)).where(messages.c.user_id == user_id)
            last = (await connection.execute(newest)).scalar_one()
        if last is None:
            return
        await delete_messages(self._database, and_(messages.c.user_id == user_id, place <= last))

    async def reconcile(self) -> int:
        """Call ``interrupted`` what was running in gateways that are no more; return how many answers that were."""
        running = messages.c.status == "running"
        async with self._database.read() as connection:
            begun_by = set((await connection.execute(select(messages.c.instance).where(running).distinct())).scalars())
        gone = await self._instances.gone(begun_by)
        if not gone:
            return 0
        statement = (
            update(messages)
            .where(running, messages.c.instance.in_(sorted(gone)))
            .values(status="interrupted", ended_at=self._now())
        )
        async with self._database.write() as connection:
            return (await connection.execute(statement)).rowcount

    def _row(self, user_id: str, message: Message) -> dict[str, Any]:
        return {
            "id": message.id,
            "user_id": user_id,
            "instance": self._instances.id,
            "role": message.role,
            "status": message.status,
            "text": message.text,
            "reasoning": message.reasoning,
            "activity": "[]",
            "created_at": message.created_at,
            "ended_at": message.ended_at,
        }


async def delete_messages(database: Database, concerned: ColumnElement[bool]) -> None:
    """Delete messages some at a time: all of them at once may take longer than a statement may."""
    some = select(messages.c.position).where(concerned).limit(DELETED).scalar_subquery()
    deleted = DELETED
    while deleted == DELETED:
        async with database.write() as connection:
            deleted = (await connection.execute(delete(messages).where(messages.c.position.in_(some)))).rowcount


# Statements ----------------------------------------------------------------------------------------------------------


def _is(exchange: Exchange) -> ColumnElement[bool]:
    return and_(messages.c.user_id == exchange.user_id, messages.c.id == exchange.answer_id)


def _is_either(exchange: Exchange) -> ColumnElement[bool]:
    ids = (exchange.question_id, exchange.answer_id)
    return and_(messages.c.user_id == exchange.user_id, messages.c.id.in_(ids))


async def _make_room(connection: Connection, exchange: Exchange) -> None:
    failed = and_(_is_either(exchange), messages.c.status == "failed")
    await connection.execute(delete(messages).where(failed))
    if (await connection.execute(select(messages.c.id).where(_is_either(exchange)))).first() is not None:
        raise IdempotencyConflict


async def _position(connection: Connection, user_id: str, message_id: str) -> int:
    statement = select(messages.c.position).where(messages.c.id == message_id, messages.c.user_id == user_id)
    found = (await connection.execute(statement)).scalar_one_or_none() if fits(message_id) else None
    if found is None:
        raise MessageNotFound
    return int(found)


def _kept() -> Select[Any]:
    """Return what selects messages, each with what the ledger says of its turn."""
    ledger = and_(turns.c.id == messages.c.turn_id, turns.c.owner == messages.c.user_id, turns.c.status != "running")
    return select(
        *(column for column in messages.columns if column.name not in ("user_id", "instance", "turn_id")),
        turns.c.id.label("settled"),
        turns.c.model,
        turns.c.prompt_tokens,
        turns.c.completion_tokens,
        turns.c.cached_tokens,
        turns.c.reasoning_tokens,
        turns.c.cost_micros,
    ).select_from(messages.outerjoin(turns, ledger))


def _newest_first(statement: Select[Any]) -> Select[Any]:
    place = messages.c.position
    return statement.where(messages.c.user_id == bindparam("user"), place < bindparam("before")).order_by(place.desc())


# Made once: making one takes as long as running it.
KEPT: Final = _kept()
PAGE: Final = _newest_first(KEPT).where(messages.c.position >= bindparam("last"))
SIZES: Final = _newest_first(
    select(
        messages.c.position,
        (func.length(messages.c.text) + func.length(messages.c.reasoning) + func.length(messages.c.activity)).label(
            "size"
        ),
    )
).limit(bindparam("most", type_=Integer))
NEWEST: Final = 2**62
"""A position before which all messages are."""


def _last_that_fits(sizes: list[Row[Any]], limit: int) -> int | None:
    """Return the position of the last message that goes into a page; None where there is none."""
    last: int | None = None
    room = MAX_PAGE
    for row in sizes[:limit]:
        room -= row.size
        if last is not None and room < 0:
            break
        last = row.position
    return last


def _message(row: Row[Any]) -> Message:
    return Message(
        id=row.id,
        role=row.role,
        status=row.status,
        text=row.text,
        reasoning=row.reasoning,
        activity=_ACTIVITY.decode(row.activity),
        error_code=row.error_code,
        created_at=row.created_at,
        ended_at=row.ended_at,
        usage=None if row.settled is None else _usage(row),
    )


def _usage(row: Row[Any]) -> MessageUsage:
    return MessageUsage(
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        total_tokens=row.prompt_tokens + row.completion_tokens,
        cached_tokens=row.cached_tokens,
        reasoning_tokens=row.reasoning_tokens,
        cost=dollars(row.cost_micros),
        model=row.model,
    )
