import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from gateway.conversations.responses import Responses, StoredResponse
from gateway.storage.address import Address
from gateway.storage.engine import Database
from tests.storage.databases import opened
from tests.storage.texts import UNSTORABLE, storable

STORED = StoredResponse(
    id="resp_1",
    owner="owner",
    agent_id="agent-1",
    conversation_id="conv-1",
    previous_id="resp_0",
    input_items=b'[{"type":"message"}]',
    response=b'{"id":"resp_1"}',
    status="in_progress",
    created_at=1_700_000_000.123456,
)
DONE = msgspec.structs.replace(STORED, status="completed", response=b'{"id":"resp_1","status":"completed"}')


@pytest.fixture
def responses(database: Database) -> Responses:
    return Responses(database)


async def test_response_is_found_as_it_was_kept(responses: Responses) -> None:
    first = msgspec.structs.replace(STORED, id="resp_0", conversation_id=None, previous_id=None)
    await responses.keep(first)
    await responses.keep(STORED)
    assert await responses.find("owner", "resp_0") == first
    assert await responses.find("owner", "resp_1") == STORED


async def test_response_survives_a_restart(address: Address) -> None:
    async with opened(address) as database:
        await Responses(database).keep(STORED)
    async with opened(address) as database:
        assert await Responses(database).find("owner", "resp_1") == STORED


async def test_response_of_somebody_else_is_as_unknown_as_none(responses: Responses) -> None:
    await responses.keep(STORED)
    theirs = msgspec.structs.replace(DONE, owner="other")
    assert await responses.find("other", "resp_1") is None
    assert await responses.find("owner", "resp_2") is None
    assert not await responses.delete("other", "resp_1")
    assert not await responses.update(theirs)
    assert await responses.find("owner", "resp_1") == STORED
    assert await responses.find("other", "resp_1") is None


async def test_same_id_twice_is_a_bug(responses: Responses) -> None:
    await responses.keep(STORED)
    with pytest.raises(IntegrityError):
        await responses.keep(DONE)
    assert await responses.find("owner", "resp_1") == STORED


async def test_updated_response(responses: Responses) -> None:
    await responses.keep(STORED)
    assert await responses.update(DONE)
    assert await responses.find("owner", "resp_1") == DONE


async def test_deleted_response_stays_so_when_its_turn_ends(responses: Responses) -> None:
    await responses.keep(STORED)
    assert await responses.delete("owner", "resp_1")
    assert not await responses.delete("owner", "resp_1")
    assert not await responses.update(DONE)
    assert await responses.find("owner", "resp_1") is None


async def test_old_ones_are_purged(responses: Responses) -> None:
    for name, created_at in (("old", 10.0), ("edge", 20.0), ("new", 30.0)):
        await responses.keep(msgspec.structs.replace(STORED, id=name, created_at=created_at))
    await responses.purge(20.0)
    assert [name for name in ("old", "edge", "new") if await responses.find("owner", name)] == ["edge", "new"]


async def test_large_response(responses: Responses) -> None:
    large = msgspec.structs.replace(STORED, input_items=b"[" + b" " * 20_000_000 + b"]")
    await responses.keep(large)
    assert await responses.find("owner", "resp_1") == large


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_text_that_cannot_be_stored_is_refused_and_never_found(responses: Responses, text: str) -> None:
    for field in ("id", "owner", "agent_id", "conversation_id", "previous_id", "status"):
        changed = msgspec.structs.replace(STORED, **{field: text})
        with pytest.raises(ValueError, match="without NUL"):
            await responses.keep(changed)
        with pytest.raises(ValueError, match="without NUL"):
            await responses.update(changed)
    assert await responses.find("owner", text) is None
    assert await responses.find(text, "resp_1") is None
    assert not await responses.delete("owner", text)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=st.builds(
        StoredResponse,
        id=storable,
        owner=storable,
        agent_id=storable,
        conversation_id=st.none() | storable,
        previous_id=st.none() | storable,
        input_items=st.binary(max_size=200),
        response=st.binary(max_size=200),
        status=storable,
        created_at=st.floats(0, 4e9),
    )
)
async def test_whatever_is_kept_is_found_until_it_is_deleted(responses: Responses, made: StoredResponse) -> None:
    await responses.keep(made)
    assert await responses.find(made.owner, made.id) == made
    assert await responses.delete(made.owner, made.id)
    assert await responses.find(made.owner, made.id) is None
