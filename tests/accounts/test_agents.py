import asyncio

import pytest

from gateway.accounts.agents import AgentConfig, PersonalAgents, blocks_of, name_of, tag_of
from gateway.accounts.billing.local import LocalBilling
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.errors import InvalidToken, ProvidersUnsupported
from gateway.accounts.profiles import Profile, Profiles
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.errors import UpstreamUnavailable
from gateway.letta.backend import PERSONAL_TAG, Agent, Capabilities
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from tests.accounts.faults import Fault, Faults, FaultyBackend, FaultyBilling

USER = "3f2a91bc-4d5e-4f60-8a7b-112233445566"
CONFIG = AgentConfig("openai/gpt-5", "openai/embedding", ("core_memory_append",))


def profile_of(user_id: str = USER, *, name: str = "Ann", agent_id: str | None = None) -> Profile:
    return Profile(
        id=user_id, email=f"{user_id}@example.com", name=name, letta_agent_id=agent_id, created_at=1.0, updated_at=1.0
    )


class World:
    """A Letta, a biller and a database; each call of ``agents`` is a gateway of its own."""

    def __init__(self, database: Database) -> None:
        self.faults = Faults()
        self.backend = FaultyBackend(self.faults)
        self.billing = FaultyBilling(self.faults)
        self.database = database
        self.profiles = Profiles(database)

    def agents(self, billing: Billing | None = None) -> PersonalAgents:
        return PersonalAgents(
            backend=self.backend,
            profiles=self.profiles,
            billing=billing or self.billing,
            database=self.database,
            config=CONFIG,
            stopping=Stopping(self.database, NoTurns),
            tasks=TaskSet(),
        )

    async def current(self) -> Profile:
        profile = await self.profiles.find(USER)
        assert profile is not None
        return profile

    async def user(self, *, agent_id: str | None = None) -> Profile:
        profile = profile_of(agent_id=agent_id)
        assert await self.profiles.add(profile)
        return profile

    async def agent_id(self) -> str | None:
        profile = await self.profiles.find(USER)
        assert profile is not None
        return profile.letta_agent_id


@pytest.fixture
def world(database: Database) -> World:
    return World(database)


async def test_first_time(world: World) -> None:
    profile = await world.agents().ensure(await world.user())
    (agent,) = world.backend.listed
    assert profile.letta_agent_id == agent.id == await world.agent_id()
    (spec,) = world.backend.made
    assert (spec.model, spec.embedding, spec.tools) == ("openai/gpt-5", "openai/embedding", ("core_memory_append",))
    assert spec.tags == (PERSONAL_TAG, f"{PERSONAL_TAG}:{USER}")
    assert spec.name == "Ann-3f2a91bc4d5e"
    assert {block.label: bool(block.description) for block in spec.blocks} == {"human": True, "persona": True}
    assert spec.provider is not None
    assert spec.provider.name == f"provider-{USER}"
    assert world.billing.accounts == {USER}, "before the agent, which uses its key"
    assert world.faults.taken == ["open account", "find", "create"]


async def test_every_other_time_asks_nobody(world: World) -> None:
    profile = await world.user(agent_id="agent-9")
    assert await world.agents().ensure(profile) is profile
    assert world.faults.taken == []


async def test_many_at_once_get_one(world: World) -> None:
    profile, agents = await world.user(), world.agents()
    found = await asyncio.gather(*(agents.ensure(profile) for _ in range(20)))
    assert {one.letta_agent_id for one in found} == {"agent-1"}
    assert len(world.backend.listed) == len(world.backend.made) == 1


async def test_many_gateways_at_once_keep_one(world: World) -> None:
    """Each makes an agent before it sees another's; the row decides, and the others are deleted."""
    profile = await world.user()
    found = await asyncio.gather(*(world.agents().ensure(profile) for _ in range(4)))
    (kept,) = world.backend.listed
    assert {one.letta_agent_id for one in found} == {kept.id} == {await world.agent_id()}


async def test_agent_that_a_crash_left_is_found_again(world: World) -> None:
    profile = await world.user()
    world.backend.listed = [
        Agent("agent-b", "x", 2, (PERSONAL_TAG, tag_of(USER))),
        Agent("agent-a", "x", 1, (PERSONAL_TAG, tag_of(USER))),
        Agent("agent-0", "other", 0, (PERSONAL_TAG, tag_of("somebody-else"))),
    ]
    assert (await world.agents().ensure(profile)).letta_agent_id == "agent-a", "the oldest: it was spoken to"
    assert world.backend.made == []


