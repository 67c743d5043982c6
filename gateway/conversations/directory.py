"""Which Letta conversation a chat has, and what that conversation holds: kept over a restart."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec
from sqlalchemy import ColumnElement, Row, and_, delete, select

from gateway.conversations.divergence import DIGEST
from gateway.errors import ThreadLost
from gateway.storage.engine import Database
from gateway.storage.tables import pins
from gateway.storage.text import check_fit, fits
from gateway.storage.upsert import upsert

RECENT: Final = 1_024
"""Pins that are held in memory."""

Key: TypeAlias = tuple[str, str, str]
"""Owner, agent, chat."""


class Pinned(msgspec.Struct, frozen=True):
    """A chat's conversation.

    ``seen`` are digests of the messages that it holds, in order. ``is_settled`` is False from the begin of a turn until
    its outcome is known: what is left so (by a crash, a cancellation) is not to be trusted.
    """

    conversation_id: str
    seen: tuple[bytes, ...] = ()
    instructions: bytes | None = None
    is_settled: bool = True


class Directory:
    """The pinned conversations, by owner, agent and chat.

    ``remembers`` what was read and written last, where no other gateway writes or each tells by its leases that it did.
    """

    def __init__(self, database: Database, now: Callable[[], float] = time.time, *, remembers: bool = True) -> None:
        self._database = database
        self._now = now
        self._recent = RecentPins(RECENT if remembers else 0)

    async def find(self, owner: str, agent_id: str, chat: str, *, is_news: bool = False) -> Pinned | None:
        """Return the chat's conversation, which another gateway may have changed if it ``is_news``.

        Raises ``StorageUnavailable``.
        """
        key = (owner, agent_id, chat)
        recent = None if is_news else self._recent.get(key)
        if recent is not None or not all(map(fits, key)):
            return recent
        ticket = self._recent.ticket
        async with self._database.read() as connection:
            row = (await connection.execute(select(pins).where(_is(key)))).one_or_none()
        if row is None:
            return None
        pinned = _pinned(row)
        self._recent.found(key, pinned, ticket)
        return pinned

    async def pin(self, owner: str, agent_id: str, chat: str, pinned: Pinned, fence: int | None = None) -> str | None:
        """Give the chat this conversation; return the one that it had, if that is another.

        Raises ``ThreadLost`` where what is written down has a higher fence, ``ValueError`` for text that cannot be
        stored, and ``StorageUnavailable``.
        """
        key = (owner, agent_id, chat)
        check_fit(*key, pinned.conversation_id)
        row = {**_key_row(key), **_row(pinned), "pinned_at": self._now(), "fence": fence or 0}
        ticket = self._recent.begin(key)
        kept: Pinned | None = None
        try:
            async with self._database.write() as connection:
                held = select(pins.c.conversation_id, pins.c.fence).where(_is(key)).with_for_update()
                had = (await connection.execute(held)).one_or_none()
                if had is not None and fence is not None and had.fence > fence:
                    raise ThreadLost
                await connection.execute(upsert(connection.dialect, pins), [row])
            kept = pinned
        finally:
            self._recent.end(key, kept, ticket)
        return had.conversation_id if had is not None and had.conversation_id != pinned.conversation_id else None

    async def unpin(self, owner: str, agent_id: str, chat: str, fence: int | None = None) -> str | None:
        """Forget the chat's conversation, unless it has a higher fence, and return which it was.

        Raises ``StorageUnavailable``.
        """
        key = (owner, agent_id, chat)
        if not all(map(fits, key)):
            return None
        ticket = self._recent.begin(key)
        try:
            async with self._database.write() as connection:
                mine = _is(key) if fence is None else and_(_is(key), pins.c.fence <= fence)
                gone = await connection.execute(delete(pins).where(mine).returning(pins.c.conversation_id))
                conversation_id: str | None = gone.scalar_one_or_none()
        finally:
            self._recent.end(key, None, ticket)
        return conversation_id

    async def forget_agent(self, agent_id: str) -> None:
        """Forget all conversations of an agent that is no more; raises ``StorageUnavailable``."""
        if not fits(agent_id):
            return
        try:
            async with self._database.write() as connection:
                await connection.execute(delete(pins).where(pins.c.agent_id == agent_id))
        finally:
            self._recent.clear()


class RecentPins:
    """What was found or pinned last, in memory; only as right as the database.

    The ticket changes where a write begins and where it ends: what was read or written while another write was under
    way is not held.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pins: OrderedDict[Key, Pinned] = OrderedDict()
        self.ticket = 0

    def get(self, key: Key) -> Pinned | None:
        """Return what is held."""
        if key in self._pins:
            self._pins.move_to_end(key)
        return self._pins.get(key)

    def found(self, key: Key, pinned: Pinned, ticket: int) -> None:
        """Hold what was read since the ticket was taken."""
        if ticket == self.ticket:
            self._hold(key, pinned)

    def begin(self, key: Key) -> int:
        """Note the begin of a write, and return its ticket."""
        self.ticket += 1
        self._pins.pop(key, None)
        return self.ticket

    def end(self, key: Key, pinned: Pinned | None, ticket: int) -> None:
        """Note the end of a write; None: what the database holds now is nothing, or not known."""
        alone = ticket == self.ticket
        self.ticket += 1
        self._pins.pop(key, None)
        if alone and pinned is not None:
            self._hold(key, pinned)

    def clear(self) -> None:
        """Hold nothing."""
        self.ticket += 1
        self._pins.clear()

    def _hold(self, key: Key, pinned: Pinned) -> None:
        self._pins[key] = pinned
        while len(self._pins) > self._size:
            self._pins.popitem(last=False)


def _is(key: Key) -> ColumnElement[bool]:
    owner, agent_id, chat = key
    return and_(pins.c.owner == owner, pins.c.agent_id == agent_id, pins.c.chat == chat)


def _key_row(key: Key) -> dict[str, str]:
    return dict(zip(("owner", "agent_id", "chat"), key, strict=True))


def _row(pinned: Pinned) -> dict[str, Any]:
    if any(len(digest) != DIGEST for digest in pinned.seen):
        raise ValueError(f"a digest is {DIGEST} bytes")
    return {
        "conversation_id": pinned.conversation_id,
        "seen": b"".join(pinned.seen),
        "instructions": pinned.instructions,
        "is_settled": pinned.is_settled,
    }


def _pinned(row: Row[Any]) -> Pinned:
    seen = bytes(row.seen)
    digests = tuple(seen[start : start + DIGEST] for start in range(0, len(seen), DIGEST))
    return Pinned(row.conversation_id, digests, row.instructions, row.is_settled)
