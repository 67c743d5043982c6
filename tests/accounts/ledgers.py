"""A ledger over a real database and a scripted Letta, and what must be true of its books at any time."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from sqlalchemy import Table, select

from gateway.accounts.billing.local import LocalBilling, Price
from gateway.accounts.instances import Instances
from gateway.accounts.ledger import Ledger
from gateway.accounts.periods import day_of, periods_of, span_of
from gateway.accounts.profiles import Budget, Profile, Profiles
from gateway.conversations.metering import Payer
from gateway.errors import GatewayError
from gateway.letta.backend import Agent, AgentDetails, SentTurn
from gateway.letta.scripted import ScriptedBackend
from gateway.storage.engine import Database
from gateway.storage.tables import spending, turns, usage_metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn

NOON: Final = 1_795_262_400.0
"""2026-11-21T12:00:00Z."""
PRICES: Final = {"scripted/model": Price(1.0, 2.0, 0.5), "*": Price(10.0, 10.0)}
USED: Final = Usage(100, 20)
COST: Final = 140


class Clock:
    """Time that a test sets."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class CountingLetta(ScriptedBackend):
    """A Letta that knows what turns took, by their marks: ``counts``, and which of these it was asked for."""

    def __init__(self) -> None:
        super().__init__([Agent("agent-1", "friend", 0), Agent("agent-2", "other", 0)])
        self.counts: dict[str, Usage] = {}
        self.asked: list[SentTurn] = []
        self.unknown: dict[str, GatewayError] = {}
        self.details_asked = 0

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Return the count, or raise the error that ``unknown`` has for this turn."""
        self.asked.append(turn)
        await self._answer()
        if turn.mark in self.unknown:
            raise self.unknown[turn.mark]
        return self.counts.get(turn.mark)

    async def details(self, agent_id: str) -> AgentDetails:
        """Count how often it is asked."""
        self.details_asked += 1
        return await super().details(agent_id)


class House:
    """One gateway's ledger; ``another`` is a second one on the same database and the same Letta."""

    def __init__(
        self,
        database: Database,
        *,
        name: str = "one",
        letta: CountingLetta | None = None,
        default_budget: Budget | None = None,
        prices: Mapping[str, Price] = PRICES,
        now: float = NOON,
    ) -> None:
        self.database = database
        self.letta = letta or CountingLetta()
        self.tasks = TaskSet()
        self.clock = Clock(now)
        self.ticks = Clock(0.0)
        self.default_budget = default_budget
        self.instances = Instances(database, name, clock=self.ticks, now=self.clock)
        self.billing = LocalBilling(prices)
        self.ledger = Ledger(
            database,
            self.billing,
            self.letta,
            self.tasks,
            self.instances,
            default_budget=default_budget,
            now=self.clock,
        )
        self.profiles = Profiles(database)

    def another(self, name: str = "two") -> "House":
        return House(self.database, name=name, letta=self.letta, default_budget=self.default_budget, now=self.clock.at)

    async def user(self, user_id: str = "anna", budget: Budget | None = None) -> str:
        """Register a user."""
        profile = Profile(id=user_id, email=f"{user_id}@example.com", created_at=0.0, updated_at=0.0, budget=budget)
        assert await self.profiles.add(profile)
        return user_id

    async def open(self, owner: str = "anna", agent_id: str = "agent-1", **fields: Any) -> str:
        return await self.ledger.open(
            Payer(owner, "chat_completions", **fields), AgentTurn(agent_id=agent_id, conversation_id="conv-1")
        )

    async def take(self, owner: str = "anna", used: Usage | None = USED) -> str:
        """Take a whole turn."""
        turn_id = await self.open(owner)
        await self.ledger.close(turn_id, used, "complete")
        return turn_id

    async def rows(self, table: Table) -> list[dict[str, Any]]:
        return await rows_of(self.database, table)

    async def turn(self, turn_id: str) -> dict[str, Any]:
        (row,) = [row for row in await self.rows(turns) if row["id"] == turn_id]
        return row

    async def statuses(self) -> dict[str, str]:
        return {row["id"]: row["status"] for row in await self.rows(turns)}

    async def idle(self) -> None:
        """Wait until nothing is left to be done."""
        async with asyncio.timeout(10):
            while len(self.tasks):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def house_on(database: Database, **fields: Any) -> AsyncIterator[House]:
    """Have one, and see at the end that its books are right."""
    house = House(database, **fields)
    yield house
    await house.idle()
    await assert_balanced(database)


async def rows_of(database: Database, table: Table) -> list[dict[str, Any]]:
    """Return a table's rows."""
    async with database.read() as connection:
        return [dict(row) for row in (await connection.execute(select(table))).mappings()]


COUNTED: Final = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_micros")


async def assert_balanced(database: Database) -> None:
    """Fail unless the sums by day are those of the turns, and spending is what the sums and the holds say."""
    ledger = await rows_of(database, turns)
    sums = {
        (row["owner"], row["day"], row["model"], row["source"]): {
            name: row[name] for name in ("turns", "failed_turns", *COUNTED)
        }
        for row in await rows_of(database, usage_metrics)
    }
    assert sums == _summed(ledger)
    for row in ledger:
        assert all(row[name] >= 0 for name in (*COUNTED, "held_micros"))
        assert row["status"] == "running" or row["held_micros"] == 0
        assert (row["ended_at"] is None) == (row["status"] == "running")
        assert row["ended_at"] is None or row["ended_at"] >= row["started_at"]
        assert row["period"] is None or row["period"] in periods_of(day_of(row["started_at"]))
    for row in await rows_of(database, spending):
        first, last = span_of(row["period"])
        days = [sums[key]["cost_micros"] for key in sums if key[0] == row["owner"] and first <= key[1] <= last]
        assert row["spent_micros"] == sum(days)
        holds = [turn["held_micros"] for turn in ledger if (turn["owner"], turn["period"]) == _key(row)]
        assert row["held_micros"] == sum(holds)


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["owner"], row["period"]


def _summed(ledger: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], dict[str, int]]:
    sums: defaultdict[tuple[str, str, str, str], dict[str, int]] = defaultdict(
        lambda: dict.fromkeys(("turns", "failed_turns", *COUNTED), 0)
    )
    for row in ledger:
        if row["status"] != "running":
            added = sums[row["owner"], day_of(row["started_at"]), row["model"], row["source"]]
            added["turns"] += 1
            added["failed_turns"] += row["status"] == "failed"
            for name in COUNTED:
                added[name] += row[name]
    return dict(sums)
