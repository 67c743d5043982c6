import asyncio

import pytest

from gateway.accounts import agent_models
from gateway.accounts.agent_models import KEEP, UNKNOWN, AgentModels
from gateway.errors import UpstreamUnavailable
from gateway.letta.backend import AgentDetails
from gateway.letta.scripted import Hold
from gateway.tasks import TaskSet
from tests.accounts.ledgers import Clock, CountingLetta


class Letta(CountingLetta):
    """A Letta whose agents all have this model."""

    handle: str | None = "scripted/model"

    async def details(self, agent_id: str) -> AgentDetails:
        await super().details(agent_id)
        return AgentDetails(None, self.handle, ())


class House:
    def __init__(self) -> None:
        self.letta = Letta()
        self.clock = Clock(0.0)
        self.tasks = TaskSet()
        self.models = AgentModels(self.letta, self.tasks, clock=self.clock)


@pytest.fixture
def house() -> House:
    return House()


async def test_agent_is_asked_once_a_minute(house: House) -> None:
    assert await house.models.of("agent-1") == "scripted/model"
    house.letta.handle = "other/model"
    house.clock.at = KEEP - 0.001
    assert await house.models.of("agent-1") == "scripted/model"
    assert house.letta.details_asked == 1
    house.clock.at = KEEP
    assert await house.models.of("agent-1") == "other/model"
    assert house.letta.details_asked == 2


async def test_agents_are_asked_each(house: House) -> None:
    await asyncio.gather(house.models.of("agent-1"), house.models.of("agent-2"))
    assert house.letta.details_asked == 2


async def test_many_who_ask_at_the_same_time_ask_once(house: House) -> None:
    gate = asyncio.Event()
    house.letta.holding = Hold(gate)
    asking = [asyncio.get_running_loop().create_task(house.models.of("agent-1")) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*asking[1:]) == ["scripted/model"] * 4
    assert house.letta.details_asked == 1


async def test_letta_that_is_down(house: House) -> None:
    house.letta.down = UpstreamUnavailable()
    with pytest.raises(UpstreamUnavailable):
        await house.models.of("agent-1")
    house.letta.down = None
    assert await house.models.of("agent-1") == "scripted/model"
    house.letta.down = UpstreamUnavailable()
    house.clock.at = KEEP * 100
    assert await house.models.of("agent-1") == "scripted/model", "what was known last"


async def test_agent_that_is_no_more(house: House) -> None:
    assert await house.models.of("agent-9") == UNKNOWN
    await house.models.of("agent-1")
    house.letta.listed.clear()
    house.clock.at = KEEP
    assert await house.models.of("agent-1") == "scripted/model", "what was known last"


@pytest.mark.parametrize("model", [None, "", "a\0b", "a\ud800", "m" * 801])
async def test_model_that_has_no_name_to_write_down(house: House, model: str | None) -> None:
    house.letta.handle = model
    assert await house.models.of("agent-1") == UNKNOWN


async def test_memory_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_models, "MOST", 2)
    for agent_id in ("agent-1", "agent-2", "agent-1", "agent-3", "agent-4"):
        await house.models.of(agent_id)
    assert list(house.models._known) == ["agent-3", "agent-4"]
    assert house.models._asking == {}
