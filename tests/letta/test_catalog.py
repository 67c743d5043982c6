import asyncio
import time

import pytest

from gateway.errors import AgentGone, ModelNotFound, UpstreamUnavailable
from gateway.letta import catalog
from gateway.letta.backend import PERSONAL_TAG, Agent
from gateway.letta.catalog import MAX_NAME, Catalog, models_of
from gateway.letta.scripted import Hold, ScriptedBackend
from gateway.tasks import TaskSet

FRIEND = Agent("agent-1", "friend", 1)
OTHER = Agent("agent-2", "other", 2)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """A catalog of a scripted backend."""

    def __init__(self, *agents: Agent, ttl: float = 10) -> None:
        self.backend = ScriptedBackend(agents)
        self.clock = Clock()
        self.tasks = TaskSet()
        self.catalog = Catalog(self.backend, self.tasks, ttl, self.clock)

    async def ids(self) -> list[str]:
        return list((await self.catalog.models()).by_model)


def ids(*agents: Agent) -> list[str]:
    return list(models_of(agents).by_model)


# Which name means which agent ----------------------------------------------------------------------------------------


def test_unique_names_in_the_servers_order() -> None:
    assert ids(OTHER, FRIEND) == ["other", "friend"]


def test_shared_name_stands_for_nobody() -> None:
    models = models_of([FRIEND, OTHER, Agent("agent-3", "friend", 3)])
    assert list(models.by_model) == ["agent-1", "other", "agent-3"]
    assert models.get("friend") is None


def test_agent_that_is_listed_twice_shares_its_name_with_nobody() -> None:
    assert ids(FRIEND, FRIEND) == ["friend"]


def test_names_are_exact() -> None:
    assert ids(FRIEND, Agent("agent-2", "Friend", 2)) == ["friend", "Friend"]
    models = models_of([FRIEND])
    assert [models.get(name) for name in ("Friend", "friend ", "frien", "", "FRIEND")] == [None] * 5


def test_name_that_is_taken_by_anothers_id() -> None:
    thief = Agent("agent-2", "agent-1", 2)
    models = models_of([FRIEND, thief])
    assert list(models.by_model) == ["friend", "agent-2"]
    assert models.get("agent-1") == FRIEND


def test_id_always_works() -> None:
    models = models_of([FRIEND, OTHER])
    assert models.get("agent-1") == models.get("friend") == FRIEND


@pytest.mark.parametrize(
    "name", ["", " friend", "friend ", "a\nb", "a\x00b", "a\u202eb", "\ud800", "x" * (MAX_NAME + 1), "\u00a0"]
)
def test_name_that_is_unfit(name: str) -> None:
    assert ids(Agent("agent-1", name, 1)) == ["agent-1"]


@pytest.mark.parametrize("name", ["é 😀", "../x", "a/b", "x" * MAX_NAME, "gpt-4o", '"'])
def test_name_that_is_odd_and_fit(name: str) -> None:
    assert ids(Agent("agent-1", name, 1)) == [name]


# The listing ---------------------------------------------------------------------------------------------------------


async def test_listing_is_kept_for_its_time_to_live() -> None:
    shelf = Shelf(FRIEND)
    assert await shelf.ids() == ["friend"]
    shelf.backend.listed.append(OTHER)
    shelf.clock.now += 9.9
    assert await shelf.ids() == ["friend"]
    shelf.clock.now += 0.1
    assert await shelf.ids() == ["friend", "other"]
    assert shelf.backend.listings == 2


async def test_time_to_live_of_nothing_asks_each_time() -> None:
    shelf = Shelf(FRIEND, ttl=0)
    await shelf.ids()
    await shelf.ids()
    assert shelf.backend.listings == 2


async def test_one_listing_serves_all_who_ask_at_once() -> None:
    shelf = Shelf(FRIEND)
    gate = asyncio.Event()
    shelf.backend.holding = Hold(gate)
    asking = [asyncio.gather(shelf.catalog.resolve("friend"), shelf.catalog.models()) for _ in range(50)]
    await asyncio.sleep(0.01)
    gate.set()
    assert {found for found, _ in await asyncio.gather(*asking)} == {FRIEND}
    assert shelf.backend.listings == 1


async def test_listing_outlives_the_one_who_asked_first() -> None:
    shelf = Shelf(FRIEND)
    gate = asyncio.Event()
    shelf.backend.holding = Hold(gate)
    clients = TaskSet()
    first, second = [clients.spawn(shelf.catalog.models(), name) for name in ("first", "second")]
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    assert first.cancelled()
    gate.set()
    assert list((await second).by_model) == ["friend"]
    assert shelf.backend.listings == 1
    await asyncio.sleep(0)
    assert len(shelf.tasks) == 0


async def test_forgotten_listing_is_asked_for_again() -> None:
    shelf = Shelf(FRIEND)
    await shelf.ids()
    shelf.catalog.forget()
    shelf.backend.listed.clear()
    assert await shelf.ids() == []


# Resolving -----------------------------------------------------------------------------------------------------------


async def test_known_name_asks_nobody() -> None:
    shelf = Shelf(FRIEND)
    for name in ("friend", "agent-1", "friend"):
        assert await shelf.catalog.resolve(name) == FRIEND
    assert (shelf.backend.listings, shelf.backend.searches) == (0, ["friend", "agent-1"])
    await shelf.ids()
    assert await shelf.catalog.resolve("friend") == FRIEND
    assert (shelf.backend.listings, len(shelf.backend.searches)) == (1, 2)


