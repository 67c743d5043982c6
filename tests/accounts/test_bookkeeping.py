import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection

from gateway.accounts import bookkeeping
from gateway.accounts.bookkeeping import LATEST, Begun, Refusal, Settled
from gateway.accounts.profiles import Budget, Profile, Profiles
from gateway.storage.address import PostgresServer
from gateway.storage.engine import Database
from gateway.storage.tables import spending, turns, usage_metrics
from tests.accounts.ledgers import NOON, assert_balanced, rows_of
from tests.storage.databases import opened

DAY = 86_400.0


def begun(name: str, owner: str = "anna", at: float = NOON, source: str = "responses") -> Begun:
    return Begun(
        id=name,
        owner=owner,
        source=source,
        agent_id="agent-1",
        conversation_id=None,
        key_id="key-1",
        instance="one",
        started_at=at,
    )


def settled(name: str, cost: int = 10, at: float = NOON + 5, **fields: Any) -> Settled:
    usual: dict[str, Any] = {"status": "complete", "model": "a/model", "prompt_tokens": 7, "completion_tokens": 3}
    return Settled(id=name, cost_micros=cost, ended_at=at, **{**usual, **fields})


async def begin(database: Database, *turns_: Begun, default: Budget | None = None) -> dict[str, Refusal]:
    def write(connection: Connection) -> dict[str, Refusal]:
        bookkeeping.lock(connection, turns_, ())
        return bookkeeping.begin(connection, turns_, default)

    return await database.write_at_once(write)


async def settle(database: Database, *settled_: Settled) -> None:
    await settle_only(database, *settled_)
    await assert_balanced(database)


async def register(database: Database, user_id: str = "anna", budget: Budget | None = None) -> None:
    profile = Profile(id=user_id, email=f"{user_id}@example.com", created_at=0, updated_at=0, budget=budget)
    assert await Profiles(database).add(profile)


async def spent(database: Database) -> dict[tuple[str, str], tuple[int, int]]:
    rows = await rows_of(database, spending)
    return {(row["owner"], row["period"]): (row["spent_micros"], row["held_micros"]) for row in rows}


async def test_turn_that_begins(database: Database) -> None:
    assert await begin(database, begun("t-1")) == {}
    (row,) = await rows_of(database, turns)
    assert row == {
        **msgspec.structs.asdict(begun("t-1")),
        "status": "running",
        "model": "",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "cost_micros": 0,
        "held_micros": 0,
        "period": None,
        "ended_at": None,
    }
    await assert_balanced(database)
    assert await rows_of(database, usage_metrics) == []


async def test_turn_that_is_settled(database: Database) -> None:
    await begin(database, begun("t-1"), begun("t-2"))
    await settle(database, settled("t-1", cached_tokens=2, reasoning_tokens=1))
    one, two = sorted(await rows_of(database, turns), key=lambda row: str(row["id"]))
    assert (one["status"], one["model"], one["ended_at"], two["status"]) == ("complete", "a/model", NOON + 5, "running")
    counts = (one["prompt_tokens"], one["completion_tokens"], one["cached_tokens"], one["reasoning_tokens"])
    assert (counts, one["cost_micros"]) == ((7, 3, 2, 1), 10)
    assert await rows_of(database, usage_metrics) == [
        {
            "owner": "anna",
            "day": "2026-11-21",
            "model": "a/model",
            "source": "responses",
            "turns": 1,
            "failed_turns": 0,
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "cached_tokens": 2,
            "reasoning_tokens": 1,
            "cost_micros": 10,
        }
    ]


async def test_turn_is_settled_once(database: Database) -> None:
    await begin(database, begun("t-1"))
    await settle(database, settled("t-1", 10), settled("t-1", 99))
    first = await rows_of(database, turns)
    await settle(database, settled("t-1", 99, status="failed"))
    await settle(database, settled("t-1", status="unsent"))
    await settle(database, settled("t-9"))
    assert await rows_of(database, turns) == first
    assert first[0]["cost_micros"] == 10


async def test_sums_are_by_owner_day_model_and_source(database: Database) -> None:
    await begin(
        database,
        begun("t-1"),
        begun("t-2"),
        begun("t-3", owner="ben"),
        begun("t-4", at=NOON - DAY),
        begun("t-5", source="platform"),
        begun("t-6"),
    )
    await settle(database, *(settled(f"t-{number}") for number in range(1, 6)), settled("t-6", model="b/model"))
    rows = await rows_of(database, usage_metrics)
    assert sorted((row["owner"], row["day"], row["model"], row["source"], row["turns"]) for row in rows) == [
        ("anna", "2026-11-20", "a/model", "responses", 1),
        ("anna", "2026-11-21", "a/model", "platform", 1),
        ("anna", "2026-11-21", "a/model", "responses", 2),
        ("anna", "2026-11-21", "b/model", "responses", 1),
        ("ben", "2026-11-21", "a/model", "responses", 1),
    ]


