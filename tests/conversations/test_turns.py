import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import msgspec
import pytest

from gateway.conversations import turns as module
from gateway.conversations.metering import Payer
from gateway.conversations.turns import TurnPolicy, TurnRegistry
from gateway.errors import (
    AgentGone,
    BudgetExceeded,
    ConversationBusy,
    GatewayError,
    Overloaded,
    ResponseCancelled,
    ShuttingDown,
    StorageUnavailable,
    ThreadLost,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta.scripted import Break, Hang, Hold, Pause, Script, ScriptedBackend, ScriptedTurn, says
from gateway.metrics import Metrics
from gateway.shared_state.locks import Lease
from gateway.shared_state.memory import MemoryLocks
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Failure, Stop, TextDelta, Usage
from gateway.translation.agent_turn import AgentTurn, Text
from tests.conversations.meters import RecordingMeter, Settled
from tests.letta.batches import batches, heard, next_batch
from tests.said import parts_of, said_to

Work: TypeAlias = Callable[[], Awaitable[object]]

HI = TextDelta("Hi")
TALKS_FOR_EVER = Script(steps=([HI], Hang()))


class OneAtATime(ScriptedBackend):
    """A backend that fails the test where two turns of one thread overlap."""

    def turn(self, turn: AgentTurn) -> ScriptedTurn:
        for other in self.turns:
            assert other.closed or other.sent.thread != turn.thread, "two turns at once"
        return super().turn(turn)


class Saying:
    """A plan that says one message, and notes what it is asked.

    ``events`` are the names of what was asked; ``delivered`` is what ``end`` was told. ``begin`` and ``end`` do what
    they are given to do before they are done.
    """

    def __init__(
        self,
        name: str,
        agent: str = "agent-1",
        *,
        begin: Work | None = None,
        end: Work | None = None,
        quiet: bool = False,
    ) -> None:
        self.name = name
        self.thread = agent
        self.payer = Payer("anna", "chat_completions")
        self.is_quiet = quiet
        self.events: list[str] = []
        self.delivered: bool | None = None
        self._begin = begin
        self._end = end

    async def begin(self, lease: Lease) -> AgentTurn:
        assert lease.thread == self.thread
        self.events.append("begin")
        if self._begin is not None:
            await self._begin()
        return said_to(self.thread, Text(self.name))

    async def end(self, *, is_delivered: bool) -> None:
        self.events.append("end")
        self.delivered = is_delivered
        if self._end is not None:
            await self._end()
        self.events.append("ended")


def raising(error: BaseException) -> Work:
    async def work() -> None:
        raise error

    return work


class House:
    """A registry with all that it uses, and clients of it."""

    def __init__(self, policy: TurnPolicy | None = None, *, locks: MemoryLocks | None = None) -> None:
        self.backend = OneAtATime()
        self.metrics = Metrics()
        self.tasks = TaskSet()
        self.clients = TaskSet()
        chosen = policy or TurnPolicy()
        usual = MemoryLocks(depth=lambda: chosen.queue_depth, wait=chosen.queue_wait, metrics=self.metrics)
        self.locks = usual if locks is None else locks
        self.meter = RecordingMeter()
        self.registry = TurnRegistry(self.backend, self.meter, chosen, self.metrics, self.tasks, locks=self.locks)
        self.finished: list[str] = []
        self.plans: list[Saying] = []

    async def talk(self, plan: Saying) -> int:
        """Take a whole turn and return how many batches it had."""
        self.plans.append(plan)
        async with self.registry.turn(plan) as held:
            said = [batch async for batch in batches(held.running)]
        self.finished.append(plan.name)
        return len(said)

    async def client(self, plan: Saying | str, agent: str = "agent-1") -> "asyncio.Task[int]":
        """Let somebody talk, and see them in."""
        plan = Saying(plan, agent) if isinstance(plan, str) else plan
        task = self.clients.spawn(self.talk(plan), plan.name)
        await settled()
        return task

    def gauge(self, name: str) -> float:
        """Return what a gauge shows."""
        (sample,) = getattr(self.metrics, name).collect()[0].samples
        return float(sample.value)

    @property
    def names(self) -> list[str]:
        """Return who was let through, in order."""
        return [part.text for turn in self.backend.turns for part in parts_of(turn.sent) if isinstance(part, Text)]

    def assert_empty(self) -> None:
        """Fail where anything is left of any turn."""
        assert self.registry.held == 0
        assert len(self.locks) == 0
        assert not self.registry._open
        assert self.registry._idle.is_set()
        assert len(self.tasks) == 0
        assert all(turn.closed for turn in self.backend.turns)
        assert all(plan.events.count("end") < 2 for plan in self.plans)
        assert self.gauge("turns") == self.gauge("waiting") == 0
        self.meter.assert_settled()


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def outcome(task: "asyncio.Task[int]") -> int | BaseException:
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return result


async def leave(task: "asyncio.Task[int]") -> None:
    task.cancel()
    assert isinstance(await outcome(task), asyncio.CancelledError)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    await settled()
    made.assert_empty()


# One at a time -------------------------------------------------------------------------------------------------------


async def test_whole_turn(house: House) -> None:
    async with house.registry.turn(Saying("Hi", quiet=True)) as held:
        assert (house.registry.held, house.gauge("turns")) == (1, 1)
        (told,) = house.registry.open
        assert (told.id, told.agent_id) == (held.id, house.backend.turns[0].sent.agent_id)
        assert (told.owner, told.source) == (held.plan.payer.owner, held.plan.payer.source)
        assert abs(time.time() - told.began_at) < 60
        assert await next_batch(held.running) == [TextDelta("Hello")]
        await heard(held.running)
    (turn,) = house.backend.turns
    assert (turn.opened, turn.cancelled, turn.drained, turn.closed) == (1, False, False, True)


async def test_first_come_first_served(house: House) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
    tasks = [await house.client(name) for name in "abcde"]
    assert house.names == ["a"]
    assert (house.registry.held, house.gauge("turns"), house.gauge("waiting")) == (5, 1, 4)
    gate.set()
    await asyncio.gather(*tasks)
    assert house.names == house.finished == ["a", "b", "c", "d", "e"]


async def test_agents_do_not_wait_for_each_other(house: House) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
    first = await house.client("a", "agent-1")
    await (await house.client("b", "agent-2"))
    gate.set()
    await first
    assert house.finished == ["b", "a"]


async def test_newcomer_does_not_overtake_one_who_waits(house: House) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
    first, second = [await house.client(name) for name in "ab"]
    gate.set()
    await first
    third = house.clients.spawn(house.talk(Saying("c")), "c")
    await asyncio.gather(second, third)
    assert house.names == ["a", "b", "c"]


async def test_queue_is_full() -> None:
    house = House(TurnPolicy(queue_depth=2))
    house.backend.play(TALKS_FOR_EVER)
    waiting = [await house.client(name) for name in "abc"]
    refused = await outcome(await house.client("d"))
    assert isinstance(refused, ConversationBusy)
    assert refused.headers() == {"Retry-After": "2", "x-should-retry": "true"}
    await leave(waiting[0])
    await asyncio.gather(*waiting[1:])
    await settled()
    house.assert_empty()


async def test_no_queue_at_all() -> None:
    house = House(TurnPolicy(queue_depth=0))
    house.backend.play(TALKS_FOR_EVER)
    first = await house.client("a")
    assert isinstance(await outcome(await house.client("b")), ConversationBusy)
    await leave(first)
    await settled()
    house.assert_empty()


async def test_wait_is_too_long() -> None:
    house = House(TurnPolicy(queue_wait=0.02))
    house.backend.play(TALKS_FOR_EVER)
    first, second = [await house.client(name) for name in "ab"]
    assert isinstance(await outcome(second), ConversationBusy)
    assert house.registry.held == 1
    await leave(first)
    await settled()
    house.assert_empty()


async def test_gateway_is_full() -> None:
    house = House(TurnPolicy(max_turns=2))
    house.backend.play(TALKS_FOR_EVER, TALKS_FOR_EVER)
    held = [await house.client(name, agent) for name, agent in (("a", "agent-1"), ("b", "agent-1"))]
    assert isinstance(await outcome(await house.client("c", "agent-2")), Overloaded)
    assert (house.gauge("held_turns"), house.gauge("most_turns")) == (2, 2), "one of them waits"
    for task in held:
        await leave(task)
        await settled()
    assert await (await house.client("d")) == 5
    await settled()
    house.assert_empty()


async def test_thread_is_taken_while_a_turn_has_it_or_is_settled(house: House) -> None:
    gate = asyncio.Event()
    task = await house.client(Saying("a", end=gate.wait))
    assert await task == 5
    assert (await house.registry.is_taken("agent-1"), await house.registry.is_taken("agent-2")) == (True, False)
    gate.set()
    await settled()
    assert not await house.registry.is_taken("agent-1")


# Leaving early -------------------------------------------------------------------------------------------------------


async def test_left_in_the_stream_is_cancelled_and_the_thread_held_until_then(house: House) -> None:
    settling = asyncio.Event()
    house.backend.play(Script(steps=([HI], Hang()), settling=(Hold(settling),)))
    first, second = [await house.client(name) for name in "ab"]
    await leave(first)
    await settled()
    assert house.backend.turns[0].cancelled
    assert not house.backend.turns[0].closed
    assert (house.names, house.registry.held) == (["a"], 2)
    settling.set()
    assert await second == 5
    assert house.backend.turns[0].closed


async def test_left_while_it_is_opened_is_cancelled(house: House) -> None:
    house.backend.play(Script(opening=(Hang(),)))
    await leave(await house.client("a"))
    await settled()
    assert house.backend.turns[0].cancelled


async def test_left_after_the_stop_is_not_cancelled(house: House) -> None:
    house.backend.play(Script(steps=([HI, Stop("end_turn")], Hang())))
    await leave(await house.client("a"))
    await settled()
    assert not house.backend.turns[0].cancelled
    assert house.backend.turns[0].closed


async def test_left_by_an_error_of_the_clients_side(house: House) -> None:
    house.backend.play(TALKS_FOR_EVER)
    with pytest.raises(ConnectionResetError):
        async with house.registry.turn(Saying("a")):
            raise ConnectionResetError
    await settled()
    assert house.backend.turns[0].cancelled


async def test_stream_that_was_cut_off_is_cancelled_upstream(house: House) -> None:
    house.backend.play(Script(steps=([HI], Break(UpstreamTruncated()))))
    assert isinstance(await outcome(await house.client("a")), UpstreamTruncated)
    await settled()
    assert house.backend.turns[0].cancelled


async def test_policy_finish_lets_the_turn_go_on() -> None:
    house = House(TurnPolicy(on_disconnect="finish"))
    gate = asyncio.Event()
    house.backend.play(Script(steps=([HI], Hold(gate), [HI], [Stop("end_turn")])))
    first, second = [await house.client(name) for name in "ab"]
    await leave(first)
    await settled()
    turn = house.backend.turns[0]
    assert (turn.drained, turn.cancelled, turn.closed, turn.heard) == (True, False, False, 1)
    assert house.names == ["a"]
    gate.set()
    await second
    assert (turn.heard, turn.closed) == (3, True)
    await settled()
    house.assert_empty()


@pytest.mark.parametrize("failure", [UpstreamUnavailable(), TimeoutError()])
@pytest.mark.parametrize("on_disconnect", ["cancel", "finish"])
async def test_settling_that_fails_frees_the_thread_all_the_same(on_disconnect: Any, failure: Any) -> None:
    house = House(TurnPolicy(on_disconnect=on_disconnect))
    gate = asyncio.Event()
    house.backend.play(Script(steps=([HI], Hold(gate), Break(failure)), settling=(Break(failure),)))
    await leave(await house.client("a"))
    gate.set()
    assert await (await house.client("b")) == 5
    await settled()
    house.assert_empty()


# Waiters that give up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["b", "c", "d"])
async def test_waiter_that_leaves_is_passed_over(house: House, who: str) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
    tasks = {name: await house.client(name) for name in "abcd"}
    await leave(tasks.pop(who))
    gate.set()
    await asyncio.gather(*tasks.values())
    assert house.names == sorted(tasks)


async def test_waiter_that_leaves_at_the_moment_of_the_hand_over(house: House) -> None:
    for moment in range(12):
        gate = asyncio.Event()
        before = len(house.names)
        house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
        first, second, third = [await house.client(f"{name}{moment}") for name in "abc"]
        gate.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        await settled()
        assert house.names[before] == f"a{moment}"
        assert house.names[-1] == f"c{moment}"
        house.assert_empty()


async def test_waiter_that_was_given_the_thread_and_leaves_before_it_knows(house: House) -> None:
    house.backend.play(TALKS_FOR_EVER)
    first, second, third = [await house.client(name) for name in "abc"]
    (queue,) = house.locks._threads.values()
    given = queue[0]
    first.cancel()
    while not given.done():  # noqa: ASYNC110 - the moment itself is what is tried
        await asyncio.sleep(0)
    assert not second.done()
    second.cancel()
    assert isinstance(await outcome(second), asyncio.CancelledError)
    assert await third == 5
    assert house.names == ["a", "c"]


async def test_wait_that_runs_out_at_the_moment_of_the_hand_over() -> None:
    house = House(TurnPolicy(queue_wait=0.01))
    for pause in (0.008, 0.009, 0.01, 0.011, 0.012):
        house.backend.play(Script(steps=(Pause(pause), [Stop("end_turn")])))
        tasks = [await house.client(name) for name in "abc"]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, int | ConversationBusy)
        await settled()
        house.assert_empty()