async def test_agent_of_another_biller_is_given_to_this_one(world: World) -> None:
    """It keeps what it remembers, and is asked of its model by the user's own key from now on."""
    world.billing.strangers.add(USER)
    world.backend.listed = [
        Agent("agent-former", "x", 1, (PERSONAL_TAG, tag_of(USER))),
        Agent("agent-9", "x", 2, (PERSONAL_TAG, tag_of(USER))),
    ]
    profile, agents = await world.user(agent_id="agent-9"), world.agents()
    profile = await agents.ensure(profile)
    assert profile.letta_agent_id == await world.agent_id() == "agent-9"
    assert (world.billing.accounts, world.backend.made) == ({USER}, [])
    given = world.backend.providers["agent-9"]
    assert given is not None
    assert given.name == f"provider-{USER}"
    taken = len(world.faults.taken)
    await agents.ensure(profile)
    assert len(world.faults.taken) == taken, "once"


@pytest.mark.parametrize("fault", ["fails before", "fails after"])
@pytest.mark.parametrize("step", range(3))
async def test_change_of_biller_that_fails_is_taken_up_again(world: World, step: int, fault: Fault) -> None:
    world.billing.strangers.add(USER)
    world.backend.listed = [Agent("agent-9", "x", 2, (PERSONAL_TAG, tag_of(USER)))]
    await world.user(agent_id="agent-9")
    world.faults.at, world.faults.fault = step, fault
    with pytest.raises(UpstreamUnavailable):
        await world.agents().ensure(await world.current())
    assert (await world.agents().ensure(await world.current())).letta_agent_id == "agent-9"
    assert world.backend.providers.keys() == {"agent-9"}
    assert (world.backend.made, world.billing.accounts) == ([], {USER})


async def test_users_key_of_a_former_biller_is_forgotten(world: World) -> None:
    await world.user(agent_id="agent-9")
    await world.profiles.change(USER, litellm_key="encrypted")
    world.backend.listed = [Agent("agent-9", "x", 2, (PERSONAL_TAG, tag_of(USER)))]
    agents = world.agents(LocalBilling({}))
    profile = await agents.ensure(await world.current())
    assert (profile.letta_agent_id, profile.litellm_key) == ("agent-9", None)
    assert world.backend.providers == {"agent-9": None}, "the server's own"
    assert await agents.ensure(profile) is profile


async def test_client_that_goes_away_leaves_the_work_to_go_on(world: World) -> None:
    profile, agents = await world.user(), world.agents()
    world.faults.at, world.faults.fault = 2, "hangs before"
    with pytest.raises(TimeoutError):
        await agents.ensure_within(profile, 0.2)
    waiting = asyncio.get_running_loop().create_task(agents.ensure(profile))
    await asyncio.sleep(0.01)
    assert not waiting.done(), "it joins what is under way"
    waiting.cancel()
    assert world.backend.made == []


@pytest.mark.parametrize("fault", ["fails before", "fails after"])
@pytest.mark.parametrize("step", range(3))
async def test_step_that_fails_is_taken_again(world: World, step: int, fault: Fault) -> None:
    profile, agents = await world.user(), world.agents()
    world.faults.at, world.faults.fault = step, fault
    with pytest.raises(UpstreamUnavailable):
        await agents.ensure(profile)
    assert await world.agent_id() is None
    assert (await agents.ensure(profile)).letta_agent_id is not None
    assert len(world.backend.listed) == len(world.backend.made) == 1


async def test_user_who_is_deleted_meanwhile(world: World) -> None:
    profile = await world.user()
    await world.profiles.delete(USER)
    with pytest.raises(InvalidToken):
        await world.agents().ensure(profile)
    assert world.backend.made == []


async def test_user_who_is_deleted_while_the_agent_is_made(world: World) -> None:
    profile, deleting = await world.user(), world.profiles

    class Late(FaultyBackend):
        async def find_tagged(self, tag: str) -> list[Agent]:
            await deleting.delete(USER)
            return await super().find_tagged(tag)

    world.backend = Late(world.faults)
    with pytest.raises(InvalidToken):
        await world.agents().ensure(profile)
    assert world.backend.listed == [], "the agent goes with them"


async def test_server_whose_agents_have_no_providers(world: World) -> None:
    """An agent that cannot use the user's own key would be billed to somebody else."""
    profile = await world.user()
    world.backend.capabilities = Capabilities(providers=False)
    with pytest.raises(ProvidersUnsupported):
        await world.agents().ensure(profile)
    assert world.backend.made == []


