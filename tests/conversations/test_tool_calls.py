import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.conversations.tool_calls import WaitingCall, WaitingCalls
from gateway.storage.address import Address
from gateway.storage.engine import Database
from tests.storage.databases import opened
from tests.storage.texts import HOSTILE, UNSTORABLE, storable

CALL = WaitingCall(
    call_id="call_1",
    owner="owner",
    agent_id="agent-1",
    conversation_id="conv-1",
    chat="chat",
    is_ephemeral=True,
    name="get_weather",
    asked_at=1_700_000_000.123456,
)


def call(call_id: str, **changes: object) -> WaitingCall:
    return msgspec.structs.replace(CALL, call_id=call_id, **changes)


@pytest.fixture
def calls(database: Database) -> WaitingCalls:
    return WaitingCalls(database)


async def test_call_is_found_as_it_was_recorded(calls: WaitingCalls) -> None:
    bare = call("call_2", conversation_id=None, chat=None, is_ephemeral=False)
    await calls.record([CALL, bare])
    assert await calls.find(["call_1", "call_2"]) == [CALL, bare]
    assert await calls.find(["call_2"]) == [bare]
    assert await calls.find(["call_3"]) == []
    assert await calls.find([]) == []


async def test_calls_survive_a_restart(address: Address) -> None:
    async with opened(address) as database:
        await WaitingCalls(database).record([CALL])
    async with opened(address) as database:
        assert await WaitingCalls(database).find(["call_1"]) == [CALL]


async def test_same_id_of_two_owners_is_two_calls(calls: WaitingCalls) -> None:
    theirs = call("call_1", owner="other", asked_at=1_800_000_000.0)
    await calls.record([CALL, theirs])
    assert await calls.find(["call_1", "call_1"]) == [CALL, theirs]


async def test_call_recorded_again_is_replaced(calls: WaitingCalls) -> None:
    later = call("call_1", asked_at=2.0, name="other")
    await calls.record([CALL])
    await calls.record([later])
    assert await calls.find(["call_1"]) == [later]


async def test_nothing_to_record(calls: WaitingCalls) -> None:
    await calls.record([])
    assert await calls.overdue(9e9) == []


@pytest.mark.parametrize("conversation_id", ["conv-1", None])
async def test_settled_conversation_and_no_other(calls: WaitingCalls, conversation_id: str | None) -> None:
    settled = [call(f"s{number}", conversation_id=conversation_id) for number in range(3)]
    others = [
        call("a", conversation_id="conv-2"),
        call("b", conversation_id=None if conversation_id else "conv-1"),
        call("c", conversation_id=conversation_id, agent_id="agent-2"),
        call("d", conversation_id=conversation_id, owner="other"),
    ]
    await calls.record(settled + others)
    await calls.settle("owner", "agent-1", conversation_id)
    await calls.settle("owner", "agent-1", conversation_id)
    assert await calls.find([found.call_id for found in settled + others]) == others


async def test_overdue_calls_oldest_first(calls: WaitingCalls) -> None:
    await calls.record([call(f"{when}", asked_at=float(when)) for when in (30, 10, 20)])
    assert [found.call_id for found in await calls.overdue(30.0)] == ["10", "20"]
    assert await calls.overdue(10.0) == []


async def test_more_ids_than_a_statement_takes(calls: WaitingCalls) -> None:
    many = [call(f"{number}", asked_at=float(number)) for number in range(1_200)]
    await calls.record(many)
    assert await calls.find([f"{number}" for number in range(40_000)]) == many


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_text_that_cannot_be_stored_is_refused_and_never_found(calls: WaitingCalls, text: str) -> None:
    for field in ("call_id", "owner", "agent_id", "conversation_id", "chat", "name"):
        with pytest.raises(ValueError, match="without NUL"):
            await calls.record([call("fine"), msgspec.structs.replace(CALL, **{field: text})])
    assert await calls.find([text, "fine"]) == []
    await calls.settle(text, text, text)


async def test_ids_that_look_alike_or_like_sql(calls: WaitingCalls) -> None:
    await calls.record([call(text, name=text) for text in HOSTILE])
    for text in HOSTILE:
        assert await calls.find([text]) == [call(text, name=text)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=st.builds(
        WaitingCall,
        call_id=storable,
        owner=storable,
        agent_id=storable,
        conversation_id=st.none() | storable,
        chat=st.none() | storable,
        is_ephemeral=st.booleans(),
        name=storable,
        asked_at=st.floats(0, 4e9),
    )
)
async def test_whatever_is_recorded_is_found_until_it_is_settled(calls: WaitingCalls, made: WaitingCall) -> None:
    await calls.record([made])
    assert await calls.find([made.call_id]) == [made]
    await calls.settle(made.owner, made.agent_id, made.conversation_id)
    assert await calls.find([made.call_id]) == []
