from collections.abc import AsyncIterator

import pytest

from gateway.accounts.profiles import Budget
from gateway.accounts.usage import MOST_DAYS, BudgetState, Days, SettledTurn, Sums, UsageReports, UsageRow
from gateway.errors import InvalidRequest
from gateway.storage.engine import Database
from gateway.storage.tables import spending, turns, usage_metrics
from gateway.translation.agent_events import Usage
from tests.accounts.ledgers import COST, NOON, USED, House, house_on
from tests.storage.texts import UNSTORABLE

DAY = 86_400.0
TODAY = Days("2026-11-21", "2026-11-21")
YEAR = Days("2026-01-01", "2026-12-31")


@pytest.fixture
async def house(database: Database) -> AsyncIterator[House]:
    async with house_on(database) as made:
        yield made


def reports_of(house: House, default: Budget | None = None) -> UsageReports:
    return UsageReports(house.database, default_budget=default, now=house.clock)


async def take(house: House, owner: str = "anna", agent_id: str = "agent-1", *, at: float = NOON) -> str:
    house.clock.at = at
    turn_id = await house.open(owner, agent_id)
    await house.ledger.close(turn_id, USED, "complete")
    house.clock.at = NOON
    return turn_id


# Days ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last"),
    [("2026-11-21", "2026-11-21"), ("2023-12-31", "2024-12-30"), ("2024-01-01", "2024-12-31")],
)
def test_days(first: str, last: str) -> None:
    assert Days.between(first, last) == Days(first, last)


