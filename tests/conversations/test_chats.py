import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from gateway.conversations.chats import Asker, ChatPolicy
from gateway.conversations.metering import Payer
from gateway.conversations.turns import TurnPolicy
from gateway.errors import (
    InvalidStructuredOutput,
    SharedStateUnavailable,
    StorageUnavailable,
    ToolCallNotFound,
    UpstreamRejected,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta.backend import Capabilities
from gateway.letta.scripted import Break, Hang, Hold, Script, says
from gateway.shared_state.places import Alone
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.translation.agent_events import (
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    Call,
    ClientTool,
    Instructed,
    Said,
    Text,
    ToolResult,
    UserSaid,
)
from gateway.translation.ask import GO_ON, Ask, Named, OutputSchema
from gateway.translation.tools import NO_PARAMETERS
from tests.conversations.chatting import (
    TOOL,
    Gateway,
    agent,
    answers,
    called,
    calls,
    gateway_on,
    instructed,
    later,
    leave,
    user,
)
from tests.storage.databases import opened

NOT_DELIVERED = Break(UpstreamUnavailable(should_retry=True))
LEAVES_OFF = Script(steps=([TextDelta("Hel")], Hang()))


@pytest.fixture
async def store(sqlite_file: SqliteFile) -> AsyncIterator[Database]:
    async with opened(sqlite_file) as database:
        yield database


@pytest.fixture
async def gateway(store: Database) -> AsyncIterator[Gateway]:
    async with gateway_on(store) as made:
        yield made


@pytest.fixture
async def stateless(store: Database) -> AsyncIterator[Gateway]:
    async with gateway_on(store, conversation="stateless") as made:
        yield made


def turn(**fields: Any) -> AgentTurn:
    return AgentTurn(agent_id="agent-1", **fields)


# The agent's own thread ----------------------------------------------------------------------------------------------


async def test_newest_message_goes_to_the_agents_own_thread(gateway: Gateway) -> None:
    gateway.letta.play(answers("Hello"))
    events = await gateway.ask(user("a"), agent("A"), user("b"), user("c"))
    assert gateway.sent == turn(news=(user("c"),))
    assert events == [TextDelta("Hello"), Stop("end_turn"), Usage(1, 1)]
    assert gateway.letta.conversations == {}


async def test_same_message_again_is_the_same_message_again(gateway: Gateway) -> None:
    for _ in range(2):
        await gateway.ask(user("a"), agent("A"), user("b"))
        assert gateway.sent == turn(news=(user("b"),))


async def test_tool_loop_on_the_agents_own_thread(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1", "call_2"))
    events = await gateway.ask(user("a"), tools=(TOOL,))
    assert gateway.sent == turn(news=(user("a"),), tools=(TOOL,))
    assert events[:2] == [ToolCallDelta("call_1", "f", "{}"), ToolCallDelta("call_2", "f", "{}")]
    waiting = await gateway.waiting("call_1", "call_2")
    assert [(call.call_id, call.owner, call.agent_id, call.name) for call in waiting] == [
        ("call_1", "anna", "agent-1", "f"),
        ("call_2", "anna", "agent-1", "f"),
    ]
    assert {(call.conversation_id, call.chat, call.is_ephemeral) for call in waiting} == {(None, None, False)}

    returns = (ToolResult("call_1", "1"), ToolResult("call_2", "2"))
    await gateway.ask(user("a"), called("call_1", "call_2"), *returns, user("environment"), tools=(TOOL,))
    assert gateway.sent == turn(news=(user("environment"),), returns=returns, tools=(TOOL,))
    assert await gateway.waiting("call_1", "call_2") == []


async def test_results_after_a_restart(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"))
    await gateway.ask(user("a"), tools=(TOOL,))
    again = gateway.restarted()
    await again.ask(user("a"), called("call_1"), ToolResult("call_1", "1"))
    assert again.sent == turn(returns=(ToolResult("call_1", "1"),))
    assert await again.waiting("call_1") == []


async def test_some_results_answer_all_calls(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1", "call_2"))
    await gateway.ask(user("a"), tools=(TOOL,))
    await gateway.ask(user("a"), called("call_1", "call_2"), ToolResult("call_2", "2"), tools=(TOOL,))
    assert gateway.sent.returns == (ToolResult("call_2", "2"),)
    assert await gateway.waiting("call_1", "call_2") == []


async def test_call_that_the_user_abandons(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"), calls("call_2"))
    await gateway.ask(user("a"), tools=(TOOL,))
    await gateway.ask(user("a"), called("call_1"), user("b"), tools=(TOOL,))
    assert gateway.sent == turn(news=(user("b"),), tools=(TOOL,))
    assert [call.call_id for call in await gateway.waiting("call_1", "call_2")] == ["call_2"]


async def test_results_that_nothing_waits_for_go_where_messages_go(gateway: Gateway) -> None:
    await gateway.ask(user("a"), called("call_9"), ToolResult("call_9", "1"))
    assert gateway.sent == turn(returns=(ToolResult("call_9", "1"),))


# Results for others' calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"owner": "ben"}, {"agent_id": "agent-2"}])
@pytest.mark.parametrize("fields", [{}, {"chat": "c-1"}, {"is_background": True}])
@pytest.mark.parametrize("conversation", ["agent", "stateless"])
async def test_result_for_a_call_of_somebody_elses(
    store: Database, other: dict[str, Any], fields: dict[str, Any], conversation: str
) -> None:
    async with gateway_on(store, conversation=conversation) as gateway:
        gateway.letta.play(calls("call_1"))
        await gateway.ask(user("a"), tools=(TOOL,))
        with pytest.raises(ToolCallNotFound) as raised:
            await gateway.ask(user("a"), called("call_1"), ToolResult("call_1", "1"), **other, **fields)
        assert (raised.value.status, raised.value.code) == (404, "tool_call_not_found")
        assert len(gateway.letta.turns) == 1
        assert len(await gateway.waiting("call_1")) == 1


async def test_result_for_ones_own_call_hides_none_for_another(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"), calls("call_2"))
    await gateway.ask(user("a"), tools=(TOOL,), owner="anna")
    await gateway.ask(user("b"), tools=(TOOL,), owner="ben")
    with pytest.raises(ToolCallNotFound):
        await gateway.ask(user("b"), ToolResult("call_2", "2"), ToolResult("call_1", "1"), owner="ben")
    assert len(gateway.letta.turns) == 2


async def test_two_people_with_calls_of_one_id(gateway: Gateway) -> None:
    """Some models count their calls from zero."""
    gateway.letta.play(calls("call_0"), calls("call_0"))
    for owner, chat in (("anna", "c-1"), ("ben", "c-2")):
        await gateway.ask(user("a"), tools=(TOOL,), owner=owner, chat=chat)
    for owner, conversation in (("anna", "conv-1"), ("ben", "conv-2")):
        await gateway.ask(user("a"), called("call_0"), ToolResult("call_0", "1"), owner=owner)
        assert gateway.sent.conversation_id == conversation


async def test_older_results_are_nobodys_business(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"))
    await gateway.ask(user("a"), tools=(TOOL,))
    await gateway.ask(user("a"), called("call_1"), ToolResult("call_1", "1"), agent("A"), user("b"), owner="ben")
    assert gateway.sent == turn(news=(user("b"),))


# Chats with an identity ----------------------------------------------------------------------------------------------


async def test_chat_goes_on_in_its_conversation(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), answers("B"))
    await gateway.ask(user("a"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("a"),))
    await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))
    await gateway.ask(user("a"), agent(" <think>Hm</think>A\n"), user("b"), agent("B"), user("c"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("c"),))
    assert gateway.letta.conversations == {"conv-1": "agent-1"}


async def test_chat_goes_on_after_a_restart(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"))
    await gateway.ask(user("a"), chat="c-1")
    again = gateway.restarted()
    await again.ask(user("a"), agent("A"), user("b"), chat="c-1")
    assert again.sent == turn(conversation_id="conv-1", news=(user("b"),))


@pytest.mark.parametrize("other", [{"owner": "ben"}, {"agent_id": "agent-2"}, {"chat": "c-2"}])
async def test_chat_is_its_owners_its_agents_and_its_own(gateway: Gateway, other: dict[str, Any]) -> None:
    gateway.letta.play(answers("A"))
    await gateway.ask(user("a"), chat="c-1")
    await gateway.ask(user("a"), agent("A"), user("b"), **{"chat": "c-1", **other})
    assert (gateway.sent.conversation_id, gateway.sent.history) == ("conv-2", (user("a"), agent("A")))


EDITS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    "last message edited": ([user("a"), agent("A"), user("x")], [user("a"), agent("A")], [user("x")]),
    "first message edited": ([user("x")], [], [user("x")]),
    "answer asked for again": ([user("a"), agent("A"), user("b")], [user("a"), agent("A")], [user("b")]),
    "first answer asked for again": ([user("a")], [], [user("a")]),
    "answer edited": (
        [user("a"), agent("A"), user("b"), agent("X"), user("c")],
        [user("a"), agent("A"), user("b"), agent("X")],
        [user("c")],
    ),
}


@pytest.mark.parametrize(("sent", "history", "news"), EDITS.values(), ids=EDITS.keys())
async def test_chat_that_departs_gets_another_conversation(
    gateway: Gateway, sent: list[Any], history: list[Any], news: list[Any]
) -> None:
    gateway.letta.play(answers("A"), answers("B"), answers("X"))
    await gateway.ask(user("a"), chat="c-1")
    await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
    await gateway.ask(*sent, chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-2", history=tuple(history), news=tuple(news))
    await gateway.ask(*sent, agent("X"), user("y"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-2", news=(user("y"),))


ASKED_ASIDE = [user("Gib diesem Gespräch einen Titel:\nUSER: a"), user("Nenne Schlagworte:\nUSER: a")]
"""What a front end asks for itself in words that nobody knows."""


async def test_request_that_shares_nothing_with_its_chat_leaves_it_where_it_was(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), answers("Titel"), answers("Tags"), answers("B"), answers("Titel 2"))
    await gateway.ask(user("a"), chat="c-1")
    for said, conversation_id in zip(ASKED_ASIDE, ("conv-2", "conv-3"), strict=True):
        await gateway.ask(said, chat="c-1")
        assert gateway.sent == turn(conversation_id=conversation_id, news=(said,))
    await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))
    again = gateway.restarted()
    await again.ask(ASKED_ASIDE[0], chat="c-1")
    await again.ask(user("a"), agent("A"), user("b"), agent("B"), user("c"), chat="c-1")
    assert again.sent == turn(conversation_id="conv-1", news=(user("c"),))


async def test_request_that_shares_nothing_comes_before_its_chat(gateway: Gateway) -> None:
    """Open WebUI may ask for the title while the first message is answered."""
    gateway.letta.play(answers("Titel"), answers("A"), answers("Tags"), answers("B"))
    for said in (ASKED_ASIDE[0], user("a"), ASKED_ASIDE[1]):
        await gateway.ask(said, chat="c-1")
    for last in (user("b"), user("x")):
        await gateway.ask(user("a"), agent("A"), last, chat="c-1")
    assert [asked.sent.conversation_id for asked in gateway.letta.turns[-2:]] == ["conv-2", "conv-4"]
    assert gateway.sent.history == (user("a"), agent("A"))


async def test_both_branches_of_an_edited_first_message_go_on(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), answers("T"), answers("X"), answers("T"), answers("B"), answers("Y"))
    thanks = user("Thanks")
    for first, answer in (("a", "A"), ("x", "X")):
        await gateway.ask(user(first), chat="c-1")
        await gateway.ask(user(first), agent(answer), thanks, chat="c-1")
    await gateway.ask(user("a"), agent("A"), thanks, agent("T"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))
    await gateway.ask(user("x"), agent("X"), thanks, agent("T"), user("y"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-2", news=(user("y"),))


async def test_tool_loop_beside_a_chat(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), calls("call_1"), answers("B"))
    await gateway.ask(user("a"), chat="c-1")
    await gateway.ask(user("x"), chat="c-1", tools=(TOOL,))
    await gateway.ask(user("x"), called("call_1"), ToolResult("call_1", "1"), chat="c-1", tools=(TOOL,))
    assert (gateway.sent.conversation_id, gateway.sent.history) == ("conv-2", ())
    assert gateway.sent.returns == (ToolResult("call_1", "1"),)


async def test_answer_that_is_continued_is_one_message_with_what_comes_of_it(gateway: Gateway) -> None:
    gateway.letta.play(answers("Once upon"), answers(" a time"), answers("B"))
    await gateway.ask(user("a"), chat="c-1")
    await gateway.ask(user("a"), agent("Once upon"), GO_ON, chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(GO_ON,))
    await gateway.ask(user("a"), agent("Once upon a time"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))


async def test_chat_that_began_elsewhere(gateway: Gateway) -> None:
    await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", history=(user("a"), agent("A")), news=(user("b"),))


async def test_chat_that_lost_its_beginning_goes_on(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), answers("B"), answers("C"))
    chat: list[Said] = [user("a"), agent("A"), user("b"), agent("B"), user("c")]
    for length in (1, 3):
        await gateway.ask(*chat[:length], chat="c-1")
    await gateway.ask(*chat[2:], chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("c"),))
    await gateway.ask(*chat[2:], agent("C"), user("d"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("d"),))


async def test_tool_loop_of_a_chat(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"), answers("A"))
    await gateway.ask(user("a"), chat="c-1", tools=(TOOL,))
    (waiting,) = await gateway.waiting("call_1")
    assert (waiting.conversation_id, waiting.chat, waiting.is_ephemeral) == ("conv-1", "c-1", False)
    said: list[Said] = [user("a"), called("call_1"), ToolResult("call_1", "1")]
    again = gateway.restarted()
    await again.ask(*said, chat="c-1", tools=(TOOL,))
    assert again.sent == turn(conversation_id="conv-1", returns=(ToolResult("call_1", "1"),), tools=(TOOL,))
    assert await again.waiting("call_1") == []
    await again.ask(*said, agent("A"), user("b"), chat="c-1")
    assert again.sent == turn(conversation_id="conv-1", news=(user("b"),))


async def test_results_of_a_chat_whose_name_was_left_out(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"), answers("A"))
    said: list[Said] = [user("a"), called("call_1"), ToolResult("call_1", "1")]
    await gateway.ask(user("a"), chat="c-1", tools=(TOOL,))
    await gateway.ask(*said)
    assert gateway.sent == turn(conversation_id="conv-1", returns=(ToolResult("call_1", "1"),))
    await gateway.ask(*said, agent("A"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))


async def test_call_that_the_user_of_a_chat_abandons(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"))
    await gateway.ask(user("a"), chat="c-1", tools=(TOOL,))
    await gateway.ask(user("a"), called("call_1"), user("b"), chat="c-1", tools=(TOOL,))
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),), tools=(TOOL,))


async def test_tool_loop_of_a_chat_that_departs_in_its_middle(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1"))
    await gateway.ask(user("a"), chat="c-1", tools=(TOOL,))
    await gateway.ask(user("x"), called("call_1"), ToolResult("call_1", "1"), chat="c-1")
    assert gateway.sent == turn(
        conversation_id="conv-2",
        history=(user("x"), called("call_1")),
        returns=(ToolResult("call_1", "1"),),
    )


async def test_turn_of_a_chat_that_was_surely_not_delivered(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), Script(opening=(NOT_DELIVERED,)), answers("B"))
    await gateway.ask(user("a"), chat="c-1")
    before = await gateway.pinned("c-1")
    for expected in (pytest.raises(UpstreamUnavailable), None):
        if expected is None:
            await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
        else:
            with expected:
                await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
            assert await gateway.pinned("c-1") == before
        assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))


