import asyncio
from collections.abc import AsyncIterator
from typing import Final

import msgspec
import pytest

from gateway.errors import UpstreamInvalid
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_bridge import LONGEST_NAME, TAG, Loan, bridge_name
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import ClientTool
from tests.letta.recording_server import AGENT, TOOL, Answer, RecordingServer, status

OTHER_AGENT: Final = "agent-00000000-0000-4000-8000-000000000009"
GONE: Final = status(404, {"detail": "not found"})
GIVEN_BACK: Final = ["approval of a tool", "detach tool", "delete tool"]


def tool(name: str, description: str = "", schema: bytes = b"{}") -> ClientTool:
    return ClientTool(name, description, msgspec.Raw(schema))


WEATHER: Final = tool("weather", "The weather.", b'{"type":"object"}')
CLOCK: Final = tool("clock")


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def backend(server: RecordingServer) -> AsyncIterator[RestBackend]:
    backend = RestBackend(RestConfig(server.url), Metrics(), TaskSet())
    yield backend
    await backend.close()


def asked(server: RecordingServer) -> list[str]:
    """Return what was asked since the last time."""
    kinds: list[str] = [request.kind for request in server.requests]
    server.requests.clear()
    return kinds


async def lent(backend: RestBackend, *tools: ClientTool, agent_id: str = AGENT) -> Loan:
    loan = Loan(backend.bridge, agent_id)
    await backend.bridge.lend(loan, agent_id, tools)
    return loan


@pytest.mark.parametrize("name", ["weather", "get-weather", "2nd_try", "x" * 64, "class"])
def test_name_is_one_that_python_and_openai_take(name: str) -> None:
    named = bridge_name(tool(name))
    assert named.isidentifier()
    assert len(named) <= LONGEST_NAME


def test_name_tells_contents_apart() -> None:
    tools = [tool("a-b"), tool("a_b"), tool("a_b", "x"), tool("a_b", "", b"[]"), tool("y" * 63 + "a"), tool("y" * 64)]
    assert len({bridge_name(tool) for tool in tools}) == len(tools)
    assert bridge_name(tool("a-b")) == bridge_name(tool("a-b"))


async def test_tools_are_attached_for_a_turn_and_deleted_after_it(
    server: RecordingServer, backend: RestBackend
) -> None:
    loan = await lent(backend, WEATHER, CLOCK)
    body = server.asked("upsert tool")[0].json()
    name = bridge_name(WEATHER)
    assert body["json_schema"] == {"name": name, "description": "The weather.", "parameters": {"type": "object"}}
    assert body["default_requires_approval"] is True
    assert body["source_code"].startswith(f"def {name}(")
    assert body["tags"][0] == TAG
    assert asked(server) == ["tools", *["upsert tool", "attach tool"] * 2]
    await loan.give_back()
    assert asked(server) == GIVEN_BACK * 2
    await loan.give_back()
    assert asked(server) == []


async def test_turns_share_tools(server: RecordingServer, backend: RestBackend) -> None:
    first = await lent(backend, WEATHER)
    asked(server)
    second, elsewhere = await lent(backend, WEATHER), await lent(backend, WEATHER, agent_id=OTHER_AGENT)
    assert asked(server) == ["attach tool"]
    await first.give_back()
    assert asked(server) == []
    await second.give_back()
    assert asked(server) == ["approval of a tool", "detach tool"]
    await elsewhere.give_back()
    assert asked(server) == GIVEN_BACK


async def test_turns_that_overlap_change_an_agent_one_after_the_other(
    server: RecordingServer, backend: RestBackend
) -> None:
    loans = await asyncio.gather(*(lent(backend, WEATHER, CLOCK) for _ in range(5)))
    assert asked(server) == ["tools", *["upsert tool", "attach tool"] * 2]
    await asyncio.gather(*(loan.give_back() for loan in loans))
    assert asked(server) == GIVEN_BACK * 2


async def test_failure_halfway_is_given_back(server: RecordingServer, backend: RestBackend) -> None:
    server.on("attach tool", status(200, {}), status(500))
    loan = Loan(backend.bridge, AGENT)
    with pytest.raises(UpstreamInvalid):
        await backend.bridge.lend(loan, AGENT, (WEATHER, CLOCK))
    assert loan.names == [bridge_name(WEATHER)]
    asked(server)
    await loan.give_back()
    assert asked(server) == GIVEN_BACK


@pytest.mark.parametrize("answer", [GONE, status(400), status(500), status(503)])
async def test_giving_back_goes_on_past_failures(server: RecordingServer, backend: RestBackend, answer: Answer) -> None:
    loan = await lent(backend, WEATHER, CLOCK)
    asked(server)
    for kind in ("approval of a tool", "detach tool", "delete tool"):
        server.on(kind, answer)
    await loan.give_back()
    assert asked(server)[:5] == (GIVEN_BACK * 2)[:5]  # five failures in a row open the breaker


async def test_what_could_not_be_given_back_is_cleaned_before_the_next_loan(
    server: RecordingServer, backend: RestBackend
) -> None:
    loan = await lent(backend, WEATHER)
    tags = server.asked("upsert tool")[0].json()["tags"]
    server.on("delete tool", status(500), status(200, {}))
    await loan.give_back()
    server.on("tools", status(200, [{"id": TOOL, "tags": tags}]), status(200, []))
    asked(server)
    again = await lent(backend, WEATHER)
    assert asked(server) == ["tools", "delete tool", "upsert tool", "attach tool"]
    await again.give_back()


async def test_tool_that_somebody_deleted_is_made_again(server: RecordingServer, backend: RestBackend) -> None:
    await lent(backend, WEATHER)
    server.on("attach tool", GONE, status(200, {}))
    asked(server)
    await lent(backend, WEATHER, agent_id=OTHER_AGENT)
    assert asked(server) == ["attach tool", "upsert tool", "attach tool"]


async def test_what_a_crash_left_is_cleaned_up(server: RecordingServer, backend: RestBackend) -> None:
    loan = await lent(backend, WEATHER)
    mine = server.asked("upsert tool")[0].json()["tags"]
    now = int(mine[1].rpartition(":")[2])
    left = [
        {"id": TOOL, "name": "in_use", "tags": mine},
        {"id": "tool-1", "name": "mine", "tags": mine},
        {"id": "tool-2", "name": "another_gateways", "tags": [TAG, f"{TAG}:host:{now}"]},
        {"id": "tool-3", "name": "another_gateways_long_ago", "tags": [TAG, f"{TAG}:host:{now - 4_000}"]},
        {"id": "tool-4", "name": "somebodys", "tags": ["mine", TAG, f"{TAG}:host:soon"]},
        {"id": "tool-5", "name": "without", "tags": None},
    ]
    server.on("tools", status(200, left))
    asked(server)
    await backend.clean_up()
    assert [request.path.rstrip("/").rpartition("/")[2] for request in server.asked("delete tool")] == [
        "tool-1",
        "tool-3",
    ]
    await loan.give_back()
