import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import delete, update

from gateway.accounts import ledger as module
from gateway.accounts import settling
from gateway.accounts.instances import SILENT
from gateway.accounts.ledger import Backlog
from gateway.accounts.profiles import Budget
from gateway.conversations.metering import Meter, Payer
from gateway.conversations.turns import TurnPolicy, TurnRegistry
from gateway.errors import (
    BudgetExceeded,
    BudgetHeld,
    GatewayError,
    StorageUnavailable,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.letta.backend import always_ready
from gateway.letta.scripted import Break, Hang, Hold, Script, says
from gateway.metrics import Metrics
from gateway.shared_state.locks import Lease
from gateway.shared_state.memory import MemoryLocks
from gateway.storage.address import Address, PostgresServer, SqliteFile
from gateway.storage.engine import Database
from gateway.storage.tables import instances, spending, turns, usage_metrics, user_profiles
from gateway.translation.agent_events import Failure, TextDelta, Usage
from gateway.translation.agent_turn import AgentTurn, Text, UserSaid
from tests.accounts.ledgers import COST, COUNTED, NOON, USED, House, assert_balanced, house_on, rows_of
from tests.storage.databases import opened

Result = TypeVar("Result")


@pytest.fixture
async def house(database: Database) -> AsyncIterator[House]:
    async with house_on(database) as made:
        yield made


@pytest.fixture
async def alone(sqlite_file: SqliteFile) -> AsyncIterator[House]:
    async with opened(sqlite_file) as database, house_on(database) as made:
        yield made


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def until(house: House, count: int) -> None:
    """Wait until so many turns are settled."""
    async with asyncio.timeout(5):
        while sum(status != "running" for status in (await house.statuses()).values()) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# A turn --------------------------------------------------------------------------------------------------------------


async def test_turn_is_written_down_before_it_is_sent(alone: House) -> None:
    meter: Meter = alone.ledger
    turn = AgentTurn(agent_id="agent-1", conversation_id="conv-7")
    turn_id = await meter.open(Payer("anna", "platform", "key-1"), turn)
    assert str(uuid.UUID(turn_id)) == turn_id
    row = await alone.turn(turn_id)
    assert (row["owner"], row["source"], row["key_id"], row["instance"]) == ("anna", "platform", "key-1", "one")
    assert (row["agent_id"], row["conversation_id"], row["started_at"]) == ("agent-1", "conv-7", NOON)
    assert (row["status"], row["ended_at"]) == ("running", None)
    assert alone.letta.details_asked == 0, "what a turn costs is asked when it is over"


@pytest.mark.parametrize("outcome", ["complete", "failed", "interrupted"])
async def test_turn_that_is_over(house: House, outcome: Any) -> None:
    turn_id = await house.open()
    house.clock.at += 7
    await house.ledger.close(turn_id, Usage(100, 20, 40, 5), outcome)
    row = await house.turn(turn_id)
    assert (row["status"], row["model"], row["ended_at"]) == (outcome, "scripted/model", NOON + 7)
    assert (row["prompt_tokens"], row["cached_tokens"], row["reasoning_tokens"], row["cost_micros"]) == (
        100,
        40,
        5,
        120,
    )


async def test_turn_that_was_not_sent(house: House) -> None:
    await house.user(budget=Budget(100, "day"))
    turn_id = await house.open()
    await house.ledger.close(turn_id, None, "unsent")
    assert await house.rows(turns) == []
    assert [(row["spent_micros"], row["held_micros"]) for row in await house.rows(spending)] == [(0, 0)]


async def test_second_close_changes_nothing(alone: House) -> None:
    turn_id = await alone.take()
    first = await alone.turn(turn_id)
    await alone.ledger.close(turn_id, Usage(9, 9), "failed")
    await alone.ledger.close("nobody's", Usage(9, 9), "failed")
    alone.ledger.leave_open(turn_id)
    await alone.ledger.reconcile()
    assert await alone.turn(turn_id) == first


async def test_two_closes_at_once_count_once(alone: House) -> None:
    turn_id = await alone.open()
    await asyncio.gather(*(alone.ledger.close(turn_id, USED, "complete") for _ in range(5)))
    assert [row["turns"] for row in await alone.rows(usage_metrics)] == [1]


async def test_many_at_once_go_into_few_transactions(alone: House) -> None:
    await asyncio.gather(*(alone.take(f"user-{number}") for number in range(64)))
    assert set((await alone.statuses()).values()) == {"complete"}
    assert len(await alone.rows(usage_metrics)) == 64
    assert alone.letta.details_asked == 1


# Budgets -------------------------------------------------------------------------------------------------------------


async def test_fifty_at_once_with_room_for_ten(house: House) -> None:
    await house.user(budget=Budget(11 * COST, "month"))
    await house.take()
    results = await asyncio.gather(*(house.open() for _ in range(50)), return_exceptions=True)
    passed = [result for result in results if isinstance(result, str)]
    assert len(passed) == 10
    assert all(isinstance(result, BudgetHeld) for result in results if not isinstance(result, str))
    assert len(await house.rows(turns)) == 11
    await asyncio.gather(*(house.ledger.close(turn_id, USED, "complete") for turn_id in passed))
    (row,) = await house.rows(spending)
    assert (row["spent_micros"], row["held_micros"]) == (11 * COST, 0)
    with pytest.raises(BudgetExceeded):
        await house.open()


async def test_refusal_refuses_one_and_not_the_batch(house: House) -> None:
    await house.user("poor", Budget(0, "day"))
    await house.user("rich", Budget(10**9, "day"))
    names = ["rich", "poor", "local", "poor", "rich"]
    results = await asyncio.gather(*map(house.open, names), return_exceptions=True)
    assert [isinstance(result, BudgetExceeded) for result in results] == [name == "poor" for name in names]


async def test_new_users_turns_at_once_do_not_overdraw_their_budget(house: House) -> None:
    await house.user(budget=Budget(2 * COST, "month"))
    results = await asyncio.gather(*(house.open() for _ in range(20)), return_exceptions=True)
    (first,) = (result for result in results if isinstance(result, str))
    refused = [result for result in results if isinstance(result, BudgetHeld)]
    assert (len(refused), refused[0].status, refused[0].should_retry) == (19, 429, True)
    await house.ledger.close(first, USED, "complete")
    await house.take()
    with pytest.raises(BudgetExceeded):
        await house.open()
    assert [row["spent_micros"] for row in await house.rows(spending)] == [2 * COST]


async def test_budget_is_not_kept_by_cutting_every_answer(house: House) -> None:
    await house.user(budget=Budget(10_000, "month"))
    await house.take()
    cost, turn_id = 100 + 2 * 250, ""
    for _ in range(-(-(10_000 - COST) // cost)):
        turn_id = await house.open()
        await house.ledger.close(turn_id, Usage(0, 0), "interrupted", 1_000)
    with pytest.raises(BudgetExceeded):
        await house.open()
    cut = await house.turn(turn_id)
    assert (cut["prompt_tokens"], cut["completion_tokens"], cut["cost_micros"]) == (0, 0, cost)


async def test_cut_answer_of_who_has_no_budget_costs_what_letta_counts(house: House) -> None:
    await house.user()
    await house.take()
    turn_id = await house.open()
    await house.ledger.close(turn_id, Usage(0, 0), "interrupted", 1_000)
    assert (await house.turn(turn_id))["cost_micros"] == 0


async def test_refused_turn_leaves_nothing(alone: House) -> None:
    await alone.user(budget=Budget(0, "day"))
    with pytest.raises(BudgetExceeded) as refused:
        await alone.open()
    assert (refused.value.status, refused.value.should_retry) == (402, False)
    assert await alone.rows(turns) == []
    assert alone.ledger._open == {}


async def test_default_budget(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database, house_on(database, default_budget=Budget(COST, "day")) as house:
        await house.user()
        await house.take()
        with pytest.raises(BudgetExceeded):
            await house.open()
        await house.profiles.change("anna", budget=Budget(3 * COST, "day"))
        await house.take()
        for _ in range(3):
            await house.take("local")


async def test_biller_refuses(alone: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def admit(owner: str) -> None:
        assert owner == "anna"
        raise BudgetExceeded

    monkeypatch.setattr(alone.billing, "admit", admit)
    with pytest.raises(BudgetExceeded):
        await alone.open()
    assert await alone.rows(turns) == []


async def test_clock_that_is_set_back_over_a_period(alone: House) -> None:
    await alone.user(budget=Budget(2 * COST, "day"))
    await alone.take()
    late = await alone.open()
    alone.clock.at -= 86_400
    early = await alone.open()
    await alone.ledger.close(late, USED, "complete")
    await alone.ledger.close(early, USED, "complete")
    spent = {row["period"]: (row["spent_micros"], row["held_micros"]) for row in await alone.rows(spending)}
    assert spent == {"2026-11-21": (2 * COST, 0), "2026-11-20": (COST, 0)}
    assert (await alone.turn(late))["ended_at"] == NOON
    alone.clock.at += 86_400
    with pytest.raises(BudgetExceeded):
        await alone.open()


# Leaving early -------------------------------------------------------------------------------------------------------


async def test_who_leaves_while_the_turn_is_written_down_holds_nothing(house: House) -> None:
    await house.user(budget=Budget(10**6, "day"))
    for moment in range(12):
        task = house.tasks.spawn(house.open(), "open")
        for _ in range(moment):
            await asyncio.sleep(0.000_3)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, str):
            await house.ledger.close(result, None, "unsent")
    await house.idle()
    assert await house.rows(turns) == []
    assert {row["held_micros"] for row in await house.rows(spending)} <= {0}


async def test_who_leaves_while_the_turn_is_settled_does_not_stop_that(alone: House) -> None:
    turn_id = await alone.open()
    gate = asyncio.Event()
    alone.letta.holding = Hold(gate)
    task = alone.tasks.spawn(alone.ledger.close(turn_id, USED, "complete"), "close")
    await settled()
    task.cancel()
    await settled()
    assert task.cancelled()
    gate.set()
    await alone.idle()
    assert (await alone.turn(turn_id))["status"] == "complete"


# The database is down ------------------------------------------------------------------------------------------------


async def test_turn_is_not_sent_where_it_cannot_be_written_down(
    sqlite_file: SqliteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "TRY_AGAIN", 0.02)
    async with opened(sqlite_file) as database, house_on(database) as house:
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        with pytest.raises(StorageUnavailable):
            await house.open()
        moved.rename(sqlite_file.path)
        await house.idle()
        assert await house.rows(turns) == []


async def test_what_cannot_be_written_at_the_end_of_a_turn_is_written_later(
    sqlite_file: SqliteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "TRY_AGAIN", 0.02)
    async with opened(sqlite_file) as database, house_on(database) as house:
        turn_ids = [await house.open() for _ in range(3)]
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        for turn_id in turn_ids:
            await house.ledger.close(turn_id, USED, "complete")
        await asyncio.sleep(0.1)
        moved.rename(sqlite_file.path)
        await until(house, 3)
        assert [row["turns"] for row in await house.rows(usage_metrics)] == [3]


async def test_database_that_hangs_holds_up_no_answer(sqlite_file: SqliteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITTEN", 0.05)
    async with opened(sqlite_file) as database, house_on(database) as house:
        turn_id = await house.open()
        async with database.write(), asyncio.timeout(2):
            await house.ledger.close(turn_id, USED, "complete")
            assert house.ledger.backlog().turns == 1
        await house.idle()
        assert (await house.turn(turn_id))["prompt_tokens"] == 100


async def test_end_writes_what_could_not_be_written(sqlite_file: SqliteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "TRY_AGAIN", 3_600.0)
    async with opened(sqlite_file) as database:
        house = House(database)
        await house.ledger.start()
        turn_id = await house.open()
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        await house.ledger.close(turn_id, USED, "complete")
        moved.rename(sqlite_file.path)
        await house.ledger.end()
        assert (await house.turn(turn_id))["status"] == "complete"
        await assert_balanced(database)
        await house.tasks.close(0)


async def test_end_does_not_hang_where_the_database_is_gone(
    sqlite_file: SqliteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END", 0.1)
    async with opened(sqlite_file) as database:
        house = House(database)
        await house.ledger.start()
        turn_id = await house.open()
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        await house.ledger.close(turn_id, USED, "complete")
        async with asyncio.timeout(5):
            await house.ledger.end()
        await house.tasks.close(0)
        moved.rename(sqlite_file.path)
        house.letta.counts[turn_id] = USED
        next_one = house.another()
        await next_one.ledger.reconcile()
        row = await house.turn(turn_id)
        assert (row["status"], row["cost_micros"]) == ("interrupted", COST)
        await next_one.idle()
        await assert_balanced(database)


# What nobody will settle ---------------------------------------------------------------------------------------------


async def test_crash_leaves_turns_that_the_next_gateway_settles(alone: House) -> None:
    await alone.user(budget=Budget(10**6, "day"))
    whole, known, unknown = await alone.take(), await alone.open(), await alone.open()
    alone.letta.counts[known] = Usage(1_000, 50)
    alone.clock.at += module.STORED
    next_one = alone.another()
    await next_one.ledger.reconcile()
    rows = {row["id"]: row for row in await alone.rows(turns)}
    assert (rows[known]["status"], rows[known]["prompt_tokens"], rows[known]["cost_micros"]) == (
        "interrupted",
        1_000,
        1_100,
    )
    assert (rows[unknown]["status"], rows[unknown]["prompt_tokens"], rows[unknown]["cost_micros"]) == (
        "interrupted",
        0,
        0,
    )
    assert rows[whole]["status"] == "complete"
    assert {turn.mark for turn in alone.letta.asked} == {known, unknown}
    (row,) = await alone.rows(spending)
    assert (row["spent_micros"], row["held_micros"]) == (1_100 + COST, 0)
    await next_one.ledger.reconcile()
    assert len(alone.letta.asked) == 2
    await next_one.idle()


async def test_turns_that_are_under_way_are_nobodys_orphans(alone: House) -> None:
    await alone.instances.beat()
    turn_id = await alone.open()
    await alone.ledger.reconcile()
    assert alone.letta.asked == []
    await alone.ledger.close(turn_id, USED, "complete")
    assert (await alone.turn(turn_id))["status"] == "complete"


async def test_turn_that_letta_has_not_stored_yet_is_left_for_the_next_look(alone: House) -> None:
    """A gateway that comes back within a second may ask before Letta has the turn's first message."""
    first, second = await alone.open(), await alone.open()
    alone.letta.counts[first] = USED
    next_one = alone.another()
    await next_one.ledger.reconcile()
    assert await alone.statuses() == {first: "interrupted", second: "running"}
    alone.letta.counts[second] = USED
    await next_one.ledger.reconcile()
    assert (await alone.turn(second))["cost_micros"] == COST
    await next_one.idle()


async def test_turn_that_was_never_stored_is_settled_with_nothing_in_the_end(alone: House) -> None:
    young = [await alone.open() for _ in range(module._ASK_AT_ONCE)]
    old = await alone.open()
    alone.letta.counts[old] = USED
    next_one = alone.another()
    next_one.clock.at += module.STORED - 0.1
    await next_one.ledger.reconcile()
    assert await alone.statuses() == {**dict.fromkeys(young, "running"), old: "interrupted"}, "they hold up no other"
    next_one.clock.at += 0.2
    await next_one.ledger.reconcile()
    assert set((await alone.statuses()).values()) == {"interrupted"}
    assert sum(row["prompt_tokens"] for row in await alone.rows(turns)) == USED.prompt_tokens
    await next_one.idle()


async def test_own_turn_that_was_left_for_later_waits_too(house: House) -> None:
    await house.instances.beat()
    left = await house.open()
    house.ledger.leave_open(left)
    await house.ledger.reconcile()
    assert await house.statuses() == {left: "running"}
    house.letta.counts[left] = USED
    await house.ledger.reconcile()
    assert (await house.turn(left))["cost_micros"] == COST


async def test_clock_that_was_set_back_keeps_no_turn_open(alone: House) -> None:
    turn_id = await alone.open()
    next_one = alone.another()
    next_one.clock.at -= 86_400
    await next_one.ledger.reconcile()
    assert await alone.statuses() == {turn_id: "interrupted"}
    await next_one.idle()


async def test_letta_that_cannot_be_asked_leaves_turns_for_later(alone: House) -> None:
    left = [await alone.open() for _ in range(module._ASK_AT_ONCE + 3)]
    alone.clock.at += module.STORED
    next_one = alone.another()
    alone.letta.down = UpstreamUnavailable()
    await next_one.ledger.reconcile()
    assert set((await alone.statuses()).values()) == {"running"}
    assert len(alone.letta.asked) == module._ASK_AT_ONCE, "it is not asked for all"
    alone.letta.down = None
    alone.letta.unknown[left[0]] = UpstreamTimeout()
    await next_one.ledger.reconcile()
    assert await alone.statuses() == {turn_id: "running" if turn_id == left[0] else "interrupted" for turn_id in left}
    alone.letta.unknown.clear()
    await next_one.ledger.reconcile()
    assert set((await alone.statuses()).values()) == {"interrupted"}
    await next_one.idle()


async def test_turn_that_was_left_for_later_is_settled_by_its_own_gateway(house: House) -> None:
    await house.instances.beat()
    left, other = await house.open(), await house.open()
    house.ledger.leave_open(left)
    house.letta.counts[left] = USED
    await house.ledger.reconcile()
    assert await house.statuses() == {left: "interrupted", other: "running"}
    assert (await house.turn(left))["cost_micros"] == COST
    assert house.ledger._settling.forsaken == set()
    await house.ledger.close(left, Usage(9, 9), "complete")
    assert (await house.turn(left))["cost_micros"] == COST
    await house.ledger.close(other, USED, "complete")


async def test_turn_that_was_deleted_with_its_owner_is_left_alone(alone: House) -> None:
    await alone.instances.beat()
    left = await alone.open()
    alone.ledger.leave_open(left)
    async with alone.database.write() as connection:
        await connection.execute(turns.delete())
    await alone.ledger.reconcile()
    assert alone.letta.asked == []
    assert alone.ledger._settling.forsaken == set()


async def test_reconciled_at_start_and_from_time_to_time(alone: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECONCILE", 0.05)
    first = await alone.open()
    alone.clock.at += module.STORED
    next_one = alone.another()
    alone.letta.down = UpstreamUnavailable()
    await next_one.ledger.start()
    await asyncio.sleep(0.02)
    assert await alone.statuses() == {first: "running"}
    alone.letta.down = None
    await until(alone, 1)
    await next_one.ledger.end()
    await next_one.idle()


@pytest.mark.live
async def test_gateways_that_share_a_database_settle_each_others_orphans(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database, house_on(database) as one:
        two = one.another()
        for house in (one, two):
            await house.instances.beat()
        dying, living = await one.open(), await two.open()
        await two.ledger.reconcile()
        assert one.letta.asked == [], "one was seen a moment ago"
        two.ticks.at += SILENT
        one.letta.counts[dying] = USED
        await asyncio.gather(two.ledger.reconcile(), two.ledger.reconcile())
        assert await one.statuses() == {dying: "interrupted", living: "running"}
        await one.ledger.close(dying, Usage(9, 9), "complete")
        assert (await one.turn(dying))["cost_micros"] == COST, "who comes second changes nothing"
        await two.ledger.close(living, USED, "complete")
        await two.idle()


@pytest.mark.live
async def test_gateway_that_ends_leaves_its_orphans_at_once(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as database, house_on(database) as one:
        two = one.another()
        await one.ledger.start()
        left = await one.open()
        one.ledger.leave_open(left)
        one.letta.unknown[left] = UpstreamUnavailable()
        await one.ledger.end()
        one.letta.unknown.clear()
        two.clock.at += module.STORED
        await two.ledger.reconcile()
        assert await one.statuses() == {left: "interrupted"}
        await two.idle()


async def test_bad_row_fails_alone(alone: House) -> None:
    await alone.take()
    async with alone.database.write() as connection:
        await connection.execute(update(turns).values(id="taken"))
    results = await asyncio.gather(
        alone.open(), alone.open("a\0b"), alone.open("c" * 900), alone.open(), return_exceptions=True
    )
    assert [isinstance(result, str) for result in results] == [True, False, False, True]
    assert all(isinstance(result, ValueError) for result in results[1:3])


# With the registry ---------------------------------------------------------------------------------------------------


class Saying:
    """A plan that says something on a thread of its own."""

    is_quiet = True

    def __init__(self, number: int, owner: str) -> None:
        self.thread = f"conv-{number}"
        self.payer = Payer(owner, "responses")

    async def begin(self, _: Lease) -> AgentTurn:
        return AgentTurn(agent_id="agent-1", conversation_id=self.thread, news=(UserSaid((Text("Hi"),)),))

    async def end(self, *, is_delivered: bool) -> None:
        return

    def leave(self) -> None:
        return


HI = TextDelta("Hi")
SCRIPTS: dict[str, tuple[Script, int]] = {
    "complete": (says("a", usage=Usage(100, 1)), 100),
    "failed": (Script(steps=([HI], [Usage(20, 1)], [Failure(UpstreamRejected())])), 20),
    "cut off": (Script(steps=([HI], Break(UpstreamTimeout()), [HI]), counted=Usage(3, 1)), 3),
    "refused": (Script(opening=(Break(UpstreamRejected()),)), 0),
    "not delivered": (Script(opening=(Break(UpstreamUnavailable(should_retry=True)),)), 0),
    "left": (Script(steps=([HI], Hang()), counted=Usage(4_000, 1)), 4_000),
    "not counted yet": (Script(steps=([HI], Hang()), counted=Break(UpstreamUnavailable())), 50_000),
}


async def test_turns_of_a_registry_are_in_the_ledger_as_letta_counts_them(house: House) -> None:
    await house.user(budget=Budget(10**9, "month"))
    await house.instances.beat()
    locks = MemoryLocks(depth=lambda: 8, wait=30.0, metrics=Metrics())
    registry = TurnRegistry(house.letta, house.ledger, TurnPolicy(), Metrics(), house.tasks, locks=locks)

    async def client(number: int, script: Script) -> None:
        house.letta.play(script)
        owner = "anna" if number % 2 else "local"
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(2), registry.turn(Saying(number, owner)) as turn:
                house.letta.counts[turn.id] = Usage(50_000, 1)
                async with asyncio.timeout(0.3):
                    await turn.running.deliver(lambda _: True, always_ready)

    for number, (script, _) in enumerate(list(SCRIPTS.values()) * 2):
        await client(number, script)
    await registry.idle()
    await house.ledger.reconcile()
    rows = await house.rows(turns)
    assert len(rows) == 2 * (len(SCRIPTS) - 1), "what was not delivered has no row"
    assert sum(row["prompt_tokens"] for row in rows) == 2 * sum(tokens for _, tokens in SCRIPTS.values())
    assert {row["status"] for row in rows} == {"complete", "failed", "interrupted"}


# Anything in any order -----------------------------------------------------------------------------------------------

OWNERS = st.sampled_from(["anna", "ben", "local"])
OUTCOMES = st.sampled_from(["complete", "failed", "interrupted"])
FIGURES = st.builds(
    Usage,
    st.integers(0, 1_000),
    st.integers(0, 1_000),
    st.none() | st.integers(0, 1_000),
    st.none() | st.integers(0, 1_000),
)


class Books(RuleBasedStateMachine):
    """Gateways that come and crash on one database; ``took`` is what Letta says of each turn that it had."""

    address: Address

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.database: Database = self.run(Database.open(self.address))
        self.names = (f"gateway-{number}" for number in itertools.count())
        self.took: dict[str, Usage | None] = {}
        self.under_way: list[str] = []
        self.taken_for_dead: list[tuple[House, str]] = []
        self.run(self.empty())
        self.house = House(self.database, name=next(self.names))
        self.run(self.begin())

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    async def empty(self) -> None:
        async with self.database.write() as connection:
            for table in (turns, usage_metrics, spending, user_profiles, instances):
                await connection.execute(delete(table))

    async def begin(self) -> None:
        await self.house.instances.beat()
        await self.house.user("anna", Budget(2_000, "day"))
        await self.house.user("ben", Budget(5_000, "total"))

    @rule(owners=st.lists(OWNERS, min_size=1, max_size=8))
    def open(self, owners: list[str]) -> None:
        async def work() -> None:
            opened = await asyncio.gather(*map(self.house.open, owners), return_exceptions=True)
            assert all(isinstance(result, str | BudgetExceeded | BudgetHeld) for result in opened)
            self.under_way += [result for result in opened if isinstance(result, str)]

        self.run(work())

    @rule(figures=st.lists(FIGURES, max_size=4), outcome=OUTCOMES, twice=st.booleans())
    def close(self, figures: list[Usage], outcome: Any, twice: bool) -> None:  # noqa: FBT001 - drawn
        async def work() -> None:
            over = [(self.under_way.pop(0), taken) for taken in figures if self.under_way]
            self.took |= over
            closing = [self.house.ledger.close(turn_id, taken, outcome) for turn_id, taken in over]
            if twice:
                closing += [self.house.ledger.close(turn_id, Usage(1, 1), "failed") for turn_id, _ in over]
            await asyncio.gather(*closing)

        self.run(work())

    @rule()
    def never_send(self) -> None:
        if self.under_way:
            self.run(self.house.ledger.close(self.under_way.pop(), None, "unsent"))

    @rule(taken=st.none() | FIGURES)
    def leave_open(self, taken: Usage | None) -> None:
        if self.under_way:
            turn_id = self.under_way.pop()
            self.count(turn_id, taken)
            self.house.ledger.leave_open(turn_id)

    @rule(figures=st.lists(st.none() | FIGURES, max_size=20))
    def crash(self, figures: list[Usage | None]) -> None:
        for turn_id, taken in itertools.zip_longest(self.under_way, figures[: len(self.under_way)]):
            self.count(turn_id, taken)
        self.taken_for_dead = [(self.house, turn_id) for turn_id in self.under_way]
        self.under_way.clear()
        self.run(self.house.tasks.close(0))
        self.house = self.house.another(next(self.names))
        self.run(self.house.instances.beat())

    @rule()
    def one_that_was_taken_for_dead_settles(self) -> None:
        for house, turn_id in self.taken_for_dead:
            self.run(house.ledger.close(turn_id, self.took[turn_id], "complete"))
        self.taken_for_dead.clear()

    def count(self, turn_id: str, taken: Usage | None) -> None:
        self.took[turn_id] = taken
        if taken is not None:
            self.house.letta.counts[turn_id] = taken

    @rule(hours=st.integers(-30, 30))
    def clock_jumps(self, hours: int) -> None:
        self.house.clock.at += hours * 3_600

    @rule()
    def reconcile(self) -> None:
        self.run(self.house.ledger.reconcile())
        self.house.ticks.at += SILENT

    @invariant()
    def books_are_balanced(self) -> None:
        self.run(assert_balanced(self.database))
        for row in self.run(rows_of(self.database, turns)):
            if row["status"] != "running":
                assert figures_of(row) == counts_of(self.took[row["id"]])

    def teardown(self) -> None:
        try:
            self.crash([])
            for _ in range(2):
                self.house.clock.at += module.STORED
                self.reconcile()
            self.one_that_was_taken_for_dead_settles()
            self.books_are_balanced()
            rows = self.run(rows_of(self.database, turns))
            assert {row["id"] for row in rows} == self.took.keys()
            assert all(row["status"] != "running" for row in rows)
            sums = self.run(rows_of(self.database, usage_metrics))
            everything = [counts_of(taken) for taken in self.took.values()]
            assert [sum(row[name] for row in sums) for name in COUNTED[:4]] == [
                sum(counts[place] for counts in everything) for place in range(4)
            ]
            self.run(self.house.tasks.close(1))
        finally:
            self.run(self.database.close())
            self.runner.close()


def figures_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in COUNTED[:4])


def counts_of(taken: Usage | None) -> tuple[int, int, int, int]:
    if taken is None:
        return 0, 0, 0, 0
    return taken.prompt_tokens, taken.completion_tokens, taken.cached_tokens or 0, taken.reasoning_tokens or 0


def test_no_order_of_turns_and_crashes_makes_the_books_wrong(address: Address) -> None:
    machine = type("Books", (Books,), {"address": address})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=20))


# What waits ----------------------------------------------------------------------------------------------------------


async def test_backlog_of_a_database_that_is_away(sqlite_file: SqliteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "TRY_AGAIN", 0.02)
    async with opened(sqlite_file) as database, house_on(database) as house:
        first, second, running = await house.open(), await house.open(), await house.open()
        assert house.ledger.backlog() == Backlog(0, 0.0), "what is under way does not wait"
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        await house.ledger.close(first, USED, "complete")
        house.clock.at += 50
        await house.ledger.close(second, USED, "complete")
        house.clock.at += 10
        assert house.ledger.backlog() == Backlog(2, 60.0)
        moved.rename(sqlite_file.path)
        await until(house, 2)
        await house.ledger.close(running, USED, "complete")
        await house.idle()
        assert house.ledger.backlog() == Backlog(0, 0.0)


async def test_backlog_of_a_letta_that_cannot_be_asked(alone: House) -> None:
    left = await alone.open()
    next_one = alone.another()
    next_one.clock.at += module.STORED
    next_one.letta.down = UpstreamUnavailable()
    await next_one.ledger.reconcile()
    next_one.clock.at += 30
    await next_one.ledger.reconcile()
    assert next_one.ledger.backlog() == Backlog(1, 30.0), "since it was first found"
    next_one.letta.down = None
    await next_one.ledger.reconcile()
    assert next_one.ledger.backlog() == Backlog(0, 0.0)
    assert await alone.statuses() == {left: "interrupted"}
    await next_one.idle()


async def test_backlog_of_turns_that_are_settled_by_another_gateway(alone: House) -> None:
    await alone.open()
    one, two = alone.another("two"), alone.another("three")
    one.clock.at += module.STORED
    two.clock.at += module.STORED
    alone.letta.down = UpstreamUnavailable()
    await one.ledger.reconcile()
    alone.letta.down = None
    await two.ledger.reconcile()
    await one.ledger.reconcile()
    assert one.ledger.backlog() == Backlog(0, 0.0)
    await asyncio.gather(one.idle(), two.idle())


async def test_backlog_with_a_clock_that_was_set_back(alone: House) -> None:
    await alone.open()
    next_one = alone.another()
    next_one.letta.down = UpstreamUnavailable()
    await next_one.ledger.reconcile()
    next_one.clock.at -= 3_600
    assert next_one.ledger.backlog() == Backlog(1, 0.0)
    next_one.letta.down = None
    next_one.clock.at += 7_200
    await next_one.ledger.reconcile()
    await next_one.idle()
