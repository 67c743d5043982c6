"""What the ledger writes in one transaction: turns that begin, with what they hold, and turns that are settled.

A handful of statements, however many turns: a statement takes as long as hundreds of rows. For every row of
``spending``, what is spent is the sum of ``usage_metrics`` over its period, and what is held is the sum of what the
running turns of that period hold. Gateways that share the database take rows in one order: turns, spending, usage,
each by its key.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias

import msgspec
from sqlalchemy import (
    Connection,
    Dialect,
    Row,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from gateway.accounts.periods import day_of, period_of, periods_of, span_of
from gateway.accounts.profiles import Budget
from gateway.storage.tables import spending, turns, usage_metrics, user_profiles
from gateway.storage.upsert import insert_into

Status: TypeAlias = Literal["complete", "failed", "interrupted", "unsent"]
Key: TypeAlias = tuple[str, str]
"""Owner and period."""
Refusal: TypeAlias = Literal["used_up", "held"]
"""Why a turn may not begin: its owner's budget is spent, or what is left of it is held by turns that run."""

RUNNING: Final = "running"
COUNTS: Final = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_micros")
LATEST: Final = 10
"""Turns of an owner's that tell what a further one may cost."""
SUMS: Final = ("turns", "failed_turns", *COUNTS)
_USAGE_KEY: Final = ("owner", "day", "model", "source")
_NOTHING_YET: Final = {"status": RUNNING, "model": "", **dict.fromkeys(COUNTS, 0)}


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that is about to be sent; ``started_at`` is in UTC seconds."""

    id: str
    owner: str
    source: str
    agent_id: str
    conversation_id: str | None
    key_id: str | None
    instance: str
    started_at: float


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """How a turn went; one that was not sent leaves no trace. ``ended_at`` is in UTC seconds."""

    id: str
    status: Status
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost_micros: int = 0
    ended_at: float


class _Limit(msgspec.Struct, frozen=True):
    """An owner's budget, and what a turn may cost: the most that one of the latest did; None where none tells."""

    budget: Budget
    likely_cost: int | None

    def key_of(self, turn: Begun) -> Key:
        return turn.owner, period_of(self.budget.period, turn.started_at)


class _Account(msgspec.Struct):
    """What was spent and is held in a period; ``taken`` is what this transaction holds of it."""

    spent: int
    held: int
    taken: int = 0

    def take(self, limit: _Limit) -> int | Refusal:
        """Hold what a turn may cost, or all that is left where that is not known; refuse it where nothing is left."""
        left = limit.budget.micros - self.spent
        room = left - self.held - self.taken
        if room < 1:
            return "used_up" if left < 1 else "held"
        hold = room if limit.likely_cost is None else max(1, min(limit.likely_cost, room))
        self.taken += hold
        return hold


class _Move(msgspec.Struct):
    """By how much a row of ``spending`` changes."""

    spent: int = 0
    held: int = 0


def lock(connection: Connection, begun: Iterable[Begun], settled: Iterable[Settled]) -> None:
    """Take the rows that are to be changed, in one order, where other gateways may want them at the same time."""
    if connection.dialect.name != "postgresql":
        return
    owners = {turn.owner for turn in begun}
    if ids := sorted({turn.id for turn in settled}):
        owners |= {row.owner for row in connection.execute(_RUNNING, [{"ids": ids}])}
    connection.execute(_LOCK, [{"owners": sorted(owners)}])


def settle(connection: Connection, settled: Iterable[Settled]) -> None:
    """Write down how turns went, each once: one that is not running (any more) stays as it is."""
    by_id = {turn.id: turn for turn in reversed(list(settled))}
    if not by_id:
        return
    rows: list[Row[Any]] = list(connection.execute(_RUNNING, [{"ids": sorted(by_id)}]))
    pairs = [(row, by_id[row.id]) for row in rows]
    sent = [(row, turn) for row, turn in pairs if turn.status != "unsent"]
    unsent = [{"turn_id": row.id} for row, turn in pairs if turn.status == "unsent"]
    if unsent:
        connection.execute(_REMOVE, unsent)
    if sent:
        connection.execute(_SETTLE, [_settlement(row, turn) for row, turn in sent])
    _move(connection, _settled_moves(pairs))
    if sent:
        connection.execute(_add_up(connection.dialect), _sums(sent))