# Letta refuses -------------------------------------------------------------------------------------------------------


async def test_refused_turn_is_over_at_once(house: House) -> None:
    house.backend.play(Script(opening=(Break(UpstreamRejected()),)))
    assert isinstance(await outcome(await house.client("a")), UpstreamRejected)
    assert not house.backend.turns[0].cancelled
    assert house.backend.turns[0].closed


async def test_letta_that_is_busy_is_asked_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_PAUSE", 0.005)
    house.backend.play(Script(steps=says("a").steps, opening=(Break(ConversationBusy()),) * 3))
    task, waiting = [await house.client(name) for name in "ab"]
    assert house.registry.held == 2
    assert await task == 2
    await waiting
    assert [turn.opened for turn in house.backend.turns] == [4, 1]


async def test_letta_that_is_busy_for_too_long() -> None:
    house = House(TurnPolicy(queue_wait=0.3))
    house.backend.play(Script(opening=(Break(ConversationBusy()),) * 9))
    assert isinstance(await outcome(await house.client("a")), ConversationBusy)
    assert house.backend.turns[0].opened == 2
    await settled()
    house.assert_empty()


# What a plan is asked -------------------------------------------------------------------------------------------------

WHOLE = ["begin", "end", "ended"]


async def test_plan_of_a_whole_turn(house: House) -> None:
    plan = Saying("a")
    async with house.registry.turn(plan) as held:
        assert plan.events == ["begin"]
        await heard(held.running)
        assert plan.events == ["begin"]
    await settled()
    assert (plan.events, plan.delivered) == (WHOLE, True)


