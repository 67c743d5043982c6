"""Users, whoever knows their passwords."""

import time
import unicodedata
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType
from sqlalchemy import ColumnElement, Row, Select, and_, delete, func, or_, select, tuple_, update

from gateway.errors import InvalidRequest
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import user_profiles
from gateway.storage.text import check_fit, fits
from gateway.storage.upsert import insert_into

MAX_EMAIL: Final = 254
"""Bytes of UTF-8: what fits into a path of SMTP (RFC 5321, 4.5.3.1.3)."""
MAX_METADATA: Final = 4_096
"""Bytes of a user's own JSON object."""


class Budget(msgspec.Struct, frozen=True):
    """What may be spent in a period of UTC's calendar, in millionths of a US dollar."""

    micros: int
    period: Literal["day", "month", "total"]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A user.

    ``email`` is empty where an identity service does not tell it. ``metadata`` is a JSON object of at most
    ``MAX_METADATA`` bytes, ``litellm_key`` is encrypted, times are UTC seconds.
    """

    id: str
    email: str
    name: str = ""
    metadata: bytes = b"{}"
    letta_agent_id: str | None = None
    litellm_key: str | None = None
    is_blocked: bool = False
    budget: Budget | None = None
    created_at: float
    updated_at: float

    def __repr__(self) -> str:
        """Show who it is, and no more: profiles get into logs and tracebacks."""
        return f"Profile(id={self.id!r})"


def canonical(email: str) -> str:
    """Return the one way in which an e-mail address is kept and looked for; raises ``InvalidRequest``."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", email.strip()).casefold())
    local, at, domain = folded.partition("@")
    is_plain = all(unicodedata.category(character) not in _UNSEEN for character in folded)
    if not (local and at and domain) or "@" in domain or not is_plain or len(folded.encode("utf-8")) > MAX_EMAIL:
        raise InvalidRequest("This is no e-mail address. Send one like name@example.com.", param="email")
    return folded


_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
"""Categories of characters that an address cannot hold: controls, marks of direction, half surrogates, blanks."""