async def test_day_is_that_of_the_start(database: Database) -> None:
    await begin(database, begun("t-1", at=NOON + DAY / 2 - 1))
    await settle(database, settled("t-1", at=NOON + DAY))
    (row,) = await rows_of(database, usage_metrics)
    assert row["day"] == "2026-11-21"


async def test_failed_turns_are_counted_apart(database: Database) -> None:
    await begin(database, *(begun(f"t-{number}") for number in range(4)))
    statuses: Sequence[Any] = ("complete", "failed", "interrupted", "failed")
    await settle(database, *(settled(f"t-{number}", status=status) for number, status in enumerate(statuses)))
    (row,) = await rows_of(database, usage_metrics)
    assert (row["turns"], row["failed_turns"]) == (4, 2)


async def test_turn_that_was_not_sent_leaves_no_trace(database: Database) -> None:
    await register(database, budget=Budget(100, "day"))
    await begin(database, begun("t-1"))
    assert await spent(database) == {("anna", "2026-11-21"): (0, 100)}
    await settle(database, Settled(id="t-1", status="unsent", ended_at=NOON))
    assert await rows_of(database, turns) == []
    assert await rows_of(database, usage_metrics) == []
    assert await spent(database) == {("anna", "2026-11-21"): (0, 0)}


async def test_clock_that_was_set_back_during_a_turn(database: Database) -> None:
    await register(database, budget=Budget(100, "day"))
    await begin(database, begun("t-1"))
    await settle(database, settled("t-1", at=NOON - 2 * DAY))
    (row,) = await rows_of(database, turns)
    assert row["ended_at"] == row["started_at"] == NOON
    assert await spent(database) == {("anna", "2026-11-21"): (10, 0)}


# Budgets -------------------------------------------------------------------------------------------------------------


async def test_turn_holds_the_most_that_one_of_the_latest_cost(database: Database) -> None:
    await register(database, budget=Budget(1_000, "month"))
    await begin(database, begun("t-1"))
    await settle(database, settled("t-1", 300))
    await begin(database, begun("t-2", at=NOON + 10))
    assert await spent(database) == {("anna", "2026-11"): (300, 300)}
    await settle(database, settled("t-2", 4))
    await begin(database, begun("t-3", at=NOON + 20))
    assert await spent(database) == {("anna", "2026-11"): (304, 300)}
    for number in range(LATEST):
        await begin(database, begun(f"u-{number}", at=NOON + 30 + number))
        await settle(database, settled(f"u-{number}", 5))
    await settle(database, settled("t-3", 4))
    await begin(database, begun("t-4", at=NOON + 90))
    assert await spent(database) == {("anna", "2026-11"): (358, 5)}


async def test_one_turn_at_a_time_while_nothing_tells_what_one_costs(database: Database) -> None:
    await register(database, budget=Budget(1_000, "month"))
    names = [f"t-{number:02}" for number in range(20)]
    assert await begin(database, *map(begun, names)) == dict.fromkeys(names[1:], "held")
    assert await spent(database) == {("anna", "2026-11"): (0, 1_000)}
    await settle(database, settled("t-00", 0, status="interrupted", prompt_tokens=0, completion_tokens=0))
    assert await begin(database, begun("u-1"), begun("u-2")) == {"u-2": "held"}, "a turn that was cut tells nothing"
    await settle(database, settled("u-1", 30))
    assert await begin(database, *(begun(f"v-{number}", at=NOON + 10) for number in range(20))) == {}


async def test_turns_of_a_model_without_a_price_hold_next_to_nothing(database: Database) -> None:
    await register(database, budget=Budget(1_000, "month"))
    await begin(database, begun("t-1"))
    await settle(database, settled("t-1", 0))
    assert await begin(database, *(begun(f"u-{number}") for number in range(20))) == {}
    assert await spent(database) == {("anna", "2026-11"): (0, 20)}


async def test_lone_user_is_never_refused_what_is_left(database: Database) -> None:
    await register(database, budget=Budget(1_000, "total"))
    for number, cost in enumerate((900, 99, 1)):
        assert await begin(database, begun(f"t-{number}", at=NOON + number)) == {}
        await settle(database, settled(f"t-{number}", cost))
    assert await begin(database, begun("t-9")) == {"t-9": "used_up"}


async def test_turn_holds_at_most_what_is_left(database: Database) -> None:
    await register(database, budget=Budget(1_000, "day"))
    await begin(database, begun("t-1"))
    await settle(database, settled("t-1", 900))
    assert await begin(database, begun("t-2")) == {}
    assert await spent(database) == {("anna", "2026-11-21"): (900, 100)}
    assert await begin(database, begun("t-3")) == {"t-3": "held"}
    await settle(database, settled("t-2", 5_000))
    assert await begin(database, begun("t-4")) == {"t-4": "used_up"}
    assert await begin(database, begun("t-5", at=NOON + DAY)) == {}, "the next day is a new one"