async def test_plan_that_is_quiet_is_left_at_once(house: House) -> None:
    plan = Saying("a", quiet=True)
    async with house.registry.turn(plan) as held:
        await heard(held.running)
    assert (plan.events, house.registry.held) == (["begin"], 0)


async def test_plan_that_becomes_loud_in_its_turn_is_told(house: House) -> None:
    plan = Saying("a", quiet=True)
    async with house.registry.turn(plan) as held:
        await heard(held.running)
        plan.is_quiet = False
    await settled()
    assert plan.events == WHOLE


async def test_plan_is_asked_when_its_thread_is_its_own(house: House) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
    first, second = [await house.client(name) for name in "ab"]
    assert [plan.events for plan in house.plans] == [["begin"], []]
    gate.set()
    await asyncio.gather(first, second)


@pytest.mark.parametrize("policy", [TurnPolicy(queue_depth=0), TurnPolicy(queue_wait=0.01), TurnPolicy(max_turns=1)])
async def test_plan_that_never_had_its_thread_is_asked_nothing(policy: TurnPolicy) -> None:
    house = House(policy)
    house.backend.play(TALKS_FOR_EVER)
    first = await house.client("a")
    assert isinstance(await outcome(await house.client("b")), ConversationBusy | Overloaded)
    assert house.plans[1].events == []
    await leave(first)
    await settled()
    house.assert_empty()


