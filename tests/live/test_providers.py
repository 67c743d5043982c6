"""Model providers of users' own on a V1 server that is this file's: they change whose models it knows."""

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.letta.backend import ModelProvider
from gateway.letta.demo_model import MODEL, RunningDemoModel
from gateway.letta.rest import RestBackend
from gateway.tasks import TaskSet
from tests.live.dying_turn import backend_of
from tests.live.model_thread import demo_model_in_thread
from tests.live.test_personal_agents import SETTLED, say, seen, spec_of
from tests.live.v1_server import V1Server, running_v1

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def model() -> Iterator[RunningDemoModel]:
    with demo_model_in_thread() as model:
        yield model


@pytest.fixture(scope="module")
def server(model: RunningDemoModel) -> Iterator[V1Server]:
    with running_v1(model.base_url) as server:
        yield server


@pytest.fixture
async def backend(server: V1Server) -> AsyncIterator[RestBackend]:
    tasks = TaskSet()
    backend = backend_of("v1", server.base_url, tasks)
    assert isinstance(backend, RestBackend)
    yield backend
    await tasks.close(SETTLED)
    await backend.close()


async def test_agent_that_is_there_goes_to_a_provider_of_its_own(backend: RestBackend, model: RunningDemoModel) -> None:
    """First of all: later the server may know its own model by the provider of a user who is gone."""
    with demo_model_in_thread() as anns:
        user = f"test-{uuid.uuid4().hex[:8]}"
        agent = await backend.create_agent(spec_of(user, model=f"openai-proxy/{MODEL}"))
        await say(backend, agent, "I am called Ann")
        provider, before = ModelProvider(user, anns.base_url, f"key-of-{user}"), len(model.requests)
        for _ in range(2):
            await backend.set_provider(agent.id, spec_of(user, model=MODEL, provider=provider))
        await say(backend, agent, "hello")
        assert (len(anns.requests), len(model.requests)) == (1, before)
        assert "I am called Ann" in seen(anns), "it remembers what was said before"
        await backend.delete_agent(agent.id)
        await backend.delete_provider(user)


async def test_deleted_provider_leaves_the_others_their_models(backend: RestBackend) -> None:
    """A model of one name stands under one provider of the server, mostly the first, who stays without a key."""
    with demo_model_in_thread() as proxy:
        users = [f"test-{uuid.uuid4()}" for _ in range(3)]
        specs = [spec_of(user, model=MODEL, provider=ModelProvider(user, proxy.base_url, "key")) for user in users]
        first, second = [await backend.create_agent(spec) for spec in specs[:2]]
        offered = await backend._agents._models(users[0])
        kept = [users[0]] if offered else []
        await backend.delete_agent(first.id)
        for _ in range(2):
            await backend.delete_provider(users[0])
        assert await backend._agents._models(users[0]) == offered
        await say(backend, second, "hello")
        backend._agents._found.clear()
        third = await backend.create_agent(specs[2])
        await say(backend, third, "hello")
        assert len(proxy.requests) == 2
        assert [await names_of(backend, user) for user in users] == [kept, users[1:2], users[2:]]
        for agent in (second, third):
            await backend.delete_agent(agent.id)
        for user in users[1:]:
            await backend.delete_provider(user)
        assert [await names_of(backend, user) for user in users] == [kept, [], []]


async def names_of(backend: RestBackend, name: str) -> list[str]:
    """Return the providers of this name."""
    return [row.name for row in await backend._agents._providers(name)]


async def test_provider_of_its_own_answers_for_each_agent(backend: RestBackend, model: RunningDemoModel) -> None:
    with demo_model_in_thread() as anns, demo_model_in_thread() as bobs:
        made = []
        for user, theirs in (("ann", anns), ("bob", bobs), ("bob", bobs)):
            provider = ModelProvider(f"test-{user}", theirs.base_url, f"key-of-{user}")
            made.append(await backend.create_agent(spec_of(user, model=MODEL, provider=provider)))
        before = len(model.requests)
        for agent, theirs in zip(made, (anns, bobs, bobs), strict=True):
            asked = len(theirs.requests)
            await say(backend, agent, "hello")
            assert len(theirs.requests) == asked + 1
        assert len(model.requests) == before
        for agent in made:
            await backend.delete_agent(agent.id)
