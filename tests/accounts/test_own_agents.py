import asyncio

import pytest

from gateway.accounts import own_agents as module
from gateway.accounts.agents import AgentConfig, PersonalAgents
from gateway.accounts.billing.local import LocalBilling
from gateway.accounts.errors import InvalidToken
from gateway.accounts.own_agents import OwnAgents
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.errors import AgentGone, UpstreamUnavailable
from gateway.letta.backend import Agent
from gateway.letta.scripted import Hang, ScriptedBackend
from gateway.storage.engine import Database
from gateway.tasks import TaskSet

ANN = "00000000-0000-4000-8000-00000000000a"
ANNS = Agent("agent-ann", "Ann-1", 1)
TTL = 30.0


class World:
    """A Letta, and the agents of users on it; ``time`` is by the monotonic clock."""

    def __init__(self, database: Database) -> None:
        self.time = 1_000.0
        self.backend = ScriptedBackend([ANNS])
        self.profiles = Profiles(database)
        agents = PersonalAgents(
            backend=self.backend,
            profiles=self.profiles,
            billing=LocalBilling({}),
            database=database,
            config=AgentConfig(),
            stopping=Stopping(database, NoTurns),
            tasks=TaskSet(),
        )
        self.own = OwnAgents(self.profiles, agents, self.backend, TTL, lambda: self.time)

    async def register(self, agent_id: str | None = ANNS.id) -> Profile:
        profile = Profile(id=ANN, email="ann@example.com", letta_agent_id=agent_id, created_at=1.0, updated_at=1.0)
        assert await self.profiles.add(profile)
        return profile


@pytest.fixture
def world(database: Database) -> World:
    return World(database)


async def test_agent_with_its_name(world: World) -> None:
    await world.register()
    assert await world.own.of(ANN) == ANNS
    assert await world.own.id_of(ANN) == ANNS.id


async def test_name_is_remembered_for_a_while(world: World) -> None:
    await world.register()
    for _ in range(3):
        await world.own.of(ANN)
    assert world.backend.searches == [ANNS.id]
    world.time += TTL
    await world.own.of(ANN)
    assert world.backend.searches == [ANNS.id] * 2


async def test_id_needs_no_letta(world: World) -> None:
    await world.register()
    world.backend.down = UpstreamUnavailable()
    assert await world.own.id_of(ANN) == ANNS.id
    assert world.backend.searches == []


async def test_fresh_agent_is_known_at_once(world: World) -> None:
    await world.register()
    await world.own.of(ANN)
    fresh = Agent("agent-fresh", "Ann-2", 2)
    world.backend.listed.append(fresh)
    await world.profiles.change(ANN, letta_agent_id=fresh.id)
    assert await world.own.of(ANN) == fresh


async def test_first_time_makes_it(world: World) -> None:
    await world.register(None)
    made = await world.own.of(ANN)
    assert made in world.backend.listed
    assert (await world.own.id_of(ANN), len(world.backend.specs)) == (made.id, 1)


async def test_agent_that_letta_has_no_more(world: World) -> None:
    await world.register("agent-gone")
    with pytest.raises(AgentGone):
        await world.own.of(ANN)


async def test_user_who_is_gone(world: World) -> None:
    with pytest.raises(InvalidToken):
        await world.own.id_of(ANN)
    with pytest.raises(InvalidToken):
        await world.own.of(ANN)


async def test_name_for_an_answer_that_can_do_without(world: World) -> None:
    profile = await world.register()
    for _ in range(3):
        assert await world.own.name_of(profile) == ANNS.name
    assert world.backend.searches == [ANNS.id]
    world.backend.down = UpstreamUnavailable()
    assert await world.own.name_of(profile) == ANNS.name
    world.time += TTL
    assert await world.own.name_of(profile) is None
    world.backend.down = None
    assert await world.own.name_of(profile) == ANNS.name


async def test_name_that_letta_does_not_tell_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAME_WAIT", 0.05)
    world.backend.holding = Hang()
    async with asyncio.timeout(5):
        assert await world.own.name_of(await world.register()) is None


async def test_no_agent_has_no_name_and_is_not_made_for_it(world: World) -> None:
    assert await world.own.name_of(await world.register(None)) is None
    assert world.backend.specs == {}
    world.backend.listed.clear()
    gone = Profile(id=ANN, email="ann@example.com", letta_agent_id="agent-gone", created_at=1.0, updated_at=1.0)
    assert await world.own.name_of(gone) is None