async def test_waiter_that_leaves_is_asked_nothing(house: House) -> None:
    house.backend.play(TALKS_FOR_EVER)
    first, second = [await house.client(name) for name in "ab"]
    await leave(second)
    await leave(first)
    await settled()
    assert [plan.events for plan in house.plans] == [WHOLE, []]


async def test_plan_that_finds_its_thread_lost_may_be_tried_again(house: House) -> None:
    error = await outcome(await house.client(Saying("a", begin=raising(ThreadLost()))))
    assert isinstance(error, ThreadLost)
    assert error.should_retry is True
    await settled()


@pytest.mark.parametrize("error", [UpstreamUnavailable(), StorageUnavailable(), RuntimeError("a bug")])
async def test_plan_that_cannot_begin(house: House, error: Exception) -> None:
    plan = Saying("a", begin=raising(error))
    first, second = await house.client(plan), await house.client("b")
    assert await outcome(first) is error
    assert await second == 5
    await settled()
    assert (plan.events, plan.delivered) == (WHOLE, False)
    assert house.names == ["b"]


async def test_plan_that_is_left_while_it_begins(house: House) -> None:
    plan = Saying("a", begin=asyncio.Event().wait)
    first, second = await house.client(plan), await house.client("b")
    await leave(first)
    assert await second == 5
    await settled()
    assert (plan.events, plan.delivered) == (WHOLE, False)


async def test_end_of_the_gateway_while_a_plan_begins(house: House) -> None:
    gate = asyncio.Event()
    plan = Saying("a", begin=gate.wait)
    task = await house.client(plan)
    ending = house.clients.spawn(house.registry.end(), "end")
    await settled()
    gate.set()
    assert isinstance(await outcome(task), ShuttingDown)
    await ending
    assert (plan.events, plan.delivered) == (WHOLE, False)
    assert [turn.opened for turn in house.backend.turns] == [0]


async def test_thread_is_held_until_the_plan_has_ended(house: House) -> None:
    gate = asyncio.Event()
    first, second = await house.client(Saying("a", end=gate.wait)), await house.client("b")
    assert await first == 5
    await settled()
    assert (house.names, house.plans[0].events, house.registry.held) == (["a"], ["begin", "end"], 2)
    gate.set()
    assert await second == 5


async def test_thread_is_held_until_a_plan_that_could_not_begin_has_ended(house: House) -> None:
    gate = asyncio.Event()
    plan = Saying("a", begin=raising(UpstreamUnavailable()), end=gate.wait)
    first, second = await house.client(plan), await house.client("b")
    assert isinstance(await outcome(first), UpstreamUnavailable)
    await settled()
    assert (house.names, house.registry.held) == ([], 2)
    gate.set()
    assert await second == 5


@pytest.mark.parametrize("error", [StorageUnavailable(), TimeoutError(), ValueError("a bug")])
@pytest.mark.parametrize("begin", [None, raising(UpstreamUnavailable())])
async def test_end_that_fails_frees_the_thread_all_the_same(house: House, begin: Work | None, error: Exception) -> None:
    first, second = await house.client(Saying("a", begin=begin, end=raising(error))), await house.client("b")
    await outcome(first)
    assert await second == 5
    assert house.plans[0].events == ["begin", "end"]


async def test_end_that_hangs_frees_the_thread_in_the_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL", 0.02)
    first, second = await house.client(Saying("a", end=asyncio.Event().wait)), await house.client("b")
    assert await first == 5
    assert house.names == ["a"]
    assert await second == 5
    assert house.plans[0].events == ["begin", "end"]


async def test_settling_that_has_a_bug_frees_the_thread_all_the_same(house: House) -> None:
    bug: Any = ValueError("a bug")
    house.backend.play(Script(steps=([HI], Hang()), settling=(Break(bug),)))
    first, second = [await house.client(name) for name in "ab"]
    await leave(first)
    assert await second == 5
    assert house.plans[0].events == WHOLE


async def test_close_of_the_tasks_while_a_turn_is_settled_tells_the_plan(house: House) -> None:
    house.backend.play(Script(steps=([HI], Hang()), settling=(Hang(),)))
    await leave(await house.client("a"))
    await settled()
    await house.tasks.close(0)
    assert house.plans[0].events == WHOLE