async def test_first_turn_of_a_chat_that_was_surely_not_delivered_leaves_nothing(gateway: Gateway) -> None:
    gateway.letta.play(Script(opening=(NOT_DELIVERED,)))
    with pytest.raises(UpstreamUnavailable):
        await gateway.ask(user("a"), chat="c-1")
    assert (await gateway.pinned("c-1"), gateway.letta.kept) == (None, [])
    await gateway.ask(user("a"), chat="c-1")
    assert gateway.letta.kept == ["conv-2"]


async def test_departure_that_was_surely_not_delivered_leaves_the_chat_as_it_was(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), Script(opening=(NOT_DELIVERED,)))
    await gateway.ask(user("a"), chat="c-1")
    with pytest.raises(UpstreamUnavailable):
        await gateway.ask(user("x"), chat="c-1")
    assert gateway.letta.kept == ["conv-1"]
    await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))


async def test_letta_that_makes_no_conversation(gateway: Gateway) -> None:
    gateway.letta.down = UpstreamUnavailable(should_retry=True)
    with pytest.raises(UpstreamUnavailable):
        await gateway.ask(user("a"), chat="c-1")
    gateway.letta.down = None
    assert (await gateway.pinned("c-1"), gateway.letta.turns) == (None, [])


BROKEN: dict[str, Script] = {
    "refused": Script(opening=(Break(UpstreamRejected()),)),
    "broke": Script(steps=([TextDelta("Hel")], Break(UpstreamTruncated()))),
    "failed": Script(steps=([TextDelta("Hel"), Failure(UpstreamRejected())],)),
    "cut off": Script(steps=([TextDelta("Hel")],)),
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
async def test_turn_of_a_chat_that_went_wrong_is_not_trusted(gateway: Gateway, script: Script) -> None:
    gateway.letta.play(answers("A"), script)
    await gateway.ask(user("a"), chat="c-1")
    sent: list[Said] = [user("a"), agent("A"), user("b")]
    try:
        await gateway.ask(*sent, chat="c-1")
    except (UpstreamRejected, UpstreamTruncated):
        assert script in (BROKEN["refused"], BROKEN["broke"])
    again = gateway.restarted()
    await again.ask(*sent, chat="c-1")
    assert again.sent == turn(conversation_id="conv-2", history=tuple(sent[:2]), news=(user("b"),))


@pytest.mark.parametrize("on_disconnect", ["cancel", "finish"])
async def test_turn_of_a_chat_that_was_left_is_not_trusted(store: Database, on_disconnect: Any) -> None:
    async with gateway_on(store, TurnPolicy(on_disconnect=on_disconnect)) as gateway:
        gate = asyncio.Event()
        gateway.letta.play(Script(steps=([TextDelta("Hel")], Hold(gate), [Stop("end_turn")])))
        task = await gateway.start(user("a"), chat="c-1")
        pinned = await gateway.pinned("c-1")
        assert pinned is not None
        assert not pinned.is_settled
        task.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await leave(task)
        await gateway.settled()
        await gateway.ask(user("a"), agent("Hel"), user("b"), chat="c-1")
        assert gateway.sent == turn(conversation_id="conv-2", history=(user("a"), agent("Hel")), news=(user("b"),))


async def test_gateway_that_was_killed_in_a_turn(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), LEAVES_OFF)
    await gateway.ask(user("a"), chat="c-1")
    task = await gateway.start(user("a"), agent("A"), user("b"), chat="c-1")
    again = gateway.restarted()
    await again.ask(user("a"), agent("A"), user("b"), chat="c-1")
    assert again.sent.conversation_id == "conv-2"
    await leave(task)