async def test_as_many_as_there_is_room_for(database: Database) -> None:
    await register(database, budget=Budget(200, "total"))
    await begin(database, begun("t-0", at=NOON - DAY))
    await settle(database, settled("t-0", 10))
    names = [f"u-{number:02}" for number in range(50)]
    refused = await begin(database, *map(begun, names))
    assert refused == dict.fromkeys(names[19:], "held"), "room for nineteen: first come, first served"
    await assert_balanced(database)


async def test_budgets_of_nothing_and_of_next_to_nothing(database: Database) -> None:
    budgets = {"anna": Budget(0, "day"), "ben": Budget(1, "day"), "carl": Budget(-5, "total")}
    for user, budget in budgets.items():
        await register(database, user, budget)
    assert await begin(database, *(begun(user, owner=user) for user in budgets)) == {
        "anna": "used_up",
        "carl": "used_up",
    }


async def test_users_without_a_budget_have_the_default_one(database: Database) -> None:
    await register(database)
    await register(database, "ben", Budget(5, "day"))
    default = Budget(0, "day")
    operators = [begun("t-3", owner="local"), begun("t-4", owner="key_0123456789ab")]
    refused = await begin(database, begun("t-1"), begun("t-2", owner="ben"), *operators, default=default)
    assert refused == {"t-1": "used_up"}, "who is no user has no budget"
    assert await begin(database, begun("t-5")) == {}


async def test_new_period_begins_with_what_its_days_say(database: Database) -> None:
    await register(database)
    await begin(database, begun("t-1"), begun("t-2", at=NOON - DAY), begun("t-3", at=NOON - 30 * DAY))
    await settle(database, *(settled(f"t-{number}", 10**number) for number in (1, 2, 3)))
    assert await spent(database) == {}
    await begin(database, begun("t-4"), default=Budget(10**6, "month"))
    await begin(database, begun("t-5"), default=Budget(10**6, "total"))
    found = await spent(database)
    assert {key: both[0] for key, both in found.items()} == {("anna", "2026-11"): 110, ("anna", "total"): 1_110}
    await settle(database, settled("t-4"), settled("t-5"))
    assert {key: both[0] for key, both in (await spent(database)).items()} == {
        ("anna", "2026-11"): 130,
        ("anna", "total"): 1_130,
    }


async def test_midnight_within_one_transaction(database: Database) -> None:
    await register(database, budget=Budget(1, "day"))
    await register(database, "ben", Budget(1, "month"))
    late, early = NOON + DAY / 2 - 1, NOON + DAY / 2
    refused = await begin(
        database,
        begun("t-1", at=late),
        begun("t-2", at=early),
        begun("t-3", owner="ben", at=late),
        begun("t-4", owner="ben", at=early),
    )
    assert refused == {"t-4": "held"}
    assert await spent(database) == {
        ("anna", "2026-11-21"): (0, 1),
        ("anna", "2026-11-22"): (0, 1),
        ("ben", "2026-11"): (0, 1),
    }


@pytest.mark.live
async def test_gateways_that_share_a_database_spend_one_budget(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as one, opened(postgres_address) as two:
        users = ("anna", "ben", "carl", "dora")
        for user in users:
            await register(one, user, Budget(10, "day"))
            await begin(one, begun(f"first-{user}", owner=user, at=NOON - DAY))
            await settle(one, settled(f"first-{user}", 1))

        async def client(number: int) -> bool:
            database = (one, two)[number % 2]
            some = [begun(f"t-{number}-{user}", owner=user) for user in (users if number % 3 else users[::-1])]
            refused = await begin(database, *some)
            await asyncio.sleep(0.001)
            await settle_only(database, *(settled(turn.id, 1) for turn in some if turn.id not in refused))
            return not refused

        passed = await asyncio.gather(*map(client, range(40)))
        assert sum(passed) == 10
        await assert_balanced(one)
        assert {both for (_, day), both in (await spent(one)).items() if day == "2026-11-21"} == {(10, 0)}


async def settle_only(database: Database, *settled_: Settled) -> None:
    def write(connection: Connection) -> None:
        bookkeeping.lock(connection, (), settled_)
        bookkeeping.settle(connection, settled_)

    await database.write_at_once(write)


@pytest.mark.live
async def test_turn_that_two_gateways_settle_at_once(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as one, opened(postgres_address) as two:
        await register(one)
        names = [f"t-{number}" for number in range(30)]
        await begin(one, *map(begun, names))
        await asyncio.gather(
            *(settle_only(one, settled(name, 1)) for name in names),
            *(settle_only(two, settled(name, 1)) for name in reversed(names)),
            settle_only(two, *(settled(name, 1) for name in names)),
        )
        await assert_balanced(one)
        assert [(row["turns"], row["cost_micros"]) for row in await rows_of(one, usage_metrics)] == [(30, 30)]
