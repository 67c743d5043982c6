"""Personal API keys of users: 256 random bits, shown once and kept as their hash."""

import hashlib
import secrets as chance
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import msgspec
from sqlalchemy import Row, delete, func, insert, select, update

from gateway.accounts.secrets import CHECK, Secrets
from gateway.errors import InvalidRequest
from gateway.storage.engine import Database
from gateway.storage.tables import user_keys
from gateway.storage.text import fits

PREFIX: Final = "sk-lg-"
SECRET: Final = 43
"""Characters of 32 random bytes."""
HINT: Final = 4
"""Characters of a key's end that are kept readable: of its check part, none of its secret."""
MAX_NAME: Final = 100
"""Characters of a key's name."""
MOST_KEYS: Final = 100
"""Keys of one user."""
USE_NOTED: Final = 600.0
"""Seconds between two notes of a key's use."""


class UserKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as its user sees it later; ``hint`` is its end, times are UTC seconds."""

    id: str
    user_id: str
    name: str
    hint: str
    created_at: float
    last_used_at: float | None = None


class UserKeys:
    """The users' keys: another user's is none."""

    def __init__(self, database: Database, secrets: Secrets, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._secrets = secrets
        self._now = now

    async def make(self, user_id: str, name: str) -> tuple[UserKey, str]:
        """Make a key, and return it with its plain text, which is nowhere else.

        Raises ``InvalidRequest`` for a name that is none and for one key too many, and ``StorageUnavailable``.
        """
        plaintext = self._secrets.with_check(PREFIX + chance.token_urlsafe(32))
        key = UserKey(
            id=str(uuid.uuid4()),
            user_id=user_id,
            name=_checked(name),
            hint=plaintext[-HINT:],
            created_at=self._now(),
        )
        async with self._database.write() as connection:
            count = select(func.count()).select_from(user_keys).where(user_keys.c.user_id == user_id)
            if (await connection.execute(count)).scalar_one() >= MOST_KEYS:
                raise InvalidRequest(f"You have {MOST_KEYS} keys already. Delete one first.", code="too_many_keys")
            await connection.execute(insert(user_keys), [{**msgspec.structs.asdict(key), "hash": _digest(plaintext)}])
        return key, plaintext

    async def list(self, user_id: str) -> list[UserKey]:
        """Return a user's keys, newest first; raises ``StorageUnavailable``."""
        if not fits(user_id):
            return []
        newest = (user_keys.c.created_at.desc(), user_keys.c.id)
        statement = select(user_keys).where(user_keys.c.user_id == user_id).order_by(*newest)
        async with self._database.read() as connection:
            return [_key(row) for row in await connection.execute(statement)]

    async def delete(self, user_id: str, key_id: str) -> bool:
        """Delete a user's key; False where it is not there. Raises ``StorageUnavailable``."""
        if not fits(user_id) or not fits(key_id):
            return False
        statement = delete(user_keys).where(user_keys.c.user_id == user_id, user_keys.c.id == key_id)
        async with self._database.write() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def find(self, plaintext: str) -> UserKey | None:
        """Return the key of a plain text, and note its use; raises ``StorageUnavailable``.

        What was made up is refused by its check part: a flood of it never reaches the database.
        """
        is_whole = len(plaintext) == len(PREFIX) + SECRET + CHECK and plaintext.startswith(PREFIX)
        if not is_whole or not self._secrets.is_ours(plaintext):
            return None
        async with self._database.read() as connection:
            statement = select(user_keys).where(user_keys.c.hash == _digest(plaintext))
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            return None
        key = _key(row)
        await self._note_use(key)
        return key

    async def _note_use(self, key: UserKey) -> None:
        now = self._now()
        if key.last_used_at is not None and key.last_used_at <= now < key.last_used_at + USE_NOTED:
            return
        async with self._database.write() as connection:
            await connection.execute(update(user_keys).where(user_keys.c.id == key.id).values(last_used_at=now))


def _checked(name: str) -> str:
    text = name.strip()
    if not 0 < len(text) <= MAX_NAME or not text.isprintable():
        raise InvalidRequest(f"A key's name is one line of 1 to {MAX_NAME} characters: change it.", param="name")
    return text


def _digest(plaintext: str) -> bytes:
    return hashlib.sha256(plaintext.encode("utf-8", "surrogatepass")).digest()


def _key(row: Row[Any]) -> UserKey:
    return UserKey(
        id=row.id,
        user_id=row.user_id,
        name=row.name,
        hint=row.hint,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
    )
