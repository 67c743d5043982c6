import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.letta import demo_model, local
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_wire import AgentBody, AgentRow
from gateway.letta.embedded import EmbeddedFailed, EmbeddedLetta
from gateway.letta.local import AGENT, OURS, LocalConfig, LocalLetta, Provider, _choose, _ensure_agent, scripted
from gateway.letta.local import running_local_letta as running
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.letta.recording_server import RecordingServer

HANDLE = f"lmstudio/{demo_model.MODEL}"
OPENAI = Provider("OpenAI", {"OPENAI_API_KEY": "x"}, "openai/", ("openai/best", "openai/good"))


# The real one --------------------------------------------------------------------------------------------------------


async def rows(letta: LocalLetta) -> list[AgentRow]:
    backend = AppServerBackend(AppServerConfig(letta.url, letta.child.token), Metrics(), TaskSet())
    try:
        return await backend.rows()
    finally:
        await backend.close()


async def test_real_letta_is_made_ready_once_and_found_again(tmp_path: Path) -> None:
    tasks = TaskSet()
    async with running(LocalConfig(tmp_path), Metrics(), tasks) as letta:
        assert (letta.agent, letta.model, letta.is_scripted) == (AGENT, HANDLE, True)
        assert letta.url == letta.child.url
        assert letta.note == "a scripted model answers: no provider is configured"
        (first,) = await rows(letta)
        assert (first.name, first.model, first.description) == (AGENT, HANDLE, OURS)
    assert letta.child.pid is None
    async with running(LocalConfig(tmp_path), Metrics(), tasks) as letta:
        assert [row.id for row in await rows(letta)] == [first.id], "the same agent, with what it remembers"
    async with demo_model.running_demo_model() as model:
        provider = Provider("LM Studio", {"LMSTUDIO_BASE_URL": model.base_url}, "lmstudio/")
        with pytest.raises(EmbeddedFailed, match=r"^LETTA_GATEWAY_MODEL is 'lmstudio/none', which is none of: .*lmst"):
            async with running(LocalConfig(tmp_path, provider, "lmstudio/none"), Metrics(), tasks):
                pytest.fail("there is no such model")
    await tasks.close(1)
    assert len(tasks) == 0


# Which model answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handles", "chosen"),
    [
        (["openai/a", "openai/good", "openai/best"], "openai/best"),
        (["openai/a", "openai/good"], "openai/good"),
        (["other/x", "openai/a", "openai/b"], "openai/a"),
    ],
)
def test_first_preferred_model_that_is_offered(handles: list[str], chosen: str) -> None:
    assert _choose(handles, OPENAI, None) == chosen


def test_model_that_is_asked_for() -> None:
    assert _choose(["openai/best", "other/x"], OPENAI, "other/x") == "other/x"


@pytest.mark.parametrize("handles", [[], ["other/x"]])
def test_provider_that_offers_nothing(handles: list[str]) -> None:
    with pytest.raises(EmbeddedFailed, match=r"^OpenAI offers no model: is it running"):
        _choose(handles, OPENAI, None)


def test_model_that_is_not_offered_is_told_with_twenty_that_are() -> None:
    with pytest.raises(EmbeddedFailed) as raised:
        _choose([f"openai/{number}" for number in range(50)], OPENAI, "openai/none")
    assert str(raised.value).count("openai/") == 21


def test_scripted_model_is_an_lm_studio() -> None:
    provider = scripted("http://127.0.0.1:1/v1")
    assert provider.environment == {"LMSTUDIO_BASE_URL": "http://127.0.0.1:1/v1"}
    assert _choose(["lmstudio/zzz", HANDLE], provider, None) == HANDLE


def test_note_names_the_model_of_a_provider(tmp_path: Path) -> None:
    child = EmbeddedLetta(tmp_path, {}, Metrics(), TaskSet())
    assert LocalLetta(child, AGENT, "openai/best", is_scripted=False).note == "openai/best answers"


def test_aside_names_every_provider() -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "OLLAMA_BASE_URL", "LMSTUDIO_BASE_URL"):
        assert name in local.ASIDE


# Which agent ---------------------------------------------------------------------------------------------------------


class Agents(AppServerBackend):
    """A server's agents, and what was asked of them."""

    def __init__(self, *agents: AgentRow) -> None:
        self.agents_there = list(agents)
        self.asked: list[tuple[Any, ...]] = []

    async def rows(self) -> list[AgentRow]:
        return self.agents_there

    async def make_agent(self, body: AgentBody) -> AgentRow:
        self.asked.append(("create", body))
        return AgentRow("agent-new", body.name or "", body.model, body.description)

    async def update_agent(self, agent_id: str, body: AgentBody) -> AgentRow:
        self.asked.append(("update", agent_id, body))
        return AgentRow(agent_id, "renamed by its user", body.model, OURS)


async def test_agent_is_made_where_there_is_none_of_ours() -> None:
    server = Agents(AgentRow("agent-1", AGENT, "openai/a", "somebody's own Milo"))
    assert (await _ensure_agent(server, "openai/b")).id == "agent-new"
    assert server.asked == [("create", AgentBody(name=AGENT, model="openai/b", description=OURS))]


async def test_agent_that_is_ours_is_left_as_it_is() -> None:
    server = Agents(AgentRow("agent-1", "renamed by its user", "openai/a", OURS))
    assert (await _ensure_agent(server, "openai/a")).id == "agent-1"
    assert server.asked == []


async def test_agent_that_is_ours_gets_the_model_that_answers_today() -> None:
    server = Agents(AgentRow("agent-0", "x", "openai/a", None), AgentRow("agent-1", AGENT, "lmstudio/demo", OURS))
    assert (await _ensure_agent(server, "openai/a")).model == "openai/a"
    assert server.asked == [("update", "agent-1", AgentBody(model="openai/a"))]


# What goes wrong -----------------------------------------------------------------------------------------------------


async def test_letta_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens, and takes no WebSocket."""
    async with RecordingServer() as server:

        @contextlib.asynccontextmanager
        async def other(
            home: Path, environment: dict[str, str], metrics: Metrics, tasks: TaskSet
        ) -> AsyncIterator[EmbeddedLetta]:
            child = EmbeddedLetta(home, environment, metrics, tasks)
            child._port = server.port
            yield child

        monkeypatch.setattr(local, "running_letta", other)
        with pytest.raises(EmbeddedFailed, match=r"does not answer \(upstream_\w+\); .*letta\.log says why\.$"):
            async with running(LocalConfig(tmp_path), Metrics(), TaskSet()):
                pytest.fail("it cannot answer")