def begin(connection: Connection, begun: Sequence[Begun], default: Budget | None) -> dict[str, Refusal]:
    """Write down turns whose owners' budgets have room; return why the others have none, by their ids.

    A turn holds the most that one of its owner's latest cost, at most what is left, and at least a millionth of a
    dollar. Where none of these tells what a turn costs it holds all that is left, so that there is one at a time.
    """
    limits = _limits(connection, {turn.owner for turn in begun if may_be_user(turn.owner)}, default)
    keys = {turn.id: limits[turn.owner].key_of(turn) for turn in begun if turn.owner in limits}
    accounts = _accounts(connection, set(keys.values()))
    refused: dict[str, Refusal] = {}
    rows: list[dict[str, Any]] = []
    for turn in begun:
        key = keys.get(turn.id)
        hold = 0 if key is None else accounts[key].take(limits[turn.owner])
        if isinstance(hold, str):
            refused[turn.id] = hold
        else:
            period = None if key is None else key[1]
            rows.append({**msgspec.structs.asdict(turn), **_NOTHING_YET, "held_micros": hold, "period": period})
    _move(connection, {key: _Move(held=account.taken) for key, account in accounts.items()})
    if rows:
        connection.execute(_BEGIN, rows)
    return refused


# Settling ------------------------------------------------------------------------------------------------------------


def _settlement(row: Row[Any], turn: Settled) -> dict[str, Any]:
    columns = msgspec.structs.asdict(turn)
    del columns["id"]
    # The clock may have been set back meanwhile.
    return {**columns, "turn_id": row.id, "held_micros": 0, "ended_at": max(turn.ended_at, row.started_at)}


def _settled_moves(pairs: Iterable[tuple[Row[Any], Settled]]) -> dict[Key, _Move]:
    moves: defaultdict[Key, _Move] = defaultdict(_Move)
    for row, turn in pairs:
        if not may_be_user(row.owner):
            continue
        for period in periods_of(day_of(row.started_at)):
            moves[row.owner, period].spent += turn.cost_micros
        if row.period is not None:
            moves[row.owner, row.period].held -= row.held_micros
    return moves


def _sums(pairs: Iterable[tuple[Row[Any], Settled]]) -> list[dict[str, Any]]:
    """Return the rows of ``usage_metrics`` by which these turns make it grow, one for each key."""
    sums: defaultdict[tuple[str, ...], dict[str, int]] = defaultdict(lambda: dict.fromkeys(SUMS, 0))
    for row, turn in pairs:
        added = sums[row.owner, day_of(row.started_at), turn.model, row.source]
        for name in COUNTS:
            added[name] += getattr(turn, name)
        added["turns"] += 1
        added["failed_turns"] += turn.status == "failed"
    return [{**dict(zip(_USAGE_KEY, key, strict=True)), **sums[key]} for key in sorted(sums)]


# Budgets -------------------------------------------------------------------------------------------------------------


def may_be_user(owner: str) -> bool:
    """Tell the operator's own names from users' ids: what only users have costs their turns no statement."""
    return owner != "local" and not owner.startswith("key_")


def _limits(connection: Connection, owners: AbstractSet[str], default: Budget | None) -> dict[str, _Limit]:
    """Return the limits of owners who have one; who is no user has none."""
    limits: dict[str, _Limit] = {}
    if not owners:
        return limits
    for row in connection.execute(_BUDGETS, [{"owners": sorted(owners)}]):
        budget = default if row.budget_micros is None else Budget(row.budget_micros, row.budget_period)
        if budget is not None:
            limits[row.id] = _Limit(budget, row.likely_cost)
    return limits


def _accounts(connection: Connection, keys: AbstractSet[Key]) -> dict[Key, _Account]:
    """Return what was spent and is held; a period that is new starts with what its days say already."""
    if not keys:
        return {}
    found = _find_accounts(connection, keys)
    if missing := sorted(keys - found.keys()):
        connection.execute(_start_period(connection.dialect), [_start(key) for key in missing])
        found = _find_accounts(connection, keys)
    return found


def _find_accounts(connection: Connection, keys: AbstractSet[Key]) -> dict[Key, _Account]:
    owners, periods = ({key[place] for key in keys} for place in (0, 1))
    rows = connection.execute(_SPENDING, [{"owners": sorted(owners), "periods": sorted(periods)}])
    found = {(row.owner, row.period): _Account(row.spent_micros, row.held_micros) for row in rows}
    return {key: account for key, account in found.items() if key in keys}


def _start(key: Key) -> dict[str, str]:
    owner, period = key
    return {"of": owner, "during": period, **span_of(period)._asdict()}


