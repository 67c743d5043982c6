import asyncio

import msgspec
import pytest

from gateway.errors import (
    AgentGone,
    ConversationBusy,
    GatewayError,
    InvalidRequest,
    MemoryNotFound,
    ShuttingDown,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta.backend import Agent, AgentBackend, AgentSpec, MemoryBlock, RunningTurn, SentTurn
from gateway.letta.scripted import (
    USUAL,
    Break,
    Hang,
    Hold,
    Pause,
    Script,
    ScriptedBackend,
    ScriptedTurn,
    recorded,
    says,
)
from gateway.translation.agent_events import Batch, Failure, Stop, TextDelta, Usage
from gateway.translation.agent_turn import Text
from tests.letta import recorded as recordings
from tests.letta.batches import batches, next_batch
from tests.said import said_to

FRIEND = Agent("agent-1", "friend", 0)
SAID = said_to("agent-1", Text("Hello?"))
HI: Batch = [TextDelta("Hi")]
END: Batch = [Stop("end_turn")]


def turn_of(*steps: object, opening: tuple[object, ...] = (), settling: tuple[object, ...] = ()) -> ScriptedTurn:
    return ScriptedTurn(SAID, Script(steps, opening, settling))  # type: ignore[arg-type]


async def heard(turn: RunningTurn) -> list[Batch]:
    return [batch async for batch in batches(turn)]


async def soon(turn: ScriptedTurn, error: GatewayError) -> None:
    await asyncio.sleep(0.01)
    turn.abort(error)


def test_it_is_a_backend() -> None:
    backend: AgentBackend = ScriptedBackend()
    turn = backend.turn(SAID)
    assert turn.ended


# Turns ---------------------------------------------------------------------------------------------------------------


async def test_usual_turn() -> None:
    backend = ScriptedBackend([FRIEND])
    turn = backend.turn(SAID)
    await turn.open()
    ended_before = turn.ended
    assert await heard(turn) == list(USUAL.steps)
    turn.close()
    assert (ended_before, turn.ended) == (False, True)
    assert backend.turns == [turn]
    assert (turn.sent, turn.opened, turn.taken, turn.closed, turn.heard) == (SAID, 1, True, True, 5)
    assert not turn.cancelled
    assert not turn.drained


async def test_scripts_are_played_in_order_and_then_the_usual_one() -> None:
    backend = ScriptedBackend(usual=says("usual"))
    backend.play(says("one"), says("two"))
    assert [(await heard(backend.turn(SAID)))[0] for _ in range(3)] == [
        [TextDelta("one")],
        [TextDelta("two")],
        [TextDelta("usual")],
    ]


def test_says() -> None:
    assert says("a", "b", stop="max_steps", usage=Usage(1, 2)).steps == (
        [TextDelta("a")],
        [TextDelta("b")],
        [Stop("max_steps"), Usage(1, 2)],
    )


async def test_recorded_stream() -> None:
    turn = ScriptedTurn(SAID, recorded(recordings.stream("stream-text")))
    await turn.open()
    assert await heard(turn) == [
        *([TextDelta(text)] for text in ("You", " said:", " Hello", " there")),
        [Stop("end_turn")],
        [Usage(100, 20)],
    ]
    (failure,) = recorded(recordings.stream("stream-error-unknown-tool-return")).steps
    assert isinstance(failure, list)
    assert isinstance(failure[0], Failure)


async def test_stream_goes_on_from_where_it_stands() -> None:
    turn = turn_of(HI, HI, END)
    assert await next_batch(turn) == HI
    assert await heard(turn) == [HI, END]


async def test_stream_that_is_cut_off_and_one_that_breaks() -> None:
    cut = turn_of(HI)
    await cut.open()
    assert await heard(cut) == [HI]
    assert not cut.ended
    broken = turn_of(HI, Break(UpstreamTruncated()), HI)
    with pytest.raises(UpstreamTruncated):
        await heard(broken)
    assert broken.heard == 1


async def test_refused_turn_may_be_opened_again() -> None:
    turn = turn_of(END, opening=(Break(ConversationBusy()), Pause(0), Break(ConversationBusy())))
    for opened in (1, 2):
        with pytest.raises(ConversationBusy):
            await turn.open()
        assert (turn.opened, turn.taken, turn.ended) == (opened, False, True)
    await turn.open()
    assert (turn.opened, turn.taken, turn.ended) == (3, True, False)


async def test_opening_that_is_left_may_have_been_delivered() -> None:
    turn = turn_of(END, opening=(Hang(),))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await turn.open()
    assert (turn.taken, turn.ended) == (False, False)


@pytest.mark.parametrize("wait", [Pause(5), Hang(), Hold(asyncio.Event())])
async def test_abort_while_nothing_happens(wait: Pause | Hang | Hold) -> None:
    error = ShuttingDown()
    turn = turn_of(HI, wait, END)
    with pytest.raises(ShuttingDown) as raised:
        await asyncio.gather(heard(turn), soon(turn, error))
    assert raised.value is error
    assert turn.aborted is error
    assert turn.heard == 1


async def test_abort_while_it_is_opened() -> None:
    turn = turn_of(END, opening=(Hang(),))
    with pytest.raises(ShuttingDown):
        await asyncio.gather(turn.open(), soon(turn, ShuttingDown()))
    assert turn.ended


async def test_abort_before_anything_and_twice() -> None:
    turn = turn_of(HI)
    first = UpstreamUnavailable()
    turn.abort(first)
    turn.abort(ShuttingDown())
    with pytest.raises(UpstreamUnavailable):
        await turn.open()
    with pytest.raises(UpstreamUnavailable):
        await heard(turn)
    assert turn.aborted is first


@pytest.mark.parametrize("ahead", [[HI], []])
async def test_abort_between_batches_and_after_the_last(ahead: list[Batch]) -> None:
    turn = turn_of(HI, *ahead)
    assert await next_batch(turn) == HI
    turn.abort(ShuttingDown())
    with pytest.raises(ShuttingDown):
        await next_batch(turn)
    assert turn.heard == 1


async def test_cancel_plays_the_settling_whatever_was_aborted() -> None:
    gate = asyncio.Event()
    turn = turn_of(HI, Hang(), settling=(Hold(gate),))
    await turn.open()
    turn.abort(ShuttingDown())
    cancelling = asyncio.gather(turn.cancel())
    await asyncio.sleep(0)
    assert turn.cancelled
    assert not turn.ended
    gate.set()
    await cancelling
    assert turn.ended


async def test_cancel_that_fails() -> None:
    turn = turn_of(HI, settling=(Break(UpstreamUnavailable()),))
    await turn.open()
    with pytest.raises(UpstreamUnavailable):
        await turn.cancel()
    assert not turn.ended
    await turn.cancel()
    assert turn.ended


async def test_drain_takes_what_is_left() -> None:
    turn = turn_of(HI, Pause(0), HI, END, opening=(Pause(0), Pause(5)))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await turn.open()
    turn._opening.clear()
    await turn.drain()
    assert (turn.drained, turn.heard, turn.ended) == (True, 3, True)


# The rest of the backend ---------------------------------------------------------------------------------------------


async def test_agents_are_listed_and_found() -> None:
    backend = ScriptedBackend([FRIEND])
    assert await backend.agents() == [FRIEND]
    assert await backend.find_agents("friend") == await backend.find_agents("agent-1") == [FRIEND]
    assert await backend.find_agents("Friend") == []
    assert (backend.listings, backend.searches) == (1, ["friend", "agent-1", "Friend"])


async def test_backend_that_is_down() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.down = UpstreamUnavailable()
    for question in (backend.agents(), backend.find_agents("friend"), backend.ping()):
        with pytest.raises(UpstreamUnavailable):
            await question
    backend.down = None
    await backend.ping()
    assert backend.pings == 2


async def test_backend_that_keeps_one_waiting() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.holding = Hang()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await backend.agents()
    backend.holding = Pause(0)
    assert await backend.agents() == [FRIEND]


async def test_closing_is_noted() -> None:
    backend = ScriptedBackend()
    await backend.close()
    assert backend.closed


# What turns took -----------------------------------------------------------------------------------------------------


async def test_usage_is_what_was_heard() -> None:
    turn = turn_of(HI, [Usage(3, 1)], [Usage(4, 2), Stop("end_turn")])
    assert await turn.usage() is None
    await turn.open()
    await heard(turn)
    assert await turn.usage() == Usage(7, 3)


async def test_usage_of_a_turn_that_was_not_heard_to_its_end() -> None:
    script = Script(steps=(HI, [Usage(3, 1)], END), counted=Usage(9, 9))
    turn = ScriptedTurn(SAID, script)
    await turn.open()
    await next_batch(turn)
    assert await turn.usage() == Usage(9, 9)
    await heard(turn)
    assert await turn.usage() == Usage(3, 1)
    silent = ScriptedTurn(SAID, Script(steps=(HI,), counted=Break(UpstreamUnavailable())))
    with pytest.raises(UpstreamUnavailable):
        await silent.usage()


async def test_turns_of_others_are_reconciled() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.play(says("Hi", usage=Usage(3, 1)))
    turn = backend.turn(msgspec.structs.replace(SAID, mark="mark-1"))
    await turn.open()
    await heard(turn)
    backend.spendings["mark-2"] = Usage(5, 5)
    sent = [SentTurn(f"mark-{number}", "agent-1", None, 0.0) for number in (1, 2, 3)]
    assert [await backend.spent(one) for one in sent] == [Usage(3, 1), Usage(5, 5), None]
    assert backend.reconciled == sent


# Agents that are made ------------------------------------------------------------------------------------------------


async def test_agent_that_is_made_remembers_and_is_deleted() -> None:
    backend = ScriptedBackend([FRIEND])
    blocks = (MemoryBlock("persona", "Bo."), MemoryBlock("human", "Ann.", limit=5))
    spec = AgentSpec(name="Bo", blocks=blocks, tags=("a",))
    made = await backend.create_agent(spec)
    assert await backend.find_tagged("a") == [made]
    assert backend.specs[made.id] == spec
    assert await backend.write_memory(made.id, "human", "Cleo.") == MemoryBlock("human", "Cleo.", limit=5)
    assert [block.label for block in await backend.memory(made.id)] == ["human", "persona"]
    with pytest.raises(MemoryNotFound):
        await backend.write_memory(made.id, "nothing", "x")
    with pytest.raises(InvalidRequest):
        await backend.write_memory(made.id, "human", "Cleopatra")
    assert await backend.memory(FRIEND.id) == ()
    await backend.delete_agent(made.id)
    with pytest.raises(AgentGone):
        await backend.memory(made.id)
    assert (backend.gone, backend.listed) == ([made.id], [FRIEND])
