import asyncio
import contextlib
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.accounts.agents import AgentConfig, PersonalAgents
from gateway.accounts.deletion import Deletion
from gateway.accounts.errors import AccountExists, InvalidCredentials, InvalidToken, RegistrationClosed
from gateway.accounts.identity.protocol import Verified
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.registration import Registration, RegistrationConfig
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.errors import GatewayError, InvalidRequest, UpstreamUnavailable
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from tests.accounts.faults import Fault, Faults, FaultyBackend, FaultyBilling, FaultyIdentity
from tests.storage.late import late_database

ANN = "ann@example.com"
PASSWORD = "correct horse"
ADDRESS = "192.0.2.7"


class World:
    """What outlives a gateway; each call of ``registration`` is a gateway that was just started."""

    def __init__(self, database: Database, *, confirms: bool = False) -> None:
        self.faults = Faults()
        self.backend = FaultyBackend(self.faults)
        self.billing = FaultyBilling(self.faults)
        self.identity = FaultyIdentity(self.faults, confirms=confirms)
        self.database = database
        self.profiles = Profiles(database)

    def registration(self, *, is_open: bool = True, agent_wait: float = 5.0) -> Registration:
        agents = PersonalAgents(
            backend=self.backend,
            profiles=self.profiles,
            billing=self.billing,
            database=self.database,
            config=AgentConfig(),
            stopping=Stopping(self.database, NoTurns),
            tasks=TaskSet(),
        )
        deletion = Deletion(
            database=self.database,
            identity=self.identity,
            profiles=self.profiles,
            agents=agents,
            billing=self.billing,
            stopping=Stopping(self.database, NoTurns),
            forget=lambda _: None,
        )
        return Registration(
            identity=self.identity,
            profiles=self.profiles,
            agents=agents,
            deletion=deletion,
            is_open=lambda: is_open,
            config=RegistrationConfig(agent_wait),
        )

    async def everybody(self) -> list[Profile]:
        return await self.profiles.page(None, 100, None)

    async def check_whole(self) -> Profile:
        """See that there is one user, to whom everything belongs that there is."""
        (profile,) = await self.everybody()
        (agent,) = self.backend.listed
        assert profile.letta_agent_id == agent.id
        assert self.billing.accounts == {profile.id}
        assert [user.id for user in self.identity.users.values()] == [profile.id]
        return profile


@pytest.fixture
def world(database: Database) -> World:
    return World(database)


async def test_everything_is_made_in_order(world: World) -> None:
    profile, tokens = await world.registration().register(" Ann@Example.COM ", PASSWORD, " Ann ", ADDRESS)
    assert profile is not None
    assert tokens is not None
    assert (profile.id, profile.email, profile.name) == (tokens.user_id, ANN, "Ann")
    assert world.faults.taken == ["register", "open account", "find", "create"]
    assert profile == await world.check_whole()


async def test_login_finds_it_all_there(world: World) -> None:
    made, _ = await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    world.faults.taken.clear()
    found, tokens = await world.registration().login("ANN@example.com", PASSWORD, ADDRESS)
    assert found == made
    assert tokens.user_id == found.id
    assert world.faults.taken == ["login"]


async def test_closed_registration_asks_nobody(world: World) -> None:
    with pytest.raises(RegistrationClosed):
        await world.registration(is_open=False).register(ANN, PASSWORD, None, ADDRESS)
    assert world.faults.taken == []
    profile, _ = await world.registration(is_open=False).create(ANN, PASSWORD, None, ADDRESS)
    assert profile == await world.check_whole(), "the operator can"


@pytest.mark.parametrize("name", ["x" * 101, "two\nlines", "\u202eright to left", "nul\0"])
async def test_name_that_is_none(world: World, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await world.registration().register(ANN, PASSWORD, name, ADDRESS)
    assert caught.value.param == "name"
    assert world.faults.taken == []


async def test_same_registration_again(world: World) -> None:
    for _ in range(3):
        await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    await world.check_whole()


async def test_same_registration_many_times_at_once(world: World) -> None:
    registration = world.registration()
    made = await asyncio.gather(*(registration.register(ANN, PASSWORD, "Ann", ADDRESS) for _ in range(10)))
    profile = await world.check_whole()
    assert {one.id for one, _ in made if one is not None} == {profile.id}


async def test_same_registration_by_many_gateways_at_once(world: World) -> None:
    await asyncio.gather(*(world.registration().register(ANN, PASSWORD, "Ann", ADDRESS) for _ in range(4)))
    await world.check_whole()


async def test_registration_of_another_with_the_same_address(world: World) -> None:
    await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    with pytest.raises(AccountExists):
        await world.registration().register(ANN, "another one's", "Eve", ADDRESS)
    assert (await world.check_whole()).name == "Ann"


async def test_address_that_is_to_be_confirmed_makes_nothing_yet(database: Database) -> None:
    world = World(database, confirms=True)
    assert await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS) == (None, None)
    assert await world.everybody() == []
    assert world.backend.listed == []
    profile, _ = await world.registration().login(ANN, PASSWORD, ADDRESS)
    assert profile == await world.check_whole()


async def test_letta_that_is_down_delays_the_agent_alone(world: World) -> None:
    world.faults.at = 2
    profile, tokens = await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    assert profile is not None
    assert tokens is not None
    assert profile.letta_agent_id is None
    await world.registration().login(ANN, PASSWORD, ADDRESS)
    await world.check_whole()