async def test_two_messages_of_a_chat_at_once_take_turns(gateway: Gateway) -> None:
    gate = asyncio.Event()
    gateway.letta.play(Script(steps=(Hold(gate), *answers("A").steps)))
    first = await gateway.start(user("a"), chat="c-1")
    second = gateway.clients.spawn(gateway.ask(user("a"), agent("A"), user("b"), chat="c-1"), "second")
    await asyncio.sleep(0.01)
    assert len(gateway.letta.turns) == 1
    gate.set()
    await asyncio.gather(first, second)
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))


async def test_chats_of_one_agent_do_not_wait_for_each_other(gateway: Gateway) -> None:
    gate = asyncio.Event()
    gateway.letta.play(Script(steps=(Hold(gate), *answers("A").steps)))
    first = await gateway.start(user("a"), chat="c-1")
    await gateway.ask_beside(user("b"), chat="c-2")
    gate.set()
    await first


async def test_database_that_fails_at_the_end_leaves_the_chat_untrusted(
    gateway: Gateway, sqlite_file: SqliteFile
) -> None:
    gate = asyncio.Event()
    gateway.letta.play(answers("A"), Script(steps=(Hold(gate), *answers("B").steps)))
    await gateway.ask(user("a"), chat="c-1")
    task = await gateway.start(user("a"), agent("A"), user("b"), chat="c-1")
    await gateway.database.close()
    gate.set()
    assert (await task)[0] == TextDelta("B")
    async with opened(sqlite_file) as database:
        gateway.database = database
        again = gateway.restarted()
        await again.ask(user("a"), agent("A"), user("b"), agent("B"), user("c"), chat="c-1")
        assert again.sent.conversation_id == "conv-2"


