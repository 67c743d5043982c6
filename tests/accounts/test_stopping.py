import asyncio
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet

import pytest
from sqlalchemy import update

from gateway.accounts import stopping as module
from gateway.accounts.stopping import NoTurns, Stopping, Turns
from gateway.conversations.turns import OpenTurn
from gateway.storage.engine import Database
from gateway.storage.tables import user_profiles
from tests.accounts.ledgers import House, house_on


class OwnTurns:
    """The turns of one gateway, which only remembers what was to be ended."""

    def __init__(self, *open_turns: OpenTurn) -> None:
        self.open = list(open_turns)
        self.stopped: list[str] = []
        self.retired: list[AbstractSet[str]] = []

    async def stop(self, owner: str) -> None:
        self.stopped.append(owner)

    async def retire(self, agent_ids: AbstractSet[str]) -> None:
        self.retired.append(agent_ids)


def turn_of(owner: str, agent_id: str = "agent-1") -> OpenTurn:
    return OpenTurn(f"turn of {owner}", agent_id, owner, "platform", 1.0)


@pytest.fixture
async def house(database: Database) -> AsyncIterator[House]:
    async with house_on(database) as made:
        yield made


def made(house: House, own: Turns) -> Stopping:
    return Stopping(house.database, lambda: own, clock=house.ticks)


async def test_own_turns_are_ended_at_once(house: House) -> None:
    own = OwnTurns()
    stopping = made(house, own)
    await stopping.stop("anna")
    await stopping.retire("anna", {"agent-1"})
    assert (own.stopped, own.retired) == (["anna"], [{"agent-1"}])


async def test_turns_of_other_gateways_are_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    turn_id = await house.open()
    stopping = asyncio.get_running_loop().create_task(made(house, OwnTurns()).stop("anna"))
    await asyncio.sleep(0.1)
    assert stopping.done() != house.database.is_shared
    await house.ledger.close(turn_id, None, "interrupted")
    async with asyncio.timeout(5):
        await stopping


async def test_gateway_that_does_not_end_its_turn_is_not_waited_for_long(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    turn_id = await house.open()
    retiring = asyncio.get_running_loop().create_task(made(house, OwnTurns()).retire("anna", {"agent-1"}))
    await asyncio.sleep(0.1)
    assert retiring.done() != house.database.is_shared
    house.ticks.at += module.WAIT
    async with asyncio.timeout(5):
        await retiring
    await house.ledger.close(turn_id, None, "interrupted")


async def test_turns_that_another_gateway_wants_ended(house: House) -> None:
    for user in ("anna", "ben", "carl", "dora"):
        await house.user(user)
        change = update(user_profiles).where(user_profiles.c.id == user)
        async with house.database.write() as connection:
            agent_id = None if user == "dora" else f"agent-{user}"
            await connection.execute(change.values(letta_agent_id=agent_id, is_blocked=user == "ben"))
    own = OwnTurns(
        turn_of("anna", "agent-anna"),
        turn_of("ben", "agent-ben"),
        turn_of("carl", "agent of before"),
        turn_of("dora", "agent that is being found again"),
        turn_of("gone", "agent-gone"),
        turn_of("local"),
        turn_of("key_0123456789ab"),
    )
    await made(house, own).look()
    assert own.stopped == ["ben", "gone"], "who is blocked, and who is no user any more"
    assert own.retired == [{"agent of before"}]


async def test_nothing_is_asked_where_no_user_has_a_turn(house: House) -> None:
    own = OwnTurns(turn_of("local"))
    await made(house, own).look()
    assert (own.stopped, own.retired) == ([], [])


async def test_process_without_turns(house: House) -> None:
    stopping = made(house, NoTurns())
    await stopping.look()
    await stopping.stop("anna")
    await stopping.retire("anna", {"agent-1"})
