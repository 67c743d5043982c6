import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest
import structlog

from gateway.accounts import settling as module
from gateway.accounts.agent_models import UNKNOWN, AgentModels
from gateway.accounts.billing.local import LocalBilling, Price
from gateway.accounts.bookkeeping import Settled
from gateway.accounts.settling import LEAST_PROMPT, MOST_COST, MOST_TOKENS, Over, Settling
from gateway.errors import StorageUnavailable, UpstreamUnavailable
from gateway.letta.scripted import Hold
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from tests.accounts.ledgers import PRICES, USED, CountingLetta


class Desk:
    """Turns that are over, and whoever writes it down; ``down`` is raised by that, when set."""

    def __init__(self, prices: Mapping[str, Price] = PRICES) -> None:
        self.letta = CountingLetta()
        self.tasks = TaskSet()
        self.down: Exception | None = None
        self.tried = 0
        self.written: list[Settled] = []
        models = AgentModels(self.letta, self.tasks)
        self.prompts: dict[str, int] = {}
        self.settling = Settling(self.write, models, LocalBilling(prices), self.tasks, usual_prompt=self.usual_prompt)

    async def usual_prompt(self, turn_id: str) -> int | None:
        return self.prompts.get(turn_id)

    async def write(self, settled: Settled) -> None:
        self.tried += 1
        if self.down is not None:
            raise self.down
        self.written.append(settled)

    async def until_written(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.written) < count or len(self.tasks):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.002)


def over(name: str = "t-1", taken: Usage | None = USED, status: Any = "complete", agent_id: str = "agent-1") -> Over:
    return Over(name, agent_id, taken, status, 5.0)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(module, "TRY_AGAIN", 0.01)
    return Desk()


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as found:
        yield found


async def test_turn_is_written_with_its_model_and_what_it_cost(desk: Desk) -> None:
    assert await desk.settling.settle(over(taken=Usage(100, 20, 40, 5)))
    assert desk.written == [
        Settled(
            id="t-1",
            status="complete",
            model="scripted/model",
            prompt_tokens=100,
            completion_tokens=20,
            cached_tokens=40,
            reasoning_tokens=5,
            cost_micros=120,
            ended_at=5.0,
        )
    ]
    assert len(desk.settling) == 0


async def test_turn_that_was_not_sent_asks_nobody(desk: Desk) -> None:
    assert await desk.settling.settle(over(taken=None, status="unsent"))
    assert desk.written == [Settled(id="t-1", status="unsent", ended_at=5.0)]
    assert desk.letta.details_asked == 0


async def test_turn_of_which_letta_keeps_no_count(desk: Desk) -> None:
    assert await desk.settling.settle(over(taken=None, status="failed"))
    (written,) = desk.written
    assert (written.status, written.model, written.prompt_tokens, written.cost_micros) == (
        "failed",
        "scripted/model",
        0,
        0,
    )


async def test_agent_that_is_no_more_costs_what_any_model_does(desk: Desk) -> None:
    assert await desk.settling.settle(over(agent_id="agent-9"))
    assert (desk.written[0].model, desk.written[0].cost_micros) == (UNKNOWN, 1_200)


@pytest.mark.parametrize(
    ("taken", "prompt", "completion", "cached", "reasoning", "cost"),
    [
        (Usage(-1, -2, -3, -4), 0, 0, 0, 0, 0),
        (Usage(2**80, 1, 0, 0), MOST_TOKENS, 1, 0, 0, MOST_TOKENS + 2),
        (Usage(0, 0, 2**80, 2**80), 0, 0, MOST_TOKENS, MOST_TOKENS, 0),
    ],
)
async def test_figures_that_are_not_to_be_believed(
    desk: Desk, logs: list[Any], taken: Usage, prompt: int, completion: int, cached: int, reasoning: int, cost: int
) -> None:
    assert await desk.settling.settle(over(taken=taken))
    (written,) = desk.written
    counts = (written.prompt_tokens, written.completion_tokens, written.cached_tokens, written.reasoning_tokens)
    assert (counts, written.cost_micros) == ((prompt, completion, cached, reasoning), cost)
    assert {entry["event"] for entry in logs} == {"figure of a turn is not to be believed"}
    assert {entry["turn"] for entry in logs} == {"t-1"}


async def test_cost_is_bounded(logs: list[Any]) -> None:
    desk = Desk({"*": Price(1_000_000.0, 1_000_000.0)})
    assert await desk.settling.settle(over(taken=Usage(MOST_TOKENS, 0)))
    assert desk.written[0].cost_micros == MOST_COST
    assert [entry["taken_as"] for entry in logs] == [MOST_COST]


# Tried again ---------------------------------------------------------------------------------------------------------


async def test_database_that_is_down_gets_it_later(desk: Desk, logs: list[Any]) -> None:
    desk.down = StorageUnavailable()
    results = await asyncio.gather(*(desk.settling.settle(over(f"t-{number}")) for number in range(3)))
    assert results == [False] * 3
    assert "t-1" in desk.settling
    await asyncio.sleep(0.05)
    assert (desk.written, len(desk.settling)) == ([], 3)
    assert desk.tried > 3
    desk.down = None
    await desk.until_written(3)
    assert {written.id for written in desk.written} == {"t-0", "t-1", "t-2"}
    assert all(written.ended_at == 5.0 for written in desk.written)
    assert len(desk.settling) == 0
    assert [entry["event"] for entry in logs] == ["ledger behind", "ledger caught up"], "once per change"