class Untold(Alone):
    """Places that nobody can be told of."""

    async def take(self, name: str, seconds: float) -> None:
        raise SharedStateUnavailable

    async def leave(self, name: str) -> None:
        raise SharedStateUnavailable


async def test_place_of_a_call_that_cannot_be_told(gateway: Gateway) -> None:
    """The agent has the message: whoever sends it again says it twice. An answer without calls needs no place."""
    gateway.letta.capabilities = Capabilities(providers=False, parks=True)
    gateway.chats._desk = msgspec.structs.replace(gateway.chats._desk, places=Untold())
    gateway.letta.play(calls("call_1"), answers("A"))
    with pytest.raises(SharedStateUnavailable) as raised:
        await gateway.ask(user("a"), tools=(TOOL,), chat="c-1")
    assert raised.value.should_retry is False
    events = await gateway.ask(user("b"), tools=(TOOL,), chat="c-2")
    assert events[0] == TextDelta("A")


@pytest.mark.parametrize("said", [[user("a")], [user("a"), called("call_1"), ToolResult("call_1", "1")]])
async def test_database_that_fails_before_anything_is_said(gateway: Gateway, said: list[Said]) -> None:
    await gateway.database.close()
    with pytest.raises(StorageUnavailable) as raised:
        await gateway.ask(*said, chat="c-1")
    assert raised.value.headers() == {"Retry-After": "2", "x-should-retry": "true"}
    assert gateway.letta.turns == []