async def test_letta_that_hangs_delays_the_agent_alone(world: World) -> None:
    world.faults.at, world.faults.fault = 3, "hangs after"
    profile, tokens = await world.registration(agent_wait=0.1).register(ANN, PASSWORD, "Ann", ADDRESS)
    assert profile is not None
    assert tokens is not None
    assert profile.letta_agent_id is None
    await world.registration().login(ANN, PASSWORD, ADDRESS)
    await world.check_whole()


STEPS = 4


@pytest.mark.parametrize("fault", ["fails before", "fails after", "hangs before", "hangs after"])
@pytest.mark.parametrize("step", range(STEPS))
async def test_crash_between_any_two_steps(world: World, step: int, fault: Fault) -> None:
    """Where it hangs, the gateway is killed there; whichever way it goes on, there is one of everything."""
    world.faults.at, world.faults.fault = step, fault
    await killed_while_hanging(world, world.registration())
    assert len(world.faults.taken) == step + 1 or fault.startswith("fails"), "the fault has happened"
    await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    await world.check_whole()
    await world.registration().login(ANN, PASSWORD, ADDRESS)
    await world.check_whole()


async def killed_while_hanging(world: World, registration: Registration) -> None:
    """Register until it is done, or hangs for good."""
    loop = asyncio.get_running_loop()
    working = loop.create_task(registration.register(ANN, PASSWORD, "Ann", ADDRESS))
    hanging = loop.create_task(world.faults.hanging.wait())
    await asyncio.wait({working, hanging}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, hanging):
        task.cancel()
    for making in list(registration._agents._making.values()):
        making.cancel()
    with contextlib.suppress(asyncio.CancelledError, GatewayError):
        await working


FAULTS: st.SearchStrategy[Fault] = st.sampled_from(["fails before", "fails after", "hangs before", "hangs after"])


@given(st.lists(st.tuples(st.integers(0, 6), FAULTS, st.booleans()), max_size=6))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_of_crashes_ends_in_one_of_everything(row: list[tuple[int, Fault, bool]]) -> None:
    async def run() -> None:
        async with late_database() as database:
            world = World(database)
            for step, fault, is_new in row:
                world.faults.at, world.faults.fault = len(world.faults.taken) + step, fault
                world.faults.hanging.clear()
                registration = world.registration()
                if is_new:
                    await killed_while_hanging(world, registration)
                else:
                    with contextlib.suppress(GatewayError, TimeoutError):
                        async with asyncio.timeout(0.05):
                            await world.registration(agent_wait=0.02).login(ANN, PASSWORD, ADDRESS)
            world.faults.at = None
            await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
            await world.check_whole()

    asyncio.run(run())


async def test_login_with_a_wrong_password_makes_nothing(world: World) -> None:
    await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    with pytest.raises(InvalidCredentials):
        await world.registration().login(ANN, "wrong", ADDRESS)
    await world.check_whole()


async def test_token_of_elsewhere_makes_a_profile_at_its_first_use(world: World) -> None:
    profile = await world.registration().complete(Verified("user-from-elsewhere", "s", "Bob@Example.com"))
    assert (profile.id, profile.email, profile.letta_agent_id) == ("user-from-elsewhere", "bob@example.com", None)
    assert await world.registration().complete(Verified("user-from-elsewhere", None, None)) == profile


async def test_users_of_elsewhere_may_have_no_address(world: World) -> None:
    """Whoever logs in by telephone has none; rows are found by the id alone."""
    registration = world.registration()
    for user in ("user-by-phone", "another-by-phone"):
        profile = await registration.complete(Verified(user, "s", None))
        assert (profile.id, profile.email) == (user, "")
        assert await registration.complete(Verified(user, "s", "no address at all")) == profile


async def test_address_that_another_has_now_is_theirs(world: World) -> None:
    """The account of before is gone at the identity service, or has another address there by now."""
    registration = world.registration()
    before = await registration.complete(Verified("before", "s", ANN))
    after = await registration.complete(Verified("after", "s", ANN))
    assert (after.email, (await registration.complete(Verified("before", "s", None))).email) == (ANN, "")
    assert await world.profiles.find_by_email(ANN) == after
    moved = await registration.complete(Verified("before", "s", "new@example.com", time.time() + 60))
    assert (moved.id, moved.email) == (before.id, "new@example.com")
    again = await registration.complete(Verified("before", "s", ANN, before.updated_at - 1))
    assert again == moved, "an older token says what was"


async def test_login_tells_the_address_that_is_now(world: World) -> None:
    profile, _ = await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    assert profile is not None
    world.identity.users["ann@new.example.com"] = world.identity.users.pop(ANN)
    moved, _ = await world.registration().login("ann@new.example.com", PASSWORD, ADDRESS)
    assert (moved.id, moved.email) == (profile.id, "ann@new.example.com")


async def test_token_of_a_deleted_user_makes_nothing(world: World) -> None:
    profile, _ = await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    assert profile is not None
    await world.registration().delete(profile.id)
    with pytest.raises(InvalidToken):
        await world.registration().complete(Verified(profile.id, "s", ANN))
    assert await world.everybody() == []


async def test_letta_that_is_down_does_not_hide_a_database_that_is(world: World) -> None:
    world.faults.at = 0
    with pytest.raises(UpstreamUnavailable):
        await world.registration().register(ANN, PASSWORD, "Ann", ADDRESS)
    assert await world.everybody() == []