async def test_reset_gives_a_fresh_one(world: World) -> None:
    agents = world.agents()
    profile = await agents.ensure(await world.user())
    renewed = await agents.reset(profile)
    assert (profile.letta_agent_id, renewed.letta_agent_id) == ("agent-1", "agent-2")
    assert [agent.id for agent in world.backend.listed] == ["agent-2"]
    assert await world.agent_id() == "agent-2"


async def test_resets_at_once_are_one(world: World) -> None:
    agents = world.agents()
    profile = await agents.ensure(await world.user())
    found = await asyncio.gather(*(agents.reset(profile) for _ in range(10)))
    assert {one.letta_agent_id for one in found} == {"agent-2"}
    assert [agent.id for agent in world.backend.listed] == ["agent-2"]


async def test_resets_by_many_gateways_leave_one(world: World) -> None:
    profile = await world.agents().ensure(await world.user())
    await asyncio.gather(*(world.agents().reset(profile) for _ in range(4)))
    (kept,) = world.backend.listed
    assert kept.id == await world.agent_id() != "agent-1"


async def test_reset_without_an_agent_makes_one(world: World) -> None:
    assert (await world.agents().reset(await world.user())).letta_agent_id == "agent-1"


@pytest.mark.parametrize("fault", ["fails before", "fails after"])
async def test_reset_that_cannot_make_one_keeps_the_old(world: World, fault: Fault) -> None:
    agents = world.agents()
    profile = await agents.ensure(await world.user())
    world.faults.at, world.faults.fault = len(world.faults.taken) + 2, fault
    with pytest.raises(UpstreamUnavailable):
        await agents.reset(profile)
    assert await world.agent_id() == "agent-1"
    assert "agent-1" in [agent.id for agent in world.backend.listed]
    renewed = await agents.reset(profile)
    assert [agent.id for agent in world.backend.listed] == [renewed.letta_agent_id], "nothing is left behind"


async def test_former_agent_that_cannot_be_deleted_goes_with_the_next_reset(world: World) -> None:
    agents = world.agents()
    profile = await agents.ensure(await world.user())
    world.faults.at = len(world.faults.taken) + 3  # open account, find, create, delete
    renewed = await agents.reset(profile)
    assert renewed.letta_agent_id == await world.agent_id() == "agent-2"
    assert len(world.backend.listed) == 2
    await agents.reset(renewed)
    assert [agent.id for agent in world.backend.listed] == ["agent-3"]


async def test_delete_leaves_none(world: World) -> None:
    agents = world.agents()
    await agents.ensure(await world.user())
    world.backend.listed += [
        Agent("agent-7", "left by a crash", 7, (PERSONAL_TAG, tag_of(USER))),
        Agent("agent-8", "a stranger's", 8, (PERSONAL_TAG, tag_of("somebody-else"))),
        Agent("agent-9", "without its tag", 9),
    ]
    await agents.delete(USER, "agent-9")
    assert [agent.id for agent in world.backend.listed] == ["agent-8"]
    assert world.backend.gone_providers == [f"provider-{USER}"]
    assert world.faults.taken[-1] == "delete provider", "when no agent needs it any more"
    await agents.delete(USER, "agent-9")
    await agents.delete(USER)


async def test_no_provider_is_deleted_where_users_have_none(world: World) -> None:
    agents = PersonalAgents(
        backend=world.backend,
        profiles=world.profiles,
        billing=LocalBilling({}),
        database=world.database,
        config=CONFIG,
        stopping=Stopping(world.database, NoTurns),
        tasks=TaskSet(),
    )
    await agents.delete(USER)
    assert world.faults.taken == ["find"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Ann", "Ann-3f2a91bc4d5e"),
        ("Ann  O'Hara", "Ann-O-Hara-3f2a91bc4d5e"),
        ("", "user-3f2a91bc4d5e"),
        ("张伟", "user-3f2a91bc4d5e"),
        ('a/b\\c:d*e?f"g<h>i|j', "a-b-c-d-e-f-g-h-i-j-3f2a91bc4d5e"),
        ("x" * 100, "x" * 40 + "-3f2a91bc4d5e"),
    ],
)
def test_name_is_one_that_every_letta_takes(name: str, shown: str) -> None:
    assert name_of(profile_of(name=name)) == shown


def test_memory_begins_with_what_is_known() -> None:
    human, persona = blocks_of(profile_of(name="张伟"))
    assert human.value == "Name: 张伟"
    assert persona.value
    assert blocks_of(profile_of(name=""))[0].value == "Nothing is known yet."