# System prompts of chats ---------------------------------------------------------------------------------------------

KIND, BRIEF = Instructed("Be kind"), Instructed("Be brief")


async def test_instructions_of_a_chat_are_told_once_and_again_after_a_change(gateway: Gateway) -> None:
    gateway.letta.play(answers("A"), answers("B"), answers("C"), answers("D"))
    await gateway.ask(KIND, user("a"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(KIND, user("a")))
    await gateway.ask(KIND, user("a"), agent("A"), user("b"), chat="c-1")
    assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))
    said: list[Said] = [user("a"), agent("A"), user("b"), agent("B"), user("c")]
    again = gateway.restarted()
    await again.ask(BRIEF, *said, chat="c-1")
    assert (again.sent.conversation_id, again.sent.news) == ("conv-1", (BRIEF, user("c")))
    await again.ask(BRIEF, *said, agent("C"), user("d"), chat="c-1")
    assert (again.sent.conversation_id, again.sent.news) == ("conv-1", (user("d"),))


async def test_instructions_of_a_chat_that_departs_are_told_again(gateway: Gateway) -> None:
    await gateway.ask(KIND, user("a"), chat="c-1")
    await gateway.ask(KIND, user("x"), chat="c-1")
    assert (gateway.sent.conversation_id, gateway.sent.news) == ("conv-2", (KIND, user("x")))


async def test_several_instructions_are_one_text(gateway: Gateway) -> None:
    await gateway.ask(KIND, user("a"), agent("A"), BRIEF, user("b"), chat="c-1")
    assert gateway.sent.history == (user("a"), agent("A"))
    assert gateway.sent.news == (Instructed("Be kind\n\nBe brief"), user("b"))


@pytest.mark.parametrize("fields", [{}, {"chat": "c-1"}, {"is_background": True}])
async def test_instructions_are_ignored_where_the_operator_wants_that(store: Database, fields: Any) -> None:
    async with gateway_on(store, system_prompts="ignore") as gateway:
        await gateway.ask(KIND, user("a"), **fields)
        assert gateway.sent.news == (user("a"),)
        assert gateway.letta.shown == [""]


# Functions, which have no ids ----------------------------------------------------------------------------------------

FUNCTION_CALLED = AgentSaid("", (Call("f", "f", "{}"),))


@pytest.mark.parametrize("fields", [{"chat": "c-1"}, {}])
async def test_results_of_functions_go_to_the_calls_that_wait(gateway: Gateway, fields: dict[str, Any]) -> None:
    told: list[Said] = [user("a")]
    for number in (1, 2):
        gateway.letta.play(calls(f"call_{number}"))
        await gateway.ask(*told, tools=(TOOL,), is_legacy=True, **fields)
        told += [FUNCTION_CALLED, ToolResult("f", str(number))]
    gateway.letta.play(answers("A"))
    await gateway.ask(*told, tools=(TOOL,), is_legacy=True, **fields)
    assert gateway.sent.returns == (ToolResult("call_2", "2"),)
    assert [turn.sent.returns for turn in gateway.letta.turns[:2]] == [(), (ToolResult("call_1", "1"),)]
    await gateway.ask(*told, agent("A"), user("b"), tools=(TOOL,), is_legacy=True, **fields)
    (place,) = {turn.sent.conversation_id for turn in gateway.letta.turns}
    assert (gateway.sent.conversation_id, gateway.sent.history, gateway.sent.news) == (place, (), (user("b"),))


# Overlays ------------------------------------------------------------------------------------------------------------


async def test_instructions_on_the_agents_own_thread_are_laid_over(gateway: Gateway) -> None:
    await gateway.ask(KIND, user("a"))
    assert gateway.sent == turn(news=(user("a"),), overlay="Be kind")
    await gateway.ask(user("b"))
    assert gateway.sent == turn(news=(user("b"),))


ENDINGS: dict[str, Script] = {
    **BROKEN,
    "not delivered": Script(opening=(NOT_DELIVERED,)),
    "ended well": answers("A"),
    "calls": calls("call_1"),
}


async def test_long_turn_with_instructions_holds_up_no_other_chat(gateway: Gateway) -> None:
    gate = asyncio.Event()
    gateway.letta.play(Script(steps=(Hold(gate), *answers("A").steps)))
    task = await gateway.start(KIND, user("a"))
    await gateway.ask_beside(user("b"), chat="c-1")
    await gateway.ask_beside(BRIEF, user("c"), chat="c-2")
    assert gateway.letta.shown == ["Be kind", "", ""]
    gate.set()
    await task


async def test_server_that_cannot_be_asked_whether_it_takes_instructions(gateway: Gateway) -> None:
    gateway.letta.down = UpstreamUnavailable(should_retry=True)
    with pytest.raises(UpstreamUnavailable):
        await gateway.ask(KIND, user("a"))
    assert gateway.letta.turns == []


@pytest.mark.parametrize("is_able", [True, False])
async def test_instructions_are_told_once_and_again_after_a_change(store: Database, is_able: Any) -> None:
    async with gateway_on(store, system_prompts="message" if is_able else "overlay") as gateway:
        gateway.letta.can_overlay = is_able
        for instructions, told in ((KIND, True), (KIND, False), (BRIEF, True), (BRIEF, False), (KIND, True)):
            await gateway.ask(instructions, user("a"))
            assert gateway.sent == turn(news=(instructions, user("a")) if told else (user("a"),))
        again = gateway.restarted()
        await again.ask(KIND, user("a"))
        assert again.sent == turn(news=(user("a"),))
        await again.ask(KIND, user("a"), owner="ben")
        assert again.sent == turn(news=(KIND, user("a")))
        assert set(gateway.letta.shown) == {""}


