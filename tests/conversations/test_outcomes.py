import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.conversations.outcomes import MAX_BODY, UNKNOWN, Outcome, Outcomes
from gateway.storage.address import Address
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from tests.storage.databases import opened
from tests.storage.texts import UNSTORABLE, storable

OUTCOME = Outcome(
    owner="owner",
    key="key",
    request=bytes(32),
    status=200,
    content_type="text/event-stream",
    body=b"data: \x00\xff\n\n",
    ended_at=1_700_000_000.123456,
)


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    made = TaskSet()
    yield made
    await made.close(1.0)


@pytest.fixture
def outcomes(database: Database, tasks: TaskSet) -> Outcomes:
    return Outcomes(database, tasks)


async def test_key_that_is_not_known(outcomes: Outcomes) -> None:
    assert await outcomes.find("owner", "key") is None


async def test_outcome_is_found_as_it_was_kept(outcomes: Outcomes) -> None:
    assert await outcomes.keep(OUTCOME) == OUTCOME
    assert await outcomes.find("owner", "key") == OUTCOME


async def test_outcome_survives_a_restart(address: Address, tasks: TaskSet) -> None:
    async with opened(address) as database:
        await Outcomes(database, tasks).keep(OUTCOME)
    async with opened(address) as database:
        assert await Outcomes(database, tasks).find("owner", "key") == OUTCOME


async def test_first_one_stands(outcomes: Outcomes) -> None:
    await outcomes.keep(OUTCOME)
    second = msgspec.structs.replace(OUTCOME, request=b"other", status=500, body=b"", ended_at=9.0)
    assert await outcomes.keep(second) == OUTCOME
    assert await outcomes.find("owner", "key") == OUTCOME


async def test_two_that_come_at_once_agree_on_one(outcomes: Outcomes) -> None:
    made = [msgspec.structs.replace(OUTCOME, body=bytes([number])) for number in range(8)]
    stood = await asyncio.gather(*map(outcomes.keep, made))
    assert stood[0] in made
    assert stood == [stood[0]] * 8
    assert await outcomes.find("owner", "key") == stood[0]


async def test_owners_do_not_see_each_others_keys(outcomes: Outcomes) -> None:
    theirs = msgspec.structs.replace(OUTCOME, owner="other", body=b"theirs")
    await outcomes.keep(OUTCOME)
    assert await outcomes.keep(theirs) == theirs
    assert await outcomes.find("owner", "key") == OUTCOME
    assert await outcomes.find("other", "key") == theirs
    assert await outcomes.find("third", "key") is None


async def test_largest_body_is_kept_and_a_larger_one_refused(outcomes: Outcomes) -> None:
    largest = msgspec.structs.replace(OUTCOME, body=bytes(MAX_BODY))
    larger = msgspec.structs.replace(OUTCOME, key="larger", body=bytes(MAX_BODY + 1))
    assert await outcomes.keep(largest) == largest
    with pytest.raises(ValueError, match="at most 2097152 bytes"):
        await outcomes.keep(larger)
    assert await outcomes.find("owner", "larger") is None


async def test_old_ones_are_purged_and_their_keys_free_again(outcomes: Outcomes) -> None:
    for key, ended_at in (("old", 10.0), ("edge", 20.0), ("new", 30.0)):
        await outcomes.keep(msgspec.structs.replace(OUTCOME, key=key, ended_at=ended_at))
    await outcomes.purge(20.0)
    found = [key for key in ("old", "edge", "new") if await outcomes.find("owner", key) is not None]
    assert found == ["edge", "new"]
    again = msgspec.structs.replace(OUTCOME, key="old", body=b"again")
    assert await outcomes.keep(again) == again


async def test_marks_of_many_at_once_replace_what_was_there(outcomes: Outcomes) -> None:
    marks = [msgspec.structs.replace(OUTCOME, key=str(number), status=UNKNOWN, body=b"") for number in range(20)]
    await outcomes.keep(msgspec.structs.replace(OUTCOME, key="0"))
    await asyncio.gather(*map(outcomes.mark, marks))
    assert [await outcomes.find("owner", mark.key) for mark in marks] == marks


async def test_what_is_marked_and_forgotten_at_once_goes_by_the_latest(outcomes: Outcomes) -> None:
    first, again = (msgspec.structs.replace(OUTCOME, ended_at=at) for at in (1.0, 2.0))
    await asyncio.gather(
        outcomes.mark(msgspec.structs.replace(OUTCOME, key="other")),  # the others wait for its commit
        outcomes.mark(first),
        outcomes.forget("owner", "key"),
        outcomes.mark(again),
    )
    assert await outcomes.find("owner", "key") == again
    await asyncio.gather(outcomes.mark(first), outcomes.mark(again), outcomes.forget("owner", "key"))
    assert await outcomes.find("owner", "key") is None


async def test_all_that_are_over_are_forgotten_but_not_what_was_marked_since(outcomes: Outcomes) -> None:
    for key, began in (("over", 10.0), ("anew", 20.0), ("other", 10.0)):
        await outcomes.mark(msgspec.structs.replace(OUTCOME, key=key, ended_at=began))
    await outcomes.forget_all([("owner", "over"), ("owner", "anew"), ("owner", "never")], 20.0)
    assert [await outcomes.find("owner", key) is None for key in ("over", "anew", "other")] == [True, False, False]
    await outcomes.forget_all([], 30.0)


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_text_that_cannot_be_stored_is_refused_and_never_found(outcomes: Outcomes, text: str) -> None:
    for field in ("owner", "key", "content_type"):
        with pytest.raises(ValueError, match="without NUL"):
            await outcomes.keep(msgspec.structs.replace(OUTCOME, **{field: text}))
        with pytest.raises(ValueError, match="without NUL"):
            await outcomes.mark(msgspec.structs.replace(OUTCOME, **{field: text}))
    await outcomes.forget(text, text)
    assert await outcomes.find(text, "key") is None
    assert await outcomes.find("owner", text) is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=st.builds(
        Outcome,
        owner=storable,
        key=storable,
        request=st.binary(max_size=64),
        status=st.integers(100, 599),
        content_type=storable,
        body=st.binary(max_size=200),
        ended_at=st.floats(0, 4e9),
    )
)
async def test_whatever_is_kept_is_found(outcomes: Outcomes, made: Outcome) -> None:
    assert await outcomes.keep(made) == made
    assert await outcomes.find(made.owner, made.key) == made
    await outcomes.purge(5e9)