# Delivered or not ----------------------------------------------------------------------------------------------------

DELIVERED: dict[str, tuple[Script, bool]] = {
    "ended well": (says("a"), True),
    "broke": (Script(steps=([HI], Break(UpstreamTruncated()))), True),
    "broke with an error that says to try again": (
        Script(steps=([HI], Break(UpstreamUnavailable(should_retry=True)))),
        True,
    ),
    "ended by a failure": (Script(steps=([HI, Failure(UpstreamRejected())],)), True),
    "cut off": (Script(steps=([HI],)), True),
    "refused, surely not delivered": (Script(opening=(Break(UpstreamUnavailable(should_retry=True)),)), False),
    "refused, may be delivered": (Script(opening=(Break(UpstreamTimeout(should_retry=False)),)), True),
    "refused, nobody knows": (Script(opening=(Break(UpstreamRejected()),)), True),
    "busy for too long": (Script(opening=(Break(ConversationBusy()),) * 9), False),
}


@pytest.mark.parametrize(("script", "is_delivered"), DELIVERED.values(), ids=DELIVERED.keys())
async def test_plan_is_told_whether_it_was_delivered(script: Script, is_delivered: Any) -> None:
    house = House(TurnPolicy(queue_wait=0.1))
    house.backend.play(script)
    await outcome(await house.client("a"))
    await settled()
    assert (house.plans[0].events, house.plans[0].delivered) == (WHOLE, is_delivered)
    house.assert_empty()


@pytest.mark.parametrize("script", [TALKS_FOR_EVER, Script(opening=(Hang(),))])
@pytest.mark.parametrize("on_disconnect", ["cancel", "finish"])
async def test_turn_that_was_left_may_be_delivered(script: Script, on_disconnect: Any) -> None:
    house = House(TurnPolicy(on_disconnect=on_disconnect))
    house.backend.play(script)
    await leave(await house.client("a"))
    await settled()
    await house.registry.end()
    for turn in house.backend.turns:
        turn.abort(UpstreamTimeout())
    await settled()
    assert (house.plans[0].events, house.plans[0].delivered) == (WHOLE, True)
    house.assert_empty()


async def test_turn_that_was_ended_in_its_stream_was_delivered(house: House) -> None:
    house.backend.play(TALKS_FOR_EVER)
    task = await house.client("a")
    await house.registry.end()
    assert isinstance(await outcome(task), ShuttingDown)
    assert house.plans[0].delivered is True


# What the ledger is told ----------------------------------------------------------------------------------------------

USED = Usage(100, 20)
CUT = Usage(30, 4)

METERED: dict[str, tuple[Script, Settled]] = {
    "complete": (says("a"), Settled(USED, "complete")),
    "complete, of which Letta keeps no count": (Script(steps=([HI, Stop("end_turn")],)), Settled(None, "complete")),
    "two steps": (Script(steps=([USED], [CUT], [Stop("end_turn")])), Settled(Usage(130, 24), "complete")),
    "broke": (Script(steps=([HI], Break(UpstreamTruncated()), [HI]), counted=CUT), Settled(CUT, "failed")),
    "broke with an error that says to try again": (
        Script(steps=([HI], Break(UpstreamUnavailable(should_retry=True)), [HI]), counted=CUT),
        Settled(CUT, "failed"),
    ),
    "cancelled by its owner": (
        Script(steps=([HI], Break(ResponseCancelled(should_retry=False)), [HI]), counted=CUT),
        Settled(CUT, "interrupted"),
    ),
    "refused, surely not delivered": (
        Script(opening=(Break(UpstreamUnavailable(should_retry=True)),)),
        Settled(None, "unsent"),
    ),
    "refused, may be delivered": (
        Script(opening=(Break(UpstreamTimeout(should_retry=False)),), steps=([HI],), counted=CUT),
        Settled(CUT, "failed"),
    ),
    "refused, nobody knows": (Script(opening=(Break(UpstreamRejected()),)), Settled(None, "failed")),
    "busy for too long": (Script(opening=(Break(ConversationBusy()),) * 9), Settled(None, "unsent")),
}


@pytest.mark.parametrize(("script", "settled_as"), METERED.values(), ids=METERED.keys())
async def test_ledger_is_told_once_what_a_turn_took(script: Script, settled_as: Settled) -> None:
    house = House(TurnPolicy(queue_wait=0.1))
    house.backend.play(script)
    await outcome(await house.client("a"))
    await settled()
    assert list(house.meter.settled.values()) == [settled_as]
    assert house.meter.left_open == []
    house.assert_empty()


async def test_turn_has_its_name_from_the_ledger_before_it_is_opened(house: House) -> None:
    gate = asyncio.Event()
    house.meter.opening = gate
    task = await house.client("a")
    assert house.backend.turns == []
    gate.set()
    await task
    ((turn_id, (payer, turn)),) = house.meter.opened.items()
    assert (payer, turn.mark) == (Payer("anna", "chat_completions"), None)
    assert house.backend.turns[0].sent == msgspec.structs.replace(turn, mark=turn_id)