async def test_long_instructions_of_two_clients_are_told_once_and_named_then(store: Database) -> None:
    one, other = (Instructed(f"{text} " * 200) for text in ("Be kind.", "Be brief."))
    async with gateway_on(store, system_prompts="message") as gateway:
        for client, instructions in (("one", one), ("other", other)):
            await gateway.ask(instructions, user("a"), client=client)
            assert instructed(gateway.sent) == [instructions.text]
        for client, instructions in (("one", one), ("other", other), ("one", one)):
            await gateway.ask(instructions, user("a"), client=client)
            (told,) = instructed(gateway.sent)
            assert instructions.text[:100] in told
            assert len(told) < 400
            await gateway.ask(instructions, user("b"), client=client)
            assert instructed(gateway.sent) == []
        await gateway.ask(Instructed("New. " * 200), user("c"), client="one")
        assert instructed(gateway.sent) == ["New. " * 200]


async def test_instructions_that_were_surely_not_delivered_are_told_again(store: Database) -> None:
    async with gateway_on(store, system_prompts="message") as gateway:
        gateway.letta.play(Script(opening=(NOT_DELIVERED,)))
        with pytest.raises(UpstreamUnavailable):
            await gateway.ask(KIND, user("a"))
        await gateway.ask(KIND, user("a"))
        assert gateway.sent.news == (KIND, user("a"))


# Conversations for one request ---------------------------------------------------------------------------------------


async def test_stateless_request_replays_its_transcript_and_leaves_nothing(stateless: Gateway) -> None:
    await stateless.ask(KIND, user("a"), agent("A"), user("b"))
    assert stateless.sent == turn(conversation_id="conv-1", history=(user("a"), agent("A")), news=(KIND, user("b")))
    assert stateless.letta.kept == []


@pytest.mark.parametrize("script", ENDINGS.values(), ids=ENDINGS.keys())
async def test_stateless_conversation_is_deleted_in_every_ending_but_calls(stateless: Gateway, script: Script) -> None:
    stateless.letta.play(script)
    try:
        await stateless.ask(user("a"), tools=(TOOL,))
    except (UpstreamRejected, UpstreamTruncated, UpstreamUnavailable):
        assert script is not ENDINGS["ended well"]
    assert stateless.letta.kept == (["conv-1"] if script is ENDINGS["calls"] else [])


@pytest.mark.parametrize("script", [LEAVES_OFF, Script(opening=(Hang(),))])
async def test_stateless_request_that_was_left(stateless: Gateway, script: Script) -> None:
    stateless.letta.play(script)
    await leave(await stateless.start(user("a")))
    await stateless.settled()
    assert stateless.letta.turns[0].cancelled
    assert stateless.letta.kept == []


async def test_stateless_requests_do_not_wait_for_each_other(stateless: Gateway) -> None:
    gate = asyncio.Event()
    stateless.letta.play(Script(steps=(Hold(gate), *answers("A").steps)))
    task = await stateless.start(user("a"))
    await stateless.ask_beside(user("a"))
    gate.set()
    await task
    assert stateless.letta.kept == []


async def test_stateless_tool_loop_stays_in_its_conversation(stateless: Gateway) -> None:
    stateless.letta.play(calls("call_1"), calls("call_2"), answers("A"))
    await stateless.ask(user("a"), tools=(TOOL,))
    (waiting,) = await stateless.waiting("call_1")
    assert (waiting.conversation_id, waiting.chat, waiting.is_ephemeral) == ("conv-1", None, True)
    said: list[Said] = [user("a"), called("call_1"), ToolResult("call_1", "1")]
    await stateless.ask(*said, tools=(TOOL,))
    assert stateless.sent == turn(conversation_id="conv-1", returns=(said[2],), tools=(TOOL,))
    assert stateless.letta.kept == ["conv-1"]
    again = stateless.restarted()
    result = ToolResult("call_2", "2")
    await again.ask(*said, called("call_2"), result, tools=(TOOL,))
    assert again.sent == turn(conversation_id="conv-1", returns=(result,), tools=(TOOL,))
    assert (again.letta.kept, await again.waiting("call_1", "call_2")) == ([], [])


async def test_stateless_results_that_were_surely_not_delivered(stateless: Gateway) -> None:
    stateless.letta.play(calls("call_1"), Script(opening=(NOT_DELIVERED,)))
    said: list[Said] = [user("a"), called("call_1"), ToolResult("call_1", "1")]
    await stateless.ask(user("a"), tools=(TOOL,))
    with pytest.raises(UpstreamUnavailable):
        await stateless.ask(*said, tools=(TOOL,))
    assert (stateless.letta.kept, len(await stateless.waiting("call_1"))) == (["conv-1"], 1)
    await stateless.ask(*said, tools=(TOOL,))
    assert stateless.sent.conversation_id == "conv-1"
    assert stateless.letta.kept == []


async def test_stateless_results_that_nothing_waits_for(stateless: Gateway) -> None:
    await stateless.ask(user("a"), called("call_9"), ToolResult("call_9", "1"))
    assert stateless.sent == turn(
        conversation_id="conv-1", history=(user("a"), called("call_9")), returns=(ToolResult("call_9", "1"),)
    )


async def test_letta_that_deletes_no_conversation(stateless: Gateway) -> None:
    gate = asyncio.Event()
    stateless.letta.play(Script(steps=(Hold(gate), *answers("A").steps)))
    task = await stateless.start(user("a"))
    stateless.letta.down = UpstreamUnavailable()
    gate.set()
    assert (await task)[0] == TextDelta("A")