class Profiles:
    """The users, by id and by e-mail as ``canonical`` returns it."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._now = now

    async def add(self, profile: Profile) -> bool:
        """Store a new user; False where the id or the e-mail is there already.

        Raises ``ValueError`` for what cannot be stored, and ``StorageUnavailable``.
        """
        _check(profile)
        async with self._database.write() as connection:
            return await insert_profile(connection, profile)

    async def find(self, user_id: str) -> Profile | None:
        """Return a user; raises ``StorageUnavailable``."""
        return await self._one(select(user_profiles).where(user_profiles.c.id == user_id)) if fits(user_id) else None

    async def find_by_email(self, email: str) -> Profile | None:
        """Return the user of an e-mail; raises ``StorageUnavailable``."""
        return await self._one(select(user_profiles).where(has_email(email))) if fits(email) else None

    async def take_email(self, user_id: str, email: str) -> Profile | None:
        """Give a user an e-mail that is theirs, whoever had it before, and return them; None where there is none.

        Only for who an identity service says that has it now. Raises ``ValueError`` for what cannot be stored, and
        ``StorageUnavailable``.
        """
        check_fit(user_id, email)
        async with self._database.write() as connection:
            await release_email(connection, user_id, email)
            statement = update(user_profiles).where(user_profiles.c.id == user_id)
            row = (
                await connection.execute(
                    statement.values(email=email, updated_at=self._now()).returning(*user_profiles.columns)
                )
            ).one_or_none()
        return None if row is None else _profile(row)

    async def add_with_email(self, profile: Profile) -> bool:
        """Store a new user with their e-mail, whoever had it before; False where the id is there already.

        Raises as ``take_email`` does.
        """
        _check(profile)
        async with self._database.write() as connection:
            await release_email(connection, profile.id, profile.email)
            return await insert_profile(connection, profile)

    async def change(
        self,
        user_id: str,
        *,
        name: str | UnsetType = UNSET,
        metadata: bytes | UnsetType = UNSET,
        letta_agent_id: str | UnsetType | None = UNSET,
        litellm_key: str | UnsetType | None = UNSET,
        is_blocked: bool | UnsetType = UNSET,
        budget: Budget | UnsetType | None = UNSET,
    ) -> Profile | None:
        """Change what is given, and return the user as it is then; None where there is none.

        Raises ``ValueError`` for what cannot be stored, and ``StorageUnavailable``.
        """
        given = {
            "name": name,
            "metadata": metadata,
            "letta_agent_id": letta_agent_id,
            "litellm_key": litellm_key,
            "is_blocked": is_blocked,
            "budget": budget,
        }
        values = _columns({field: value for field, value in given.items() if value is not UNSET})
        if not fits(user_id):
            return None
        statement = (
            update(user_profiles)
            .where(user_profiles.c.id == user_id)
            .values({**values, "updated_at": self._now()})
            .returning(*user_profiles.columns)
        )
        async with self._database.write() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _profile(row)

    async def delete(self, user_id: str) -> None:
        """Forget a user; that there is none is no error. Raises ``StorageUnavailable``."""
        if not fits(user_id):
            return
        async with self._database.write() as connection:
            await connection.execute(delete(user_profiles).where(user_profiles.c.id == user_id))

    async def page(self, after: str | None, limit: int, search: str | None) -> list[Profile]:
        """Return some users, oldest first, from behind the one of the id ``after``.

        ``search`` is part of an e-mail or a name. Raises ``InvalidRequest`` where ``after`` is nobody, and
        ``StorageUnavailable``.
        """
        if search is not None and not fits(search):
            return []
        statement = select(user_profiles).order_by(user_profiles.c.created_at, user_profiles.c.id).limit(limit)
        if search:
            statement = statement.where(_matches(search))
        if after is not None:
            last = await self.find(after)
            if last is None:
                raise InvalidRequest(
                    "This cursor is not known. Send one that the last page ended with.", param="cursor"
                )
            place = tuple_(user_profiles.c.created_at, user_profiles.c.id)
            statement = statement.where(place > tuple_(last.created_at, last.id))
        async with self._database.read() as connection:
            return [_profile(row) for row in await connection.execute(statement)]

    async def _one(self, statement: Select[Any]) -> Profile | None:
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else _profile(row)


def has_email(email: str) -> ColumnElement[bool]:
    """Return what is true of the user of an e-mail; said so that the index is used, which has no empty ones."""
    return and_(user_profiles.c.email == email, user_profiles.c.email != "")


async def release_email(connection: Connection, user_id: str, email: str) -> None:
    """Have nobody else the e-mail any more, within a transaction."""
    is_anothers = and_(has_email(email), user_profiles.c.id != user_id)
    await connection.execute(update(user_profiles).where(is_anothers).values(email=""))


async def insert_profile(connection: Connection, profile: Profile) -> bool:
    """Store a new user within a transaction; False where the id or the e-mail is there already."""
    fields = {name: getattr(profile, name) for name in profile.__struct_fields__}
    insert = insert_into(connection.dialect, user_profiles).values(_columns(fields)).on_conflict_do_nothing()
    return (await connection.execute(insert)).rowcount == 1


def _matches(search: str) -> ColumnElement[bool]:
    folded = search.casefold()
    return or_(
        user_profiles.c.email.contains(folded, autoescape=True),
        func.lower(user_profiles.c.name).contains(folded, autoescape=True),
    )


def _check(profile: Profile) -> None:
    check_fit(profile.id, profile.email)


def _columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of some fields; raises ``ValueError`` for what cannot be stored."""
    columns = dict(fields)
    if "metadata" in columns:
        if len(columns["metadata"]) > MAX_METADATA:
            raise ValueError(f"a user's metadata is at most {MAX_METADATA} bytes")
        columns["metadata"] = columns["metadata"].decode()
    if "budget" in columns:
        budget: Budget | None = columns.pop("budget")
        columns |= {"budget_micros": budget and budget.micros, "budget_period": budget and budget.period}
    check_fit(*(columns.get(field) for field in ("name", "letta_agent_id")))
    return columns


def _profile(row: Row[Any]) -> Profile:
    return Profile(
        id=row.id,
        email=row.email,
        name=row.name,
        metadata=row.metadata.encode(),
        letta_agent_id=row.letta_agent_id,
        litellm_key=row.litellm_key,
        is_blocked=row.is_blocked,
        budget=None if row.budget_micros is None else Budget(row.budget_micros, row.budget_period),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