async def test_answer_that_was_heard_to_its_end_is_in_the_ledger_before_the_turn_is_left(house: House) -> None:
    gate = asyncio.Event()
    house.meter.closing = gate
    task = await house.client(Saying("a", quiet=True))
    assert (house.meter.outcomes, task.done(), await house.registry.is_taken("agent-1")) == (["complete"], False, True)
    gate.set()
    assert await task == 5


async def test_turn_that_is_left_while_the_ledger_is_told_is_told_once(house: House) -> None:
    house.meter.closing = asyncio.Event()
    await leave(await house.client("a"))
    await settled()
    assert house.meter.outcomes == ["complete"]
    assert house.plans[0].delivered is True


@pytest.mark.parametrize("opening", [(Hang(),), ()], ids=["before it was open", "in its stream"])
async def test_turn_that_was_cut_is_metered_once_it_has_ended(house: House, opening: Any) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(opening=opening, steps=([HI], Hang()), settling=(Hold(gate),), counted=CUT))
    await leave(await house.client("a"))
    await settled()
    assert house.meter.settled == {}
    gate.set()
    await settled()
    assert list(house.meter.settled.values()) == [Settled(CUT, "interrupted")]


async def test_turn_that_goes_on_unheard_is_metered_at_its_end() -> None:
    house = House(TurnPolicy(on_disconnect="finish"))
    gate = asyncio.Event()
    house.backend.play(Script(steps=([HI], Hold(gate), [USED], [Stop("end_turn")])))
    await leave(await house.client("a"))
    await settled()
    assert house.meter.settled == {}
    gate.set()
    await settled()
    assert list(house.meter.settled.values()) == [Settled(USED, "interrupted")]
    house.assert_empty()


async def test_turn_that_the_end_of_the_gateway_cut(house: House) -> None:
    house.backend.play(Script(steps=([HI], Hang()), counted=CUT))
    task = await house.client("a")
    await house.registry.end()
    assert isinstance(await outcome(task), ShuttingDown)
    assert list(house.meter.settled.values()) == [Settled(CUT, "interrupted")]


@pytest.mark.parametrize("error", [UpstreamUnavailable(), UpstreamTimeout(), TimeoutError(), ValueError("a bug")])
async def test_turn_whose_count_cannot_be_had_is_left_open(house: House, error: Any) -> None:
    house.backend.play(Script(steps=([HI], Hang()), counted=Break(error)))
    first, second = [await house.client(name) for name in "ab"]
    await leave(first)
    assert await second == 5
    assert (house.meter.left_open, house.meter.outcomes) == (["turn-1"], ["complete"])
    assert house.plans[0].events == WHOLE


async def test_turn_that_is_not_settled_when_the_tasks_end_is_left_open(house: House) -> None:
    house.backend.play(Script(steps=([HI], Hang()), settling=(Hang(),)))
    await leave(await house.client("a"))
    await settled()
    await house.tasks.close(0)
    assert (house.meter.left_open, house.meter.settled) == (["turn-1"], {})


@pytest.mark.parametrize("error", [BudgetExceeded(), StorageUnavailable()])
async def test_turn_that_the_ledger_refuses_is_not_sent(house: House, error: GatewayError) -> None:
    house.meter.refusal = error
    assert await outcome(await house.client("a")) is error
    house.meter.refusal = None
    assert await (await house.client("b")) == 5
    assert house.names == ["b"]
    assert (house.plans[0].events, house.plans[0].delivered) == (WHOLE, False)
    assert house.meter.outcomes == ["complete"]
    assert error.should_retry is isinstance(error, StorageUnavailable)


class Losing(MemoryLocks):
    """Locks whose leases the test has another gateway take over."""

    def __init__(self) -> None:
        super().__init__(depth=lambda: 8, wait=30.0, metrics=Metrics())
        self.leases: list[Lease] = []
        self.checked = 0

    async def acquire(self, thread: str) -> Lease:
        self.leases.append(await super().acquire(thread))
        return self.leases[-1]

    async def check(self, lease: Lease) -> None:
        self.checked += 1
        if lease.is_lost:
            raise ThreadLost(should_retry=True)

    async def lose(self) -> None:
        """Have another gateway take over the newest one."""
        self.leases[-1].lose()


@pytest.mark.parametrize("when", ["while the plan begins", "while the ledger is asked", "before Letta is asked again"])
async def test_turn_whose_thread_is_lost_before_it_is_sent_is_not_sent(when: str) -> None:
    locks = Losing()
    house = House(locks=locks)
    plan = Saying("a", begin=locks.lose if when == "while the plan begins" else None)
    house.meter.opening = asyncio.Event()
    if when == "before Letta is asked again":
        house.backend.play(Script(opening=(Break(ConversationBusy()),)))
        house.meter.opening.set()
    task = await house.client(plan)
    if when != "while the plan begins":
        await locks.lose()
    house.meter.opening.set()
    error = await outcome(task)
    assert isinstance(error, ThreadLost)
    assert house.names == ["a"]
    assert house.backend.turns[0].opened == (1 if when == "before Letta is asked again" else 0)
    await settled()
    assert plan.delivered is False
    assert house.meter.outcomes == ["unsent"]