@pytest.mark.parametrize(
    ("first", "last", "param"),
    [
        ("2026-11-22", "2026-11-21", "to"),
        ("2025-01-01", "2026-01-02", "to"),
        ("yesterday", "2026-11-21", "from"),
        ("2026-02-30", "2026-11-21", "from"),
        ("2026-11-21", "", "to"),
        ("2026-11-21", "2026-11-21' or '1'='1", "to"),
    ],
)
def test_days_that_are_none(first: str, last: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Days.between(first, last)
    assert refused.value.param == param
    assert "or '1'" not in refused.value.message


def test_longest_report() -> None:
    assert MOST_DAYS == 366
    Days.between("2025-01-01", "2026-01-01")


# An owner's report ---------------------------------------------------------------------------------------------------


async def test_report_of_nobody(house: House) -> None:
    report = await reports_of(house).report("anna", TODAY)
    assert (report.rows, report.totals, report.budget) == ((), Sums(), None)
    assert (report.first_day, report.last_day) == ("2026-11-21", "2026-11-21")


async def test_report_has_rows_by_day_model_and_source(house: House) -> None:
    await take(house, at=NOON - DAY)
    await take(house)
    await take(house, agent_id="agent-9")
    failed = await house.open()
    await house.ledger.close(failed, Usage(1, 1, 1, 1), "failed")
    await take(house, "ben")
    await house.open()
    report = await reports_of(house).report("anna", YEAR)

    def row(day: str, model: str = "scripted/model", **counts: int) -> UsageRow:
        return UsageRow(day=day, model=model, source="chat_completions", **counts)

    assert report.rows == (
        row("2026-11-20", turns=1, prompt_tokens=100, completion_tokens=20, cost_micros=COST),
        row("2026-11-21", "", turns=1, prompt_tokens=100, completion_tokens=20, cost_micros=1_200),
        row(
            "2026-11-21",
            turns=2,
            failed_turns=1,
            prompt_tokens=101,
            completion_tokens=21,
            cached_tokens=1,
            reasoning_tokens=1,
            cost_micros=COST + 3,
        ),
    )
    assert report.totals == Sums(
        turns=4,
        failed_turns=1,
        prompt_tokens=301,
        completion_tokens=61,
        cached_tokens=1,
        reasoning_tokens=1,
        cost_micros=2 * COST + 1_203,
    )


async def test_days_of_a_report_are_included_at_both_ends(house: House) -> None:
    for number in range(5):
        await take(house, at=NOON - number * DAY)
    report = await reports_of(house).report("anna", Days("2026-11-18", "2026-11-20"))
    assert [row.day for row in report.rows] == ["2026-11-18", "2026-11-19", "2026-11-20"]


async def test_owner_that_cannot_be(house: House) -> None:
    reports = reports_of(house)
    for owner in UNSTORABLE:
        assert (await reports.report(owner, TODAY)).rows == ()
        assert await reports.budget(owner) is None
        assert await reports.turns_of(owner, 10) == []
        assert await reports.turns_of("anna", 10, owner) == []
        await reports.delete(owner)


# Budgets -------------------------------------------------------------------------------------------------------------


async def test_budget_and_how_it_stands(house: House) -> None:
    await house.user(budget=Budget(1_000, "day"))
    reports = reports_of(house)
    state = BudgetState(period="day", limit_micros=1_000, spent_micros=0, held_micros=0)
    assert await reports.budget("anna") == state
    await take(house)
    running = await house.open()
    report = await reports.report("anna", TODAY)
    assert report.budget == BudgetState(period="day", limit_micros=1_000, spent_micros=COST, held_micros=COST)
    assert report.budget is not None
    assert report.budget.remaining_micros == 1_000 - 2 * COST
    await house.ledger.close(running, Usage(10_000, 0), "complete")
    spent = await reports.budget("anna")
    assert spent is not None
    assert (spent.spent_micros, spent.held_micros, spent.remaining_micros) == (10_000 + COST, 0, 0)


async def test_budget_of_a_period_without_a_turn_yet(house: House) -> None:
    await house.user()
    await take(house)
    await take(house, at=NOON - DAY)
    for period, spent in (("day", COST), ("month", 2 * COST), ("total", 2 * COST)):
        await house.profiles.change("anna", budget=Budget(1_000, period))  # type: ignore[arg-type]
        state = await reports_of(house).budget("anna")
        assert state is not None
        assert (state.spent_micros, state.held_micros) == (spent, 0)
    assert await house.rows(spending) == []


async def test_default_budget_is_that_of_users_alone(house: House) -> None:
    reports = reports_of(house, Budget(5, "month"))
    await house.user()
    state = await reports.budget("anna")
    assert state == BudgetState(period="month", limit_micros=5, spent_micros=0, held_micros=0)
    assert await reports.budget("local") is None


# All owners ----------------------------------------------------------------------------------------------------------


async def test_owners_who_spent_the_most(house: House) -> None:
    for owner, count in (("anna", 1), ("ben", 3), ("local", 2), ("carl", 1)):
        for _ in range(count):
            await take(house, owner)
    await take(house, "dora", at=NOON - DAY)
    reports = reports_of(house)
    top = await reports.top_owners(TODAY, 3)
    assert [(sums.owner, sums.turns, sums.cost_micros) for sums in top] == [
        ("ben", 3, 3 * COST),
        ("local", 2, 2 * COST),
        ("anna", 1, COST),
    ]
    assert (await reports.totals(TODAY)).cost_micros == 7 * COST
    assert (await reports.totals(YEAR)).turns == 8
    assert await reports.totals(Days("2020-01-01", "2020-01-01")) == Sums()


# Export and deletion -------------------------------------------------------------------------------------------------


async def test_export_has_every_turn_of_the_owner_page_by_page(house: House) -> None:
    mine = sorted([await take(house) for _ in range(4)] + [await house.open()])
    await take(house, "ben")
    reports = reports_of(house)
    pages: list[SettledTurn] = []
    while page := await reports.turns_of("anna", 2, pages[-1].id if pages else None):
        assert len(page) <= 2
        pages += page
    assert [turn.id for turn in pages] == mine
    whole = next(turn for turn in pages if turn.status == "complete")
    assert whole == SettledTurn(
        id=whole.id,
        source="chat_completions",
        status="complete",
        model="scripted/model",
        key_id=None,
        conversation_id="conv-1",
        prompt_tokens=100,
        completion_tokens=20,
        cached_tokens=0,
        reasoning_tokens=0,
        cost_micros=COST,
        started_at=NOON,
        ended_at=NOON,
    )
    assert [turn.ended_at for turn in pages if turn.status == "running"] == [None]
    await house.ledger.close(next(turn.id for turn in pages if turn.status == "running"), None, "complete")


async def test_deletion_takes_the_owners_rows_alone(house: House) -> None:
    for owner in ("anna", "ben"):
        await house.user(owner, Budget(10**6, "day"))
        await take(house, owner)
    running = await house.open()
    await reports_of(house).delete("anna")
    for table in (turns, usage_metrics, spending):
        assert {row["owner"] for row in await house.rows(table)} == {"ben"}
    await house.ledger.close(running, USED, "complete")
    assert {row["owner"] for row in await house.rows(usage_metrics)} == {"ben"}
    assert await reports_of(house).budget("anna") == BudgetState(
        period="day", limit_micros=10**6, spent_micros=0, held_micros=0
    )
