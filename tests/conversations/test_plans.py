import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway.conversations.directory import Directory, Pinned
from gateway.conversations.divergence import digest, digests
from gateway.conversations.plans import OWN_THREAD, Continued, Desk, OwnThread, PinnedChat, Plan, Request, Throwaway
from gateway.conversations.tool_calls import WaitingCall, WaitingCalls
from gateway.errors import StorageUnavailable, ThreadLost, UpstreamUnavailable
from gateway.shared_state.locks import Lease
from gateway.shared_state.places import Alone
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Stop, TextDelta, ToolCallDelta
from gateway.translation.agent_turn import AgentTurn, Instructed, Said, ToolResult
from tests.conversations.chatting import TOOL, Letta, agent, called, payer_of, user
from tests.storage.databases import opened

WAITING = WaitingCall(
    call_id="call_1",
    owner="anna",
    agent_id="agent-1",
    conversation_id="conv-7",
    chat=None,
    is_ephemeral=True,
    name="f",
    asked_at=0.0,
)
AFTER = Pinned("conv-after", (), None, is_settled=True)


@pytest.fixture
async def store(sqlite_file: SqliteFile) -> AsyncIterator[Database]:
    async with opened(sqlite_file) as database:
        yield database


@pytest.fixture
async def desk(store: Database) -> AsyncIterator[Desk]:
    made = Desk(
        backend=Letta(),
        directory=Directory(store),
        calls=WaitingCalls(store),
        system_prompts="overlay",
        tasks=TaskSet(),
        places=Alone(),
        parked=900.0,
    )
    yield made
    await done(made)


async def done(desk: Desk) -> None:
    async with asyncio.timeout(5):
        while len(desk.tasks):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


def letta(desk: Desk) -> Letta:
    assert isinstance(desk.backend, Letta)
    return desk.backend


def request(*transcript: Said, owner: str = "anna", **fields: Any) -> Request:
    usual: dict[str, Any] = {
        "payer": payer_of(owner),
        "client": "client",
        "agent_id": "agent-1",
        "instructions": "",
        "wish": None,
        "tools": (),
    }
    return Request(transcript=transcript or (user("a"),), **{**usual, **fields})


def own(desk: Desk, asked: Request) -> Plan:
    return OwnThread(desk, asked)


def pinned(desk: Desk, asked: Request) -> Plan:
    return PinnedChat(desk, asked, "c-1")


def throwaway(desk: Desk, asked: Request) -> Plan:
    return Throwaway(desk, asked)


def continued(desk: Desk, asked: Request) -> Plan:
    return Continued(desk, asked, WAITING)


Make = Callable[[Desk, Request], Plan]
EVERY = [own, pinned, throwaway, continued]


async def whole(plan: Plan, *events: Any) -> AgentTurn:
    """Take a plan's turn, in which the agent says this."""
    turn = await plan.begin(Lease(plan.thread))
    plan.heard.receive([*events])
    await plan.end(is_delivered=True)
    return turn


# What every plan does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
async def test_plan_tells_what_is_said(desk: Desk, make: Make) -> None:
    wish = Instructed("Answer in JSON.")
    result = ToolResult("call_1", "1")
    plan = make(desk, request(user("a"), called("call_1"), result, user("b"), wish=wish, tools=(TOOL,)))
    turn = await whole(plan, Stop("end_turn"))
    assert (turn.agent_id, turn.news, turn.returns, turn.tools) == ("agent-1", (user("b"),), (result,), (TOOL,))
    assert turn.conversation_id == plan.conversation_id


@pytest.mark.parametrize("make", EVERY)
async def test_wish_goes_with_a_question_and_not_with_results(desk: Desk, make: Make) -> None:
    """Behind results it would be a message of its own, which the agent answers in their place."""
    wish = Instructed("Answer in JSON.")
    asked = await whole(make(desk, request(user("a"), wish=wish)), Stop("end_turn"))
    assert asked.news == (user("a"), wish)
    told = request(user("a"), called("call_1"), ToolResult("call_1", "1"), wish=wish)
    assert (await whole(make(desk, told), Stop("end_turn"))).news == ()


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("is_delivered", [True, False])
async def test_plan_that_was_never_begun_ends(desk: Desk, make: Make, is_delivered: Any) -> None:
    plan = make(desk, request())
    await plan.end(is_delivered=is_delivered and make is not pinned)
    await done(desk)
    assert await desk.directory.find("anna", "agent-1", "c-1") is None
    assert letta(desk).conversations == {}