async def test_letta_that_cannot_name_the_model_is_asked_later(desk: Desk) -> None:
    desk.letta.down = UpstreamUnavailable()
    assert not await desk.settling.settle(over())
    assert desk.written == []
    desk.letta.down = None
    await desk.until_written(1)
    assert (desk.written[0].model, desk.written[0].cost_micros) == ("scripted/model", 140)


async def test_turn_that_took_nothing_waits_for_no_model(desk: Desk) -> None:
    desk.letta.down = UpstreamUnavailable()
    assert await desk.settling.settle(over(taken=None, status="interrupted"))
    assert (desk.written[0].model, desk.written[0].status) == (UNKNOWN, "interrupted")


async def test_what_is_kept_in_memory_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    desk.down = StorageUnavailable()
    for number in range(4):
        assert not await desk.settling.settle(over(f"t-{number}"))
    assert len(desk.settling) == 2
    assert desk.settling.forsaken == {"t-2", "t-3"}
    desk.down = None
    await desk.until_written(2)


async def test_turn_that_cannot_be_written_is_left_to_be_reconciled(desk: Desk) -> None:
    desk.down = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        await desk.settling.settle(over())
    assert (len(desk.settling), desk.settling.forsaken) == (0, {"t-1"})


async def test_some_are_tried_at_a_time_while_nothing_can_be_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    desk.down = StorageUnavailable()
    for number in range(7):
        await desk.settling.settle(over(f"t-{number}"))
    desk.tried = 0
    await desk.settling._settle_late()
    assert desk.tried == 2
    assert len(desk.settling) == len(desk.settling._late) == 7
    desk.down = None
    await desk.until_written(7)


# The end -------------------------------------------------------------------------------------------------------------


async def test_end_writes_what_is_left(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRY_AGAIN", 3_600.0)
    desk.down = StorageUnavailable()
    await desk.settling.settle(over())
    desk.down = None
    await desk.settling.end(5.0)
    assert [written.id for written in desk.written] == ["t-1"]
    await desk.tasks.close(0)


async def test_end_waits_for_what_is_under_way(desk: Desk) -> None:
    gate = asyncio.Event()
    desk.letta.holding = Hold(gate)
    task = desk.tasks.spawn(desk.settling.settle(over()), "settle")
    await asyncio.sleep(0)
    ending = desk.tasks.spawn(desk.settling.end(5.0), "end")
    await asyncio.sleep(0.03)
    assert not ending.done()
    gate.set()
    await asyncio.gather(task, ending)
    assert [written.id for written in desk.written] == ["t-1"]


async def test_end_takes_over_what_was_cancelled(desk: Desk) -> None:
    gate = asyncio.Event()
    desk.letta.holding = Hold(gate)
    task = desk.tasks.spawn(desk.settling.settle(over()), "settle")
    await asyncio.sleep(0)
    task.cancel()
    gate.set()
    await desk.settling.end(5.0)
    assert [written.id for written in desk.written] == ["t-1"]


async def test_end_keeps_what_was_taken_though_nobody_names_the_model(desk: Desk) -> None:
    desk.letta.down = UpstreamUnavailable()
    await desk.settling.settle(over())
    await desk.settling.end(5.0)
    (written,) = desk.written
    assert (written.model, written.prompt_tokens, written.cost_micros) == (UNKNOWN, 100, 1_200)
    await desk.tasks.close(0)


async def test_end_does_not_wait_for_ever(desk: Desk, logs: list[Any]) -> None:
    desk.down = StorageUnavailable()
    await desk.settling.settle(over())
    await desk.settling.end(0.05)
    assert {"event": "ledger not written to its end", "turns": 1, "log_level": "warning"} in logs
    await desk.tasks.close(0)


async def test_oldest_of_what_waits(desk: Desk) -> None:
    desk.down = StorageUnavailable()
    await desk.settling.settle(msgspec.structs.replace(over("t-1"), ended_at=7.0))
    await desk.settling.settle(msgspec.structs.replace(over("t-2"), ended_at=6.0))
    assert desk.settling.oldest == 6.0
    desk.down = None
    await desk.until_written(2)
    assert desk.settling.oldest is None


@pytest.mark.parametrize(
    ("taken", "characters", "prompt", "cost"),
    [
        (Usage(0, 0), 4_000, 700, 700 + 2 * 1_000),
        (Usage(0, 0), 4_000, 0, LEAST_PROMPT + 2 * 1_000),
        (None, 4_000, 700, 700 + 2 * 1_000),
        (Usage(900, 2_000), 4_000, 700, 900 + 2 * 2_000),
        (Usage(900, 20), 4_000, 700, 900 + 2 * 1_000),
        (Usage(900, 20), None, 700, 900 + 2 * 20),
        (Usage(0, 0), 4_000, None, 0),
    ],
)
async def test_cut_turn_of_who_has_a_budget_costs_what_it_likely_took(
    desk: Desk, taken: Usage | None, characters: int | None, prompt: int | None, cost: int
) -> None:
    """The tokens are those that Letta counts, all the same."""
    if prompt is not None:
        desk.prompts["t-1"] = prompt
    assert await desk.settling.settle(Over("t-1", "agent-1", taken, "interrupted", 5.0, characters))
    (written,) = desk.written
    assert written.cost_micros == cost
    counted = taken or Usage(0, 0)
    assert (written.prompt_tokens, written.completion_tokens) == (counted.prompt_tokens, counted.completion_tokens)