async def test_agent_made_since_the_listing_is_found() -> None:
    shelf = Shelf(FRIEND)
    await shelf.ids()
    shelf.backend.listed.append(OTHER)
    assert await shelf.catalog.resolve("other") == OTHER
    assert await shelf.catalog.resolve("agent-2") == OTHER
    assert (shelf.backend.listings, shelf.backend.searches) == (1, ["other", "agent-2"])


async def test_unknown_name_costs_one_small_question() -> None:
    shelf = Shelf(FRIEND)
    for name in ("x", "y", "Friend"):
        with pytest.raises(ModelNotFound) as raised:
            await shelf.catalog.resolve(name)
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    assert (shelf.backend.listings, shelf.backend.searches) == (0, ["x", "y", "Friend"])


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "x" * 201, ""])
async def test_name_that_no_agent_can_have_is_not_asked_for(name: str) -> None:
    shelf = Shelf(FRIEND)
    with pytest.raises(ModelNotFound):
        await shelf.catalog.resolve(name)
    assert (shelf.backend.listings, shelf.backend.searches) == (0, [""] if not name else [])


async def test_found_name_grows_old() -> None:
    shelf = Shelf(FRIEND)
    assert await shelf.catalog.resolve("friend") == FRIEND
    shelf.backend.listed.clear()
    assert await shelf.catalog.resolve("friend") == FRIEND
    shelf.catalog.forget()
    with pytest.raises(ModelNotFound):
        await shelf.catalog.resolve("friend")


async def test_found_names_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_RESOLVED", 2)
    agents = [Agent(f"agent-{n}", f"name {n}", n) for n in range(5)]
    shelf = Shelf(*agents)
    for agent in agents:
        assert await shelf.catalog.resolve(agent.name) == agent
    assert len(shelf.catalog._resolved) <= 2


async def test_shared_name_is_no_model() -> None:
    shelf = Shelf(FRIEND, Agent("agent-3", "friend", 3))
    with pytest.raises(ModelNotFound):
        await shelf.catalog.resolve("friend")
    assert (await shelf.catalog.resolve("agent-3")).id == "agent-3"


async def test_deleted_agent_is_known_until_the_listing_is_old() -> None:
    shelf = Shelf(FRIEND)
    await shelf.ids()
    shelf.backend.listed.clear()
    assert await shelf.catalog.resolve("friend") == FRIEND
    shelf.clock.now += 10
    with pytest.raises(ModelNotFound):
        await shelf.catalog.resolve("friend")


# Letta is down -------------------------------------------------------------------------------------------------------


async def test_backend_that_is_down_is_never_an_unknown_model() -> None:
    shelf = Shelf(FRIEND)
    shelf.backend.down = UpstreamUnavailable(should_retry=True)
    for name in ("friend", "x", "agent-1"):
        with pytest.raises(UpstreamUnavailable):
            await shelf.catalog.resolve(name)
    with pytest.raises(UpstreamUnavailable):
        await shelf.catalog.models()


async def test_backend_that_goes_down_after_the_listing() -> None:
    shelf = Shelf(FRIEND)
    await shelf.ids()
    shelf.backend.down = UpstreamUnavailable()
    assert await shelf.catalog.resolve("friend") == FRIEND
    with pytest.raises(UpstreamUnavailable):
        await shelf.catalog.resolve("x")
    shelf.clock.now += 10
    with pytest.raises(UpstreamUnavailable):  # not the stale name
        await shelf.catalog.resolve("friend")
    shelf.backend.down = None
    assert await shelf.catalog.resolve("friend") == FRIEND


async def test_listing_that_fails_fails_all_who_wait_and_nobody_after() -> None:
    shelf = Shelf(FRIEND)
    shelf.backend.down = AgentGone()
    results = await asyncio.gather(*(shelf.catalog.models() for _ in range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [AgentGone] * 5
    assert shelf.backend.listings == 1
    shelf.backend.down = None
    assert await shelf.ids() == ["friend"]


async def test_five_thousand_agents() -> None:
    shelf = Shelf(*(Agent(f"agent-{n}", f"name {n // 2 if n < 100 else n}", n) for n in range(5_000)))
    started = time.process_time()
    models = await shelf.catalog.models()
    assert time.process_time() - started < 0.5
    assert len(models.by_model) == len(models.by_id) == 5_000
    assert (await shelf.catalog.resolve("name 4999")).id == "agent-4999"
    assert "name 7" not in models.by_model
    assert "agent-14" in models.by_model


# Users' own agents ---------------------------------------------------------------------------------------------------

PERSONAL = Agent("agent-9", "friend", 9, ("letta-gateway:user", "letta-gateway:user:ann"))


async def test_agent_of_a_users_own_is_in_no_listing() -> None:
    shelf = Shelf(FRIEND, PERSONAL)
    models = await shelf.catalog.models()
    assert list(models.by_model) == ["friend"]
    assert models.get("agent-9") is None
    assert models.get("friend") == FRIEND


@pytest.mark.parametrize("model", ["agent-9", "anns"])
async def test_agent_of_a_users_own_is_resolved_for_nobody(model: str) -> None:
    shelf = Shelf(FRIEND, Agent("agent-9", "anns", 9, PERSONAL.tags))
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await shelf.catalog.resolve(model)
        await shelf.catalog.models()


async def test_name_that_an_agent_shares_with_a_users_own() -> None:
    assert await Shelf(PERSONAL, FRIEND).catalog.resolve("friend") == FRIEND
    assert PERSONAL_TAG in PERSONAL.tags