@pytest.mark.parametrize("conversation", ["agent", "stateless"])
async def test_background_requests_leave_no_trace(store: Database, conversation: Any) -> None:
    async with gateway_on(store, conversation=conversation) as gateway:
        gateway.letta.play(answers("A"))
        await gateway.ask(user("a"), chat="c-1")
        before = await gateway.pinned("c-1")
        await gateway.ask(user("### Task:\nA title?"), chat="c-1", is_background=True)
        assert gateway.sent == turn(conversation_id="conv-2", news=(user("### Task:\nA title?"),))
        assert (gateway.letta.kept, await gateway.pinned("c-1")) == (["conv-1"], before)
        await gateway.ask(user("a"), agent("A"), user("b"), chat="c-1")
        assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))


# Calls that nobody answers -------------------------------------------------------------------------------------------


async def test_calls_that_have_waited_too_long_are_given_up(stateless: Gateway) -> None:
    stateless.letta.play(calls("call_1", "call_2"))
    await stateless.ask(user("a"), tools=(TOOL,))
    await stateless.chats.sweep(later(ChatPolicy().tool_wait - 5))
    assert (stateless.letta.kept, len(await stateless.waiting("call_1", "call_2"))) == (["conv-1"], 2)
    await stateless.chats.sweep(later(ChatPolicy().tool_wait + 5))
    assert (stateless.letta.kept, await stateless.waiting("call_1", "call_2")) == ([], [])


@pytest.mark.parametrize("fields", [{}, {"chat": "c-1"}])
async def test_conversations_of_chats_outlive_their_calls(gateway: Gateway, fields: Any) -> None:
    gateway.letta.play(calls("call_1"))
    await gateway.ask(user("a"), tools=(TOOL,), **fields)
    await gateway.chats.sweep(later(10_000))
    assert (gateway.letta.deleted, await gateway.waiting("call_1")) == ([], [])


async def test_calls_are_kept_where_letta_cannot_give_them_up(stateless: Gateway) -> None:
    stateless.letta.play(calls("call_1"))
    await stateless.ask(user("a"), tools=(TOOL,))
    stateless.letta.down = UpstreamUnavailable()
    await stateless.chats.sweep(later(10_000))
    assert len(await stateless.waiting("call_1")) == 1
    stateless.letta.down = None
    await stateless.chats.sweep(later(10_000))
    assert (stateless.letta.kept, await stateless.waiting("call_1")) == ([], [])


async def test_calls_whose_results_come_at_the_last_moment_are_not_given_up(stateless: Gateway) -> None:
    gate = asyncio.Event()
    stateless.letta.play(calls("call_1", "call_2"), Script(steps=(Hold(gate), *answers("A").steps)))
    await stateless.ask(user("a"), tools=(TOOL,))
    task = await stateless.start(user("a"), called("call_1", "call_2"), ToolResult("call_1", "1"), tools=(TOOL,))
    await stateless.chats.sweep(later(10_000))
    assert stateless.letta.deleted == []
    gate.set()
    assert (await task)[0] == TextDelta("A")
    assert (stateless.letta.kept, await stateless.waiting("call_1", "call_2")) == ([], [])


# How it is to be answered --------------------------------------------------------------------------------------------

OTHER = ClientTool("g", "", NO_PARAMETERS)


@pytest.mark.parametrize(
    ("fields", "tools", "wish"),
    [
        ({}, (), None),
        ({"tools": (TOOL, OTHER)}, (TOOL, OTHER), None),
        ({"tools": (TOOL, OTHER), "tool_choice": "none"}, (), None),
        (
            {"tools": (TOOL, OTHER), "tool_choice": "required"},
            (TOOL, OTHER),
            "Answer this by calling one of the tools, not in words.",
        ),
        ({"tools": (TOOL, OTHER), "tool_choice": Named("g")}, (OTHER,), "Answer this by calling the tool g."),
        ({"tools": (TOOL,), "parallel_calls": False}, (TOOL,), "Call one tool at a time."),
        ({"tools": (TOOL,), "parallel_calls": False, "tool_choice": "none"}, (), None),
        ({"parallel_calls": False}, (), None),
    ],
)
@pytest.mark.parametrize("where", [{}, {"chat": "c-1"}, {"is_background": True}])
async def test_tools_that_the_agent_is_offered_and_what_it_is_told(
    gateway: Gateway, fields: Any, tools: tuple[ClientTool, ...], wish: str | None, where: Any
) -> None:
    await gateway.ask(user("a"), **fields, **where)
    assert gateway.sent.tools == tools
    assert gateway.sent.news == ((user("a"),) if wish is None else (user("a"), Instructed(wish)))


COUNT = OutputSchema("count", "", msgspec.Raw(b'{"type":"object","required":["n"]}'))


@pytest.mark.parametrize("where", [{}, {"chat": "c-1"}, {"is_background": True}])
async def test_answer_of_a_schema(gateway: Gateway, where: Any) -> None:
    gateway.letta.play(
        Script(
            steps=(
                [ToolCallDelta("call_1", "answer", '{"n":')],
                [ToolCallDelta("call_1", None, "7}")],
                [Stop("requires_approval")],
            )
        )
    )
    events = await gateway.ask(user("a"), tools=(TOOL,), output=COUNT, **where)
    assert [tool.name for tool in gateway.sent.tools] == ["f", "answer"]
    assert instructed(gateway.sent) == ["When you know the answer, give it by calling the tool answer, not in words."]
    assert events == [TextDelta('{"n":7}'), Stop("end_turn")]
    assert await gateway.waiting("call_1") == []
    if "chat" in where:
        await gateway.ask(user("a"), agent('{"n":7}'), user("b"), **where)
        assert gateway.sent == turn(conversation_id="conv-1", news=(user("b"),))
    elif where:
        assert gateway.letta.kept == []