@pytest.mark.parametrize("make", EVERY)
async def test_calls_that_wait_are_written_down(desk: Desk, make: Make) -> None:
    plan = make(desk, request(tools=(TOOL,)))
    before = time.time()
    await whole(
        plan,
        ToolCallDelta("call_1", "f", "{}"),
        ToolCallDelta("call_2", "g", ""),
        ToolCallDelta("call_2", None, "{}"),
        Stop("requires_approval"),
    )
    first, second = sorted(await desk.calls.find(["call_1", "call_2"]), key=lambda call: call.call_id)
    assert (first.call_id, first.name, second.call_id, second.name) == ("call_1", "f", "call_2", "g")
    for call in (first, second):
        assert (call.owner, call.agent_id, call.conversation_id) == ("anna", "agent-1", plan.conversation_id)
        assert (call.chat, call.is_ephemeral) == ("c-1" if make is pinned else None, make in (throwaway, continued))
        assert before <= call.asked_at <= time.time()


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("events", [[Stop("end_turn")], []])
async def test_calls_that_do_not_wait_are_not_written_down(desk: Desk, make: Make, events: Any) -> None:
    await whole(make(desk, request(tools=(TOOL,))), ToolCallDelta("call_1", "f", "{}"), *events)
    assert await desk.calls.find(["call_1"]) == []


@pytest.mark.parametrize("make", EVERY)
async def test_results_settle_the_calls_of_their_conversation_alone(desk: Desk, make: Make) -> None:
    plan = make(desk, request(user("a"), called("call_1"), ToolResult("call_1", "1")))
    await plan.begin(Lease(plan.thread))
    elsewhere = WaitingCall(
        call_id="call_9",
        owner="anna",
        agent_id="agent-1",
        conversation_id="conv-99",
        chat=None,
        is_ephemeral=True,
        name="f",
        asked_at=0.0,
    )
    here = WaitingCall(
        call_id="call_1",
        owner="anna",
        agent_id="agent-1",
        conversation_id=plan.conversation_id,
        chat=None,
        is_ephemeral=False,
        name="f",
        asked_at=0.0,
    )
    await desk.calls.record([elsewhere, here])
    plan.heard.receive([Stop("end_turn")])
    await plan.end(is_delivered=True)
    assert await desk.calls.find(["call_1", "call_9"]) == [elsewhere]


# Each kind -----------------------------------------------------------------------------------------------------------


async def test_threads_on_which_plans_take_turns(desk: Desk) -> None:
    def threads(**fields: Any) -> list[str]:
        return [make(desk, request(**fields)).thread for make in EVERY]

    one, again = threads(), threads()
    assert one[0] == "agent-1"
    assert [left == right for left, right in zip(one, again, strict=True)] == [True, True, False, True]
    assert len({*one, *again}) == 5
    assert threads(owner="ben")[1] != one[1] != threads(agent_id="agent-2")[1]
    assert PinnedChat(desk, request(), "c-2").thread != one[1]


@pytest.mark.parametrize(
    ("make", "fields", "is_quiet", "listens"),
    [
        (own, {}, True, False),
        (own, {"tools": (TOOL,)}, False, True),
        (pinned, {}, False, True),
        (throwaway, {}, False, True),
        (continued, {}, False, True),
    ],
)
async def test_plans_that_have_something_to_write_down(
    desk: Desk, make: Make, fields: Any, is_quiet: Any, listens: Any
) -> None:
    plan = make(desk, request(**fields))
    assert (plan.is_quiet, plan.listens) == (is_quiet, listens)


async def test_plan_of_the_own_thread_is_not_quiet_once_it_has_something_to_write_down(desk: Desk) -> None:
    plan = OwnThread(desk, request(user("a"), called("call_1"), ToolResult("call_1", "1")))
    await plan.begin(Lease(plan.thread))
    assert not plan.is_quiet
    await plan.end(is_delivered=True)


async def test_instructions_of_the_own_thread_hold_for_the_turn_alone(desk: Desk) -> None:
    turn = await whole(OwnThread(desk, request(instructions="Be kind")), Stop("end_turn"))
    assert (turn.news, turn.overlay) == ((user("a"),), "Be kind")
    turn = await whole(OwnThread(desk, request()), Stop("end_turn"))
    assert (turn.news, turn.overlay) == ((user("a"),), "")
    assert await desk.directory.find("anna", "agent-1", OWN_THREAD) is None


async def test_own_threads_instructions_are_no_chats(desk: Desk) -> None:
    told = Desk(
        backend=desk.backend,
        directory=desk.directory,
        calls=desk.calls,
        system_prompts="message",
        tasks=desk.tasks,
        places=desk.places,
        parked=desk.parked,
    )
    turn = await whole(OwnThread(told, request(instructions="Be kind")), Stop("end_turn"))
    assert turn.news == (Instructed("Be kind"), user("a"))
    assert await desk.directory.find("anna", "agent-1", OWN_THREAD) is not None
    assert OWN_THREAD == ""  # which no chat is called


async def test_pin_is_not_settled_until_the_answer_is_known(desk: Desk) -> None:
    plan = PinnedChat(desk, request(), "c-1")
    await plan.begin(Lease(plan.thread))
    known = await desk.directory.find("anna", "agent-1", "c-1")
    assert known is not None
    assert (known.conversation_id, known.seen, known.is_settled) == ("conv-1", (), False)
    plan.heard.receive([TextDelta("A"), Stop("end_turn")])
    await plan.end(is_delivered=True)
    known = await desk.directory.find("anna", "agent-1", "c-1")
    assert known is not None
    assert (known.conversation_id, known.is_settled) == ("conv-1", True)
    assert known.seen == (*digests([user("a")]), digest(agent("A")))


