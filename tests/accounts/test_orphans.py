from collections.abc import AsyncIterator

import pytest

from gateway.accounts import orphans as module
from gateway.accounts.orphans import Orphan, Orphans
from gateway.errors import AgentGone, ConversationGone, UpstreamUnavailable
from gateway.letta.backend import SentTurn
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.translation.agent_events import Usage
from tests.accounts.ledgers import NOON, House
from tests.storage.databases import opened

ORPHAN = Orphan("t-1", "agent-1", "conv-1", NOON)


@pytest.fixture
async def house(sqlite_file: SqliteFile) -> AsyncIterator[House]:
    async with opened(sqlite_file) as database:
        yield House(database)


def orphans_of(house: House) -> Orphans:
    return Orphans(house.database, house.letta, house.instances)


async def test_turns_of_gateways_that_are_no_more(database: Database) -> None:
    house = House(database)
    await house.instances.beat()
    running, whole = await house.open(), await house.take()
    assert await orphans_of(house).find(frozenset()) == [], "it lives"
    await house.instances.leave()
    next_one = house.another()
    found = await orphans_of(next_one).find(frozenset())
    assert found == [Orphan(running, "agent-1", "conv-1", NOON)]
    assert whole not in {orphan.id for orphan in found}


async def test_turns_that_were_left_for_later(house: House) -> None:
    await house.instances.beat()
    left, other = await house.open(), await house.open()
    settled = await house.take()
    found = await orphans_of(house).find({left, settled, "no turn"})
    assert [orphan.id for orphan in found] == [left]
    assert other not in {orphan.id for orphan in found}


async def test_more_than_one_statement_holds(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    await house.instances.beat()
    left = {await house.open() for _ in range(5)}
    assert {orphan.id for orphan in await orphans_of(house).find(left)} == left


async def test_letta_says_what_a_turn_took(house: House) -> None:
    house.letta.counts["t-1"] = Usage(5, 6)
    assert await orphans_of(house).taken(ORPHAN) == Usage(5, 6)
    assert house.letta.asked == [SentTurn("t-1", "agent-1", "conv-1", NOON)]


async def test_letta_that_knows_nothing_of_a_turn(house: House) -> None:
    assert await orphans_of(house).taken(ORPHAN) is None
    for gone in (AgentGone(), ConversationGone()):
        house.letta.unknown["t-1"] = gone
        assert await orphans_of(house).taken(ORPHAN) is None


async def test_letta_that_cannot_be_asked(house: House) -> None:
    house.letta.down = UpstreamUnavailable()
    with pytest.raises(UpstreamUnavailable):
        await orphans_of(house).taken(ORPHAN)