async def test_answer_that_does_not_fit_is_a_failure(gateway: Gateway) -> None:
    gateway.letta.play(answers("Seven."))
    (failure, usage) = await gateway.ask(user("a"), output=COUNT, chat="c-1")
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, InvalidStructuredOutput)
    assert usage == Usage(1, 1)
    pinned = await gateway.pinned("c-1")
    assert pinned is not None
    assert not pinned.is_settled


async def test_one_call_at_a_time_is_all_that_waits(gateway: Gateway) -> None:
    gateway.letta.play(calls("call_1", "call_2"))
    events = await gateway.ask(user("a"), tools=(TOOL,), parallel_calls=False)
    assert events[0] == ToolCallDelta("call_1", "f", "{}")
    assert [call.call_id for call in await gateway.waiting("call_1", "call_2")] == ["call_1"]


@pytest.mark.parametrize("activity", ["hidden", "reasoning"])
async def test_agents_own_tools_are_shown_where_the_operator_wants_that(store: Database, activity: Any) -> None:
    async with gateway_on(store, tool_activity=activity) as gateway:
        did: list[Any] = [ServerToolCall("c", "memory", "{}"), ServerToolReturn("c", "memory", succeeded=True)]
        gateway.letta.play(Script(steps=(did, [TextDelta("A"), Stop("end_turn")])))
        events = await gateway.ask(user("a"))
        lines = [ReasoningDelta("\n[memory {}]\n"), ReasoningDelta("[memory: done]\n")]
        assert events[:2] == (lines if activity == "reasoning" else did)


# Any chat ------------------------------------------------------------------------------------------------------------


class Chatter:
    """Somebody who chats, edits, asks again and goes away, at random; and what Letta's conversations hold of it.

    ``held`` are the texts of each conversation, None where nobody knows them: a turn broke there.
    """

    def __init__(self, gateway: Gateway, seed: int) -> None:
        self.gateway = gateway
        self.chance = random.Random(seed)
        self.chat = f"chat-{seed}"
        self.said: list[Said] = []
        self.held: dict[str, list[str] | None] = {}
        self.number = 0

    def new_text(self) -> str:
        self.number += 1
        return f"{self.number}"

    async def run(self) -> None:
        for _ in range(self.chance.randrange(2, 9)):
            getattr(self, self.chance.choice(["go_on", "go_on", "edit", "regenerate", "restart"]))()
            await self.chance.choice([self.whole, self.whole, self.whole, self.broken, self.refused, self.left])()

    def go_on(self) -> None:
        self.said = [*self.said, user(self.new_text())]

    def edit(self) -> None:
        at = self.chance.randrange(len(self.said) // 2 + 1) * 2
        self.said = [*self.said[:at], user(self.new_text())]

    def regenerate(self) -> None:
        if not self.said:
            self.go_on()
        self.said = self.said[:-1] if isinstance(self.said[-1], AgentSaid) else self.said

    def restart(self) -> None:
        self.gateway = self.gateway.restarted()
        self.go_on()

    async def whole(self) -> None:
        answer = agent(self.new_text())
        self.gateway.letta.play(answers(answer.text))
        await self.gateway.ask(*self.said, chat=self.chat)
        conversation = self.tell()
        self.said.append(answer)
        held = self.held[conversation]
        assert held is not None, "a conversation that nobody knows was gone on with"
        held.append(answer.text)
        assert held == texts(self.said), "what the agent knows is not what the client shows"

    async def broken(self) -> None:
        self.gateway.letta.play(Script(steps=([TextDelta("Hel")], Break(UpstreamTruncated()))))
        with pytest.raises(UpstreamTruncated):
            await self.gateway.ask(*self.said, chat=self.chat)
        self.held[self.tell()] = None
        self.forget_newest()

    async def refused(self) -> None:
        self.gateway.letta.play(Script(opening=(NOT_DELIVERED,)))
        with pytest.raises(UpstreamUnavailable):
            await self.gateway.ask(*self.said, chat=self.chat)
        self.forget_newest()

    async def left(self) -> None:
        self.gateway.letta.play(LEAVES_OFF)
        await leave(await self.gateway.start(*self.said, chat=self.chat))
        await self.gateway.settled()
        self.held[self.tell()] = None
        self.said.append(agent("Hel"))

    def tell(self) -> str:
        """Add to its conversation what the newest turn said."""
        sent = self.gateway.sent
        assert sent.conversation_id is not None
        held = self.held.setdefault(sent.conversation_id, [])
        if held is not None:
            held += texts([*sent.history, *sent.news])
        return sent.conversation_id

    def forget_newest(self) -> None:
        """Take the newest message back, or say it again."""
        if self.chance.random() < 0.5:
            self.said = self.said[:-1]
        if not self.said or isinstance(self.said[-1], AgentSaid):
            self.go_on()


def texts(said: Sequence[Said]) -> list[str]:
    return [
        one.text if isinstance(one, AgentSaid) else "".join(part.text for part in one.content if isinstance(part, Text))
        for one in said
        if isinstance(one, AgentSaid | UserSaid)
    ]


async def test_agent_knows_what_the_client_shows_in_any_chat(gateway: Gateway) -> None:
    for seed in range(30):
        try:
            await Chatter(gateway, seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


async def test_answers_of_users_are_counted_by_their_length(gateway: Gateway) -> None:
    anna, program = Payer("anna", "chat_completions", is_user=True), Payer("local", "chat_completions")
    for payer in (anna, program):
        gateway.letta.play(says("Hello", " there"))
        await gateway.talk(Asker(payer, "client", "agent-1"), Ask(model="friend", transcript=(user("Hi"),)))
        await gateway.settled()
    assert list(gateway.meter.characters.values()) == [11, 0]