async def test_gateway_that_lost_the_chat_as_it_began_leaves_what_came_after(desk: Desk) -> None:
    async def meanwhile(agent_id: str) -> str:
        await desk.directory.pin("anna", agent_id, "c-1", AFTER, 2)
        return "conv-late"

    plan = PinnedChat(desk, request(), "c-1")
    letta(desk).new_conversation = meanwhile  # type: ignore[method-assign]
    with pytest.raises(ThreadLost):
        await plan.begin(Lease(plan.thread, fence=1))
    await plan.end(is_delivered=False)
    assert await desk.directory.find("anna", "agent-1", "c-1") == AFTER
    await done(desk)
    assert letta(desk).deleted == ["conv-late"]


async def test_gateway_that_lost_the_chat_and_finds_its_conversation_gone_leaves_what_came_after(desk: Desk) -> None:
    plan = PinnedChat(desk, request(), "c-1")
    await plan.begin(Lease(plan.thread, fence=1))
    await desk.directory.pin("anna", "agent-1", "c-1", AFTER, 2)
    await plan.forget()
    assert await desk.directory.find("anna", "agent-1", "c-1") == AFTER


async def test_database_that_fails_in_the_begin(desk: Desk, store: Database) -> None:
    await store.close()
    plan = PinnedChat(desk, request(), "c-1")
    with pytest.raises(StorageUnavailable):
        await plan.begin(Lease(plan.thread))
    await plan.end(is_delivered=False)


async def test_news_alone_go_on_in_the_conversation_that_holds_the_rest(desk: Desk) -> None:
    first = PinnedChat(desk, request(user("a"), is_news=True), "c-1")
    turn = await whole(first, TextDelta("A"), Stop("end_turn"))
    assert (turn.conversation_id, turn.history, turn.news) == ("conv-1", (), (user("a"),))
    turn = await whole(PinnedChat(desk, request(user("b"), is_news=True), "c-1"), TextDelta("B"), Stop("end_turn"))
    assert (turn.conversation_id, turn.history, turn.news) == ("conv-1", (), (user("b"),))
    whole_chat = request(user("a"), agent("A"), user("b"), agent("B"), user("c"))
    turn = await whole(PinnedChat(desk, whole_chat, "c-1"), Stop("end_turn"))
    assert (turn.conversation_id, turn.history, turn.news) == ("conv-1", (), (user("c"),))


async def test_same_news_twice_are_said_twice(desk: Desk) -> None:
    for _ in range(3):
        turn = await whole(
            PinnedChat(desk, request(user("hi"), is_news=True), "c-1"), TextDelta("Hi"), Stop("end_turn")
        )
        assert (turn.conversation_id, turn.history, turn.news) == ("conv-1", (), (user("hi"),))


async def test_throwaway_conversation_goes_where_its_calls_cannot_be_written_down(desk: Desk, store: Database) -> None:
    plan = Throwaway(desk, request(tools=(TOOL,)))
    await plan.begin(Lease(plan.thread))
    plan.heard.receive([ToolCallDelta("call_1", "f", "{}"), Stop("requires_approval")])
    await store.close()
    with pytest.raises(StorageUnavailable):
        await plan.end(is_delivered=True)
    await done(desk)
    assert letta(desk).deleted == ["conv-1"]


@pytest.mark.parametrize("is_ephemeral", [True, False])
@pytest.mark.parametrize(
    ("events", "is_delivered", "is_over"),
    [
        ([Stop("end_turn")], True, True),
        ([], True, True),
        ([ToolCallDelta("call_2", "f", "{}"), Stop("requires_approval")], True, False),
        ([], False, False),
    ],
)
async def test_conversation_of_calls_goes_when_they_are_done(
    desk: Desk, events: Any, is_delivered: Any, is_over: Any, is_ephemeral: Any
) -> None:
    waiting = WaitingCall(
        **{name: getattr(WAITING, name) for name in WAITING.__struct_fields__} | {"is_ephemeral": is_ephemeral}
    )
    plan = Continued(desk, request(called("call_1"), ToolResult("call_1", "1")), waiting)
    await plan.begin(Lease(plan.thread))
    plan.heard.receive(events)
    await plan.end(is_delivered=is_delivered)
    await done(desk)
    assert letta(desk).deleted == (["conv-7"] if is_over and is_ephemeral else [])


async def test_conversation_that_cannot_be_deleted_is_left(desk: Desk) -> None:
    plan = Throwaway(desk, request())
    await plan.begin(Lease(plan.thread))
    letta(desk).down = UpstreamUnavailable()
    await plan.end(is_delivered=True)
    await done(desk)
    assert letta(desk).deleted == []
