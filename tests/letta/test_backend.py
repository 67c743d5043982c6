import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.letta.app_server import AppServerBackend
from gateway.letta.app_server_turn import AppServerTurn
from gateway.letta.backend import Agent, AgentBackend, ModelProvider, RunningTurn
from gateway.letta.detect import DetectedBackend
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_turn import RestTurn
from gateway.letta.scripted import ScriptedBackend, ScriptedTurn
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import Text
from tests.said import said_to

TURN = said_to("agent-1", Text("Hi"))


@asynccontextmanager
async def both() -> AsyncIterator[list[AgentBackend]]:
    """Return one backend of each kind, as what they are used as: mypy holds that they fit."""
    rest: AgentBackend = RestBackend(RestConfig("http://127.0.0.1:1"), Metrics(), TaskSet())
    scripted: AgentBackend = ScriptedBackend()
    try:
        yield [rest, scripted]
    finally:
        await rest.close()
        await scripted.close()


def methods(protocol: type) -> dict[str, Any]:
    """Return what a protocol asks for."""
    asked = {name: member for name, member in vars(protocol).items() if inspect.isfunction(member)}
    return {name: member for name, member in asked.items() if not name.startswith("_")}


def test_protocols_ask_for_what_the_design_says() -> None:
    assert set(methods(AgentBackend)) == {
        "agents",
        "find_agents",
        "details",
        "find_tagged",
        "create_agent",
        "delete_agent",
        "delete_provider",
        "set_provider",
        "memory",
        "model",
        "write_memory",
        "spent",
        "turn",
        "new_conversation",
        "delete_conversation",
        "takes_overlays",
        "clean_up",
        "ping",
        "close",
    }
    assert set(methods(RunningTurn)) == {"open", "deliver", "abort", "cancel", "drain", "usage", "close"}
    assert isinstance(vars(RunningTurn)["ended"], property)


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [
        (AgentBackend, RestBackend),
        (AgentBackend, AppServerBackend),
        (AgentBackend, DetectedBackend),
        (AgentBackend, ScriptedBackend),
        (RunningTurn, RestTurn),
        (RunningTurn, AppServerTurn),
        (RunningTurn, ScriptedTurn),
    ],
)
def test_each_kind_has_the_whole_protocol(protocol: type, kind: type) -> None:
    for name, asked in methods(protocol).items():
        given = inspect.getattr_static(kind, name)
        assert inspect.isfunction(given), name
        assert inspect.iscoroutinefunction(given) == inspect.iscoroutinefunction(asked), name
        assert list(inspect.signature(given).parameters) == list(inspect.signature(asked).parameters), name
    if protocol is RunningTurn:
        assert isinstance(inspect.getattr_static(kind, "ended"), property)


async def test_nothing_waits_at_first() -> None:
    async with both() as backends:
        assert [backend.parked for backend in backends] == [0, 0]


async def test_turn_that_was_never_opened_costs_nothing() -> None:
    async with both() as backends:
        for backend in backends:
            running: RunningTurn = backend.turn(TURN)
            assert running.ended
            running.close()


async def test_each_turn_is_a_new_one() -> None:
    async with both() as backends:
        for backend in backends:
            first, second = backend.turn(TURN), backend.turn(TURN)
            assert first is not second
            first.close()
            second.close()


def test_agents_are_compared_by_what_they_are() -> None:
    assert Agent("agent-1", "friend", 7) == Agent("agent-1", "friend", 7)
    assert Agent("agent-1", "friend", 7) != Agent("agent-2", "friend", 7)
    with pytest.raises(AttributeError):
        setattr(Agent("agent-1", "friend", 7), "name", "foe")  # noqa: B010 - mypy knows that it cannot be


def test_provider_shows_its_key_to_nobody() -> None:
    assert "sk-secret" not in repr(ModelProvider("ann", "http://billing.invalid/v1", "sk-secret"))