async def test_turn_whose_thread_is_lost_in_its_stream_ends_with_an_error() -> None:
    locks = Losing()
    house = House(locks=locks)
    house.backend.play(TALKS_FOR_EVER)
    task = await house.client("a")
    await locks.lose()
    assert isinstance(await outcome(task), ThreadLost)
    await settled()
    assert house.meter.outcomes == ["interrupted"]
    assert locks.checked == 1


async def test_turn_that_is_left_while_the_ledger_is_asked_is_not_sent(house: House) -> None:
    house.meter.opening = asyncio.Event()
    first = await house.client("a")
    await leave(first)
    house.meter.opening = None
    assert await (await house.client("b")) == 5
    assert house.names == ["b"]
    assert house.plans[0].delivered is False


@pytest.mark.parametrize("policy", [TurnPolicy(queue_depth=0), TurnPolicy(queue_wait=0.01), TurnPolicy(max_turns=1)])
async def test_turn_that_never_had_its_thread_is_not_in_the_ledger(policy: TurnPolicy) -> None:
    house = House(policy)
    house.backend.play(TALKS_FOR_EVER)
    first = await house.client("a")
    assert isinstance(await outcome(await house.client("b")), ConversationBusy | Overloaded)
    assert list(house.meter.opened) == ["turn-1"]
    await leave(first)
    await settled()
    house.assert_empty()


# The end -------------------------------------------------------------------------------------------------------------


async def test_idle_gateway_is_idle(house: House) -> None:
    await house.registry.idle()


async def test_idle_when_the_last_turn_is_over(house: House) -> None:
    gate = asyncio.Event()
    house.backend.play(Script(steps=(Hold(gate), *says("a").steps)))
    tasks = [await house.client(name) for name in "ab"]
    idle = house.clients.spawn(house.registry.idle(), "idle")
    await settled()
    tasks.append(await house.client("c"))
    assert not idle.done()
    gate.set()
    assert [await task for task in tasks] == [2, 5, 5]
    await idle
    assert not any(turn.aborted for turn in house.backend.turns)


async def test_end_of_turns_that_talk_for_ever() -> None:
    house = House(TurnPolicy(on_disconnect="finish"))
    house.backend.play(TALKS_FOR_EVER)
    open_turn, waiting = [await house.client(name) for name in "ab"]
    await house.registry.end()
    ended, refused = await outcome(open_turn), await outcome(waiting)
    assert isinstance(ended, ShuttingDown)
    assert ended.should_retry is False
    assert isinstance(refused, ShuttingDown)
    assert refused.headers() == {"Retry-After": "2", "x-should-retry": "true"}
    assert house.names == ["a"]
    assert house.backend.turns[0].cancelled  # whatever the policy says of clients that leave
    house.assert_empty()


async def test_turn_that_ran_out_of_time_is_cancelled_though_turns_are_to_finish() -> None:
    house = House(TurnPolicy(on_disconnect="finish"))
    house.backend.play(TALKS_FOR_EVER)
    client = await house.client("a")
    house.backend.turns[0].abort(UpstreamTimeout(should_retry=False))
    assert isinstance(await outcome(client), UpstreamTimeout)
    await settled()
    assert house.backend.turns[0].cancelled
    house.assert_empty()


@pytest.mark.parametrize("on_disconnect", ["cancel", "finish"])
async def test_turns_of_an_owner_that_somebody_ends(on_disconnect: Any) -> None:
    house = House(TurnPolicy(on_disconnect=on_disconnect))
    house.backend.play(TALKS_FOR_EVER, TALKS_FOR_EVER)
    task, waiting = await house.client("a"), await house.client("b")
    other = Saying("c", "agent-2")
    other.payer = Payer("ben", "platform")
    others = await house.client(other)
    async with asyncio.timeout(5):
        await house.registry.stop("anna")
    assert house.registry.held == 1, "those that ended are settled"
    for ended in (task, waiting):
        assert isinstance(await outcome(ended), ResponseCancelled)
    assert house.names == ["a", "c"], "what waited was never said"
    assert house.backend.turns[0].cancelled
    assert house.meter.outcomes == ["interrupted"]
    assert not others.done()
    await house.talk(Saying("d"))
    await house.registry.stop("ben")
    await outcome(others)
    await settled()
    house.assert_empty()


async def test_nothing_begins_with_an_agent_that_is_deleted(house: House) -> None:
    house.backend.play(TALKS_FOR_EVER)
    task, waiting = await house.client("a"), await house.client("b")
    await house.registry.retire({"agent-1"})
    assert isinstance(await outcome(task), ResponseCancelled)
    assert isinstance(await outcome(waiting), AgentGone)
    assert isinstance(await outcome(await house.client("c")), AgentGone)
    await house.talk(Saying("d", "agent-2"))
    await settled()
    assert house.meter.outcomes == ["interrupted", "unsent", "unsent", "complete"]
    assert house.names == ["a", "d"]
    house.assert_empty()


async def test_turn_that_cannot_be_settled_holds_up_nobody_who_ends_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP", 0.05)
    gate = asyncio.Event()
    house.backend.play(Script(steps=([HI], Hang()), settling=(Hold(gate),)))
    task = await house.client("a")
    async with asyncio.timeout(5):
        await house.registry.stop("anna")
    assert house.registry.held == 1
    gate.set()
    await outcome(task)
    async with asyncio.timeout(5):
        await house.registry.idle()
    house.assert_empty()


