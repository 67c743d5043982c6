"""What turns took, by owner and day: read from the sums that the ledger keeps."""

import time
from collections.abc import Callable, Iterable
from datetime import date
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Row, and_, delete, func, select

from gateway.accounts.bookkeeping import SUMS
from gateway.accounts.periods import Period, is_day, period_of, span_of
from gateway.accounts.profiles import Budget
from gateway.errors import InvalidRequest
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import spending, turns, usage_metrics, user_profiles
from gateway.storage.text import fits

MOST_DAYS: Final = 366
"""Days of one report."""


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Sums of settled turns; money is in millionths of a US dollar."""

    turns: int = 0
    failed_turns: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost_micros: int = 0


class UsageRow(Sums, frozen=True, kw_only=True):
    """The sums of a day (UTC, by the turn's start), a model and an API."""

    day: str
    model: str
    source: str


class OwnerSums(Sums, frozen=True, kw_only=True):
    """The sums of an owner."""

    owner: str


class BudgetState(msgspec.Struct, frozen=True, kw_only=True):
    """How an owner's budget stands, in millionths of a US dollar; ``held`` is what running turns may still take."""

    period: Period
    limit_micros: int
    spent_micros: int
    held_micros: int

    @property
    def remaining_micros(self) -> int:
        """Return what is left for further turns."""
        return max(0, self.limit_micros - self.spent_micros - self.held_micros)


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner's turns took from the first to the last day, both included; oldest day first."""

    first_day: str
    last_day: str
    rows: tuple[UsageRow, ...]
    totals: Sums
    budget: BudgetState | None


class SettledTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the ledger, as its owner may have it; times are UTC seconds, ``ended_at`` None while it runs."""

    id: str
    source: str
    status: str
    model: str
    key_id: str | None
    conversation_id: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost_micros: int
    started_at: float
    ended_at: float | None


class Days(msgspec.Struct, frozen=True):
    """Some days in a row, both ends included, named as ``2026-11-21``."""

    first: str
    last: str

    @classmethod
    def between(cls, first: str, last: str) -> "Days":
        """Return the days; raises ``InvalidRequest`` where they are none, or too many."""
        for param, day in (("from", first), ("to", last)):
            if not is_day(day):
                raise InvalidRequest("This is no day. Send one like 2026-11-21.", param=param)
        count = (date.fromisoformat(last) - date.fromisoformat(first)).days + 1
        if not 1 <= count <= MOST_DAYS:
            raise InvalidRequest(f"Send a last day that is at most {MOST_DAYS} days from the first one.", param="to")
        return cls(first, last)


class UsageReports:
    """Reads what the ledger has written. Every method raises ``StorageUnavailable``."""

    def __init__(
        self, database: Database, *, default_budget: Budget | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._default_budget = default_budget
        self._now = now

    async def report(self, owner: str, days: Days) -> UsageReport:
        """Return what an owner's turns took."""
        async with self._database.read() as connection:
            rows = await _rows(connection, owner, days) if fits(owner) else ()
            budget = await self._budget(connection, owner) if fits(owner) else None
        return UsageReport(first_day=days.first, last_day=days.last, rows=rows, totals=_added_up(rows), budget=budget)

    async def budget(self, owner: str) -> BudgetState | None:
        """Return how an owner's budget stands; None where there is none."""
        if not fits(owner):
            return None
        async with self._database.read() as connection:
            return await self._budget(connection, owner)

    async def top_owners(self, days: Days, limit: int) -> list[OwnerSums]:
        """Return the owners who spent the most, those first."""
        sums = _sums()
        statement = (
            select(usage_metrics.c.owner, *sums)
            .where(_within(days))
            .group_by(usage_metrics.c.owner)
            .order_by(func.sum(usage_metrics.c.cost_micros).desc(), func.sum(usage_metrics.c.turns).desc(), "owner")
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [OwnerSums(owner=row.owner, **_counts(row)) for row in await connection.execute(statement)]

    async def totals(self, days: Days) -> Sums:
        """Return what the turns of all owners took together."""
        async with self._database.read() as connection:
            return Sums(**_counts((await connection.execute(select(*_sums()).where(_within(days)))).one()))

    async def turns_of(self, owner: str, limit: int, after: str | None = None) -> list[SettledTurn]:
        """Return turns of an owner's by their ids, from behind the one of the id ``after``: pages of an export."""
        if not fits(owner) or (after is not None and not fits(after)):
            return []
        columns = [turns.c[name] for name in SettledTurn.__struct_fields__]
        statement = select(*columns).where(turns.c.owner == owner).order_by(turns.c.id).limit(limit)
        if after is not None:
            statement = statement.where(turns.c.id > after)
        async with self._database.read() as connection:
            return [SettledTurn(**row) for row in (await connection.execute(statement)).mappings()]

    async def delete(self, owner: str) -> None:
        """Forget everything that an owner's turns took; a turn that is under way is forgotten, too."""
        if not fits(owner):
            return
        async with self._database.write() as connection:
            for table in (turns, spending, usage_metrics):
                await connection.execute(delete(table).where(table.c.owner == owner))

    async def _budget(self, connection: Connection, owner: str) -> BudgetState | None:
        columns = user_profiles.c.budget_micros, user_profiles.c.budget_period
        profile = (await connection.execute(select(*columns).where(user_profiles.c.id == owner))).one_or_none()
        if profile is None:
            return None  # only users have budgets
        budget = self._default_budget
        if profile.budget_micros is not None:
            budget = Budget(profile.budget_micros, profile.budget_period)
        if budget is None:
            return None
        spent, held = await _spent_and_held(connection, owner, period_of(budget.period, self._now()))
        return BudgetState(period=budget.period, limit_micros=budget.micros, spent_micros=spent, held_micros=held)


async def _rows(connection: Connection, owner: str, days: Days) -> tuple[UsageRow, ...]:
    columns = [usage_metrics.c[name] for name in UsageRow.__struct_fields__]
    statement = (
        select(*columns)
        .where(usage_metrics.c.owner == owner, _within(days))
        .order_by(usage_metrics.c.day, usage_metrics.c.model, usage_metrics.c.source)
    )
    return tuple(UsageRow(**row) for row in (await connection.execute(statement)).mappings())


async def _spent_and_held(connection: Connection, owner: str, period: str) -> tuple[int, int]:
    """Return what the ledger keeps for the period, or will begin it with."""
    kept = select(spending.c.spent_micros, spending.c.held_micros).where(
        spending.c.owner == owner, spending.c.period == period
    )
    row = (await connection.execute(kept)).one_or_none()
    if row is not None:
        return row.spent_micros, row.held_micros
    spent = select(func.sum(usage_metrics.c.cost_micros)).where(
        usage_metrics.c.owner == owner, _within(Days(*span_of(period)))
    )
    return int((await connection.execute(spent)).scalar_one() or 0), 0


def _within(days: Days) -> ColumnElement[bool]:
    return and_(usage_metrics.c.day >= days.first, usage_metrics.c.day <= days.last)


def _sums() -> list[ColumnElement[int]]:
    return [func.coalesce(func.sum(usage_metrics.c[name]), 0).label(name) for name in SUMS]


def _counts(row: Row[Any]) -> dict[str, int]:
    """Return the sums of a row: PostgreSQL adds whole numbers up to decimal ones."""
    return {name: int(getattr(row, name)) for name in SUMS}


def _added_up(rows: Iterable[UsageRow]) -> Sums:
    counted = list(rows)
    return Sums(**{name: sum(getattr(row, name) for row in counted) for name in SUMS})
