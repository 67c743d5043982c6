import pytest

from gateway.accounts.blocking import Blocking
from gateway.accounts.errors import UserNotFound
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.errors import UpstreamUnavailable
from gateway.storage.engine import Database
from tests.accounts.faults import Fault, Faults, FaultyBilling, FaultyIdentity

ANN = Profile(id="ann", email="ann@example.com", created_at=1.0, updated_at=1.0)


class World:
    """One user, whom an identity service and a biller know too."""

    def __init__(self, database: Database) -> None:
        self.faults = Faults()
        self.profiles = Profiles(database)
        self.identity = FaultyIdentity(self.faults)
        self.billing = FaultyBilling(self.faults)
        self.forgotten: list[str] = []
        self.blocking = Blocking(
            profiles=self.profiles,
            identity=self.identity,
            billing=self.billing,
            stopping=Stopping(database, NoTurns),
            forget=self.forgotten.append,
        )

    async def is_out(self) -> bool:
        profile = await self.profiles.find(ANN.id)
        assert profile is not None
        return profile.is_blocked

    def break_at(self, step: int, fault: Fault) -> None:
        self.faults.taken.clear()
        self.faults.at, self.faults.fault = step, fault


@pytest.fixture
async def world(database: Database) -> World:
    world = World(database)
    assert await world.profiles.add(ANN)
    return world


async def test_blocked_everywhere_and_let_in_again(world: World) -> None:
    assert (await world.blocking.block(ANN)).is_blocked
    assert await world.is_out()
    assert world.identity.blocked == world.billing.blocked == {ANN.id}
    assert world.forgotten == [ANN.id]
    assert not (await world.blocking.unblock(ANN)).is_blocked
    assert not await world.is_out()
    assert world.identity.blocked == world.billing.blocked == set()
    assert world.forgotten == [ANN.id] * 2


@pytest.mark.parametrize("fault", ["fails before", "fails after"])
@pytest.mark.parametrize("step", range(2))
async def test_service_that_is_down_leaves_the_user_out_and_the_next_try_goes_on(
    world: World, step: int, fault: Fault
) -> None:
    world.break_at(step, fault)
    with pytest.raises(UpstreamUnavailable):
        await world.blocking.block(ANN)
    assert await world.is_out()
    assert world.forgotten == [ANN.id], "this process knows it at once"
    await world.blocking.block(ANN)
    assert world.identity.blocked == world.billing.blocked == {ANN.id}

    world.break_at(step, fault)
    with pytest.raises(UpstreamUnavailable):
        await world.blocking.unblock(ANN)
    assert await world.is_out()
    await world.blocking.unblock(ANN)
    assert not await world.is_out()
    assert world.identity.blocked == world.billing.blocked == set()


async def test_user_who_is_gone(world: World) -> None:
    await world.profiles.delete(ANN.id)
    with pytest.raises(UserNotFound):
        await world.blocking.block(ANN)
    with pytest.raises(UserNotFound):
        await world.blocking.unblock(ANN)