async def test_after_the_end_nothing_begins(house: House) -> None:
    await house.registry.end()
    refused = await outcome(await house.client("a"))
    assert isinstance(refused, ShuttingDown)
    assert refused.should_retry is True
    assert house.backend.turns == []


async def test_end_while_a_turn_is_opened(house: House) -> None:
    house.backend.play(Script(opening=(Hang(),)))
    task = await house.client("a")
    await house.registry.end()
    assert isinstance(await outcome(task), ShuttingDown)


async def test_end_while_letta_is_busy(house: House) -> None:
    house.backend.play(Script(opening=(Break(ConversationBusy()),) * 99))
    task = await house.client("a")
    await house.registry.end()
    assert isinstance(await outcome(task), ShuttingDown)
    assert house.backend.turns[0].opened == 1


async def test_end_at_the_moment_of_the_hand_over_opens_nothing_more() -> None:
    for moment in range(8):
        house = House()
        house.backend.play(TALKS_FOR_EVER, TALKS_FOR_EVER)
        first, second = [await house.client(name) for name in "ab"]
        first.cancel()
        for _ in range(moment):
            await asyncio.sleep(0)
        async with asyncio.timeout(1):
            await house.registry.end()
        assert isinstance(await outcome(second), ShuttingDown)
        await settled()
        house.assert_empty()


async def test_turn_that_cannot_be_settled_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.02)
    house = House()
    gate = asyncio.Event()
    house.backend.play(Script(steps=([HI], Hang()), settling=(Hold(gate),)))
    task = await house.client("a")
    await house.registry.end()
    assert isinstance(await outcome(task), ShuttingDown)
    assert house.registry.held == 1
    gate.set()
    await settled()
    house.assert_empty()


# Anything at any time ------------------------------------------------------------------------------------------------


class Chaos:
    """One random run: clients come, leave and give up, turns break, hang and end, in any order."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        policy = TurnPolicy(
            on_disconnect=self.chance.choice(["cancel", "finish"]),
            queue_depth=self.chance.randrange(4),
            queue_wait=self.chance.choice([0.0, 0.001, 30.0]),
            max_turns=self.chance.choice([3, 100]),
        )
        self.house = House(policy)
        self.gates: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[int]] = []

    async def run(self) -> None:
        """Do some things at random, then let all go and see that nothing is left."""
        actions: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self.come,
            self.come,
            self.go,
            self.open_gate,
            self.wait,
        ]
        for _ in range(self.chance.randrange(3, 24)):
            await self.chance.choice(actions)()
        self.house.backend.usual = Script(steps=([Stop("end_turn")],))
        if self.chance.random() < 0.3:
            ending = self.house.clients.spawn(self.house.registry.end(), "end")
            await self.wait()
            self.open_gates()
            await ending
        self.open_gates()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*self.tasks, return_exceptions=True)
            await self.house.registry._idle.wait()
        await settled()
        self.house.assert_empty()
        for result in results:
            assert isinstance(result, int | GatewayError | asyncio.CancelledError), result

    def open_gates(self) -> None:
        for gate in self.gates:
            gate.set()

    async def come(self) -> None:
        self.house.backend.play(self.script())
        self.house.meter.refusal = self.chance.choice([None, None, None, BudgetExceeded()])
        self.house.meter.opening = self.chance.choice([None, None, self.gate()])
        self.house.meter.closing = self.chance.choice([None, None, self.gate()])
        agent = self.chance.choice(["agent-1", "agent-1", "agent-2"])
        self.tasks.append(self.house.clients.spawn(self.house.talk(self.plan(agent)), "client"))

    def plan(self, agent: str) -> Saying:
        return Saying(f"{len(self.tasks)}", agent, begin=self.work(), end=self.work(), quiet=self.chance.random() < 0.5)

    def gate(self) -> asyncio.Event:
        self.gates.append(asyncio.Event())
        return self.gates[-1]

    def work(self) -> Work | None:
        gate = self.gate()
        return self.chance.choice([None, None, gate.wait, raising(UpstreamUnavailable())])

    async def go(self) -> None:
        if self.tasks:
            self.chance.choice(self.tasks).cancel()

    async def open_gate(self) -> None:
        if self.gates:
            self.chance.choice(self.gates).set()

    async def wait(self) -> None:
        for _ in range(self.chance.randrange(6)):
            await asyncio.sleep(0)

    def script(self) -> Script:
        def some(*steps: Any) -> tuple[Any, ...]:
            return tuple(self.chance.choices(steps, k=self.chance.randrange(3)))

        gate = self.gate()
        broken = Break(UpstreamUnavailable())
        ends: tuple[Any, ...] = self.chance.choice([([Stop("end_turn")],), (), (broken,)])
        return Script(
            steps=(*some([HI], [HI], Hold(gate), Pause(0)), *ends),
            opening=some(Hold(gate), Pause(0), Pause(0), broken),
            settling=some(Hold(gate), Pause(0), broken),
            counted=self.chance.choice([None, USED, broken]),
        )


async def test_nothing_leaks_in_a_thousand_random_runs() -> None:
    idle = len(asyncio.all_tasks())
    for seed in range(1_000):
        try:
            await Chaos(seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert len(asyncio.all_tasks()) == idle
