import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from gateway.conversations import overlays as module
from gateway.conversations.overlays import OverlayGates
from gateway.errors import ConversationBusy
from gateway.tasks import TaskSet


class Turns:
    """Turns of agents, whose instructions must be seen by no other turn."""

    def __init__(self) -> None:
        self.gates = OverlayGates()
        self.tasks = TaskSet()
        self.inside: dict[str, int] = {}
        self.overlaid: set[str] = set()
        self.entered: list[str] = []

    async def run(self, name: str, agent: str = "agent-1", leave: asyncio.Event | None = None) -> bool:
        """Take a turn, with an overlay where it may; return whether it had one."""
        await self.gates.enter(agent)
        try:
            self.entered.append(name)
            assert agent not in self.overlaid, "a turn began while another's instructions were shown"
            self.inside[agent] = self.inside.get(agent, 0) + 1
            try:
                return await self._talk(agent, leave)
            finally:
                self.inside[agent] -= 1
        finally:
            self.gates.leave(agent)

    async def _talk(self, agent: str, leave: asyncio.Event | None) -> bool:
        has_overlay = self.gates.overlay(agent)
        if has_overlay:
            assert self.inside[agent] == 1, "instructions were shown while another turn ran"
            self.overlaid.add(agent)
        try:
            if leave is not None:
                await leave.wait()
        finally:
            if has_overlay:
                self.overlaid.discard(agent)
                self.gates.lift(agent)
        return has_overlay

    async def start(
        self, name: str, agent: str = "agent-1", leave: asyncio.Event | None = None
    ) -> "asyncio.Task[bool]":
        task = self.tasks.spawn(self.run(name, agent, leave), name)
        await settled()
        return task


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def leave(task: "asyncio.Task[bool]") -> None:
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError)


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    made = Turns()
    yield made
    await settled()
    assert made.gates._agents == {}


async def test_turn_alone_has_its_overlay(turns: Turns) -> None:
    assert await turns.run("a")
    assert await turns.run("b")


async def test_turns_wait_for_an_overlay_to_be_lifted_and_go_on_in_order(turns: Turns) -> None:
    done = asyncio.Event()
    first = await turns.start("a", leave=done)
    others = [await turns.start(name) for name in "bcd"]
    assert turns.entered == ["a"]
    done.set()
    assert await first
    assert await asyncio.gather(*others) == [False, False, True]
    assert turns.entered == ["a", "b", "c", "d"]


async def test_no_overlay_while_another_turn_runs(turns: Turns) -> None:
    done = asyncio.Event()
    await turns.gates.enter("agent-1")
    task = await turns.start("b", leave=done)
    assert turns.entered == ["b"]
    done.set()
    assert not await task
    turns.gates.leave("agent-1")


async def test_no_overlay_while_another_turn_waits(turns: Turns) -> None:
    done, others_done = asyncio.Event(), asyncio.Event()
    first = await turns.start("a", leave=done)
    waiting = [await turns.start(name, leave=others_done) for name in "bc"]
    done.set()
    assert await first
    await settled()
    others_done.set()
    assert await asyncio.gather(*waiting) == [False, False]


async def test_agents_do_not_wait_for_each_other(turns: Turns) -> None:
    done = asyncio.Event()
    first = await turns.start("a", "agent-1", leave=done)
    assert await (await turns.start("b", "agent-2"))
    done.set()
    assert await first


async def test_wait_that_takes_too_long(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.02)
    done = asyncio.Event()
    first = await turns.start("a", leave=done)
    with pytest.raises(ConversationBusy) as raised:
        await turns.run("b")
    assert raised.value.should_retry is True
    done.set()
    assert await first
    assert await turns.run("c")


async def test_who_gives_up_is_forgotten(turns: Turns) -> None:
    done = asyncio.Event()
    first = await turns.start("a", leave=done)
    for _ in range(5):
        waiting = [await turns.start(name) for name in "bcd"]
        for task in waiting:
            await leave(task)
    assert len(turns.gates._agents["agent-1"].waiting) == 0
    assert turns.gates._agents["agent-1"].turns == 1
    done.set()
    assert await first


async def test_who_gives_up_holds_up_nobody(turns: Turns) -> None:
    done = asyncio.Event()
    first = await turns.start("a", leave=done)
    waiting = [await turns.start(name) for name in "bcd"]
    await leave(waiting[1])
    done.set()
    assert await asyncio.gather(*[first, waiting[0], waiting[2]]) == [True, False, True]
    assert turns.entered == ["a", "b", "d"]


async def test_turn_that_is_cancelled_under_its_overlay(turns: Turns) -> None:
    first = await turns.start("a", leave=asyncio.Event())
    second = await turns.start("b")
    await leave(first)
    assert await second


async def test_waiter_that_gives_up_at_the_moment_of_the_lift(turns: Turns) -> None:
    for moment in range(8):
        done = asyncio.Event()
        first = await turns.start("a", leave=done)
        second, third = await turns.start("b"), await turns.start("c")
        done.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        second.cancel()
        results = await asyncio.gather(first, second, third, return_exceptions=True)
        assert results[0] is True
        assert isinstance(results[2], bool)
        assert turns.gates._agents == {}


async def test_nobody_sees_anothers_instructions_in_a_thousand_random_runs() -> None:
    for seed in range(1_000):
        chance, turns = random.Random(seed), Turns()
        gates = [asyncio.Event() for _ in range(4)]
        tasks = []
        for number in range(chance.randrange(2, 12)):
            agent = chance.choice(["agent-1", "agent-1", "agent-2"])
            tasks.append(turns.tasks.spawn(turns.run(str(number), agent, chance.choice([None, *gates])), "turn"))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.3:
                chance.choice(gates).set()
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        for gate in gates:
            gate.set()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            assert isinstance(result, bool | asyncio.CancelledError), (seed, result)
        assert turns.gates._agents == {}, seed