def _move(connection: Connection, moves: Mapping[Key, _Move]) -> None:
    """Change what is spent and held in the periods that are there; nobody's budget asks for the others."""
    rows = [
        {"of": owner, "during": period, "spent": move.spent, "held": move.held}
        for (owner, period), move in sorted(moves.items())
        if move.spent or move.held
    ]
    if rows:
        connection.execute(_MOVE, rows)


# Statements: making one takes as long as running it ------------------------------------------------------------------

_RUNNING: Final = (
    select(turns.c.id, turns.c.owner, turns.c.source, turns.c.period, turns.c.held_micros, turns.c.started_at)
    .where(turns.c.id.in_(bindparam("ids", expanding=True)), turns.c.status == RUNNING)
    .order_by(turns.c.id)
    .with_for_update()
)
_LOCK: Final = (
    select(spending.c.owner)
    .where(spending.c.owner.in_(bindparam("owners", expanding=True)))
    .order_by(spending.c.owner, spending.c.period)
    .with_for_update()
)
_SPENDING: Final = (
    select(spending)
    .where(
        spending.c.owner.in_(bindparam("owners", expanding=True)),
        spending.c.period.in_(bindparam("periods", expanding=True)),
    )
    .order_by(spending.c.owner, spending.c.period)
    .with_for_update()
)
_LATEST: Final = (
    select(turns.c.status, turns.c.cost_micros, (turns.c.prompt_tokens + turns.c.completion_tokens).label("tokens"))
    .where(turns.c.owner == user_profiles.c.id, turns.c.status != RUNNING)
    .order_by(turns.c.started_at.desc())
    .limit(LATEST)
    .correlate(user_profiles)
    .subquery()
)
_TELLS: Final = or_(_LATEST.c.cost_micros > 0, and_(_LATEST.c.status == "complete", _LATEST.c.tokens > 0))
"""What was cut, or has no price yet, says nothing of what the next one costs; what came to its end for nothing does."""
_LIKELY_COST: Final = (
    select(func.max(_LATEST.c.cost_micros))
    .where(_TELLS)
    .correlate(user_profiles)
    .scalar_subquery()
    .label("likely_cost")
)
_BUDGETS: Final = select(
    user_profiles.c.id, user_profiles.c.budget_micros, user_profiles.c.budget_period, _LIKELY_COST
).where(user_profiles.c.id.in_(bindparam("owners", expanding=True)))
_EARLIER: Final = turns.alias("earlier")
USUAL_PROMPT: Final = select(
    func.coalesce(
        select(_EARLIER.c.prompt_tokens)
        .where(_EARLIER.c.owner == turns.c.owner, _EARLIER.c.status == "complete")
        .order_by(_EARLIER.c.started_at.desc())
        .limit(1)
        .correlate(turns)
        .scalar_subquery(),
        0,
    )
).where(turns.c.id == bindparam("turn_id"), turns.c.held_micros > 0)
"""The prompt tokens of the latest whole turn of the same owner, for a turn that holds some of a budget."""
_BEGIN: Final = insert(turns)
_SETTLE: Final = update(turns).where(turns.c.id == bindparam("turn_id"))
_REMOVE: Final = delete(turns).where(turns.c.id == bindparam("turn_id"))
_MOVE: Final = (
    update(spending)
    .where(spending.c.owner == bindparam("of"), spending.c.period == bindparam("during"))
    .values(
        spent_micros=spending.c.spent_micros + bindparam("spent"),
        held_micros=spending.c.held_micros + bindparam("held"),
    )
)


@lru_cache(maxsize=2)
def _add_up(dialect: Dialect) -> postgresql.Insert | sqlite.Insert:
    statement = insert_into(dialect, usage_metrics)
    return statement.on_conflict_do_update(
        index_elements=list(usage_metrics.primary_key),
        set_={name: usage_metrics.c[name] + statement.excluded[name] for name in SUMS},
    )


@lru_cache(maxsize=2)
def _start_period(dialect: Dialect) -> postgresql.Insert | sqlite.Insert:
    spent_already = select(
        bindparam("of", type_=Text),
        bindparam("during", type_=Text),
        func.coalesce(func.sum(usage_metrics.c.cost_micros), 0),
        literal(0),
    ).where(
        usage_metrics.c.owner == bindparam("of", type_=Text),
        usage_metrics.c.day.between(bindparam("first_day"), bindparam("last_day")),
    )
    return insert_into(dialect, spending).from_select(list(spending.c), spent_already).on_conflict_do_nothing()
