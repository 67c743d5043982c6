from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.errors import AgentGone, InvalidRequest, MemoryNotFound
from gateway.letta.backend import MemoryBlock
from gateway.letta.rest import RestBackend, RestConfig
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.letta.recording_server import AGENT, RecordingServer, status

GONE = status(404, {"detail": "Agent not found"})


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def backend(server: RecordingServer) -> AsyncIterator[RestBackend]:
    tasks = TaskSet()
    backend = RestBackend(RestConfig(server.url), Metrics(), tasks)
    yield backend
    await tasks.close(1)
    await backend.close()


def row(label: str | None, value: str = "", **fields: Any) -> dict[str, Any]:
    return {"id": f"block-{label}", "label": label, "value": value, "read_only": False, **fields}


async def test_memory_in_the_order_of_labels(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent blocks", status(200, [row("persona", "Bo", read_only=True), row(None),
                                           row("human", "Ann", description="Who.", limit=9)]))  # fmt: skip
    assert await backend.memory(AGENT) == (
        MemoryBlock("human", "Ann", "Who.", 9),
        MemoryBlock("persona", "Bo", is_read_only=True),
    )


async def test_agent_that_is_gone_has_no_memory(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent blocks", GONE)
    with pytest.raises(AgentGone):
        await backend.memory(AGENT)
    with pytest.raises(AgentGone):
        await backend.write_memory(AGENT, "human", "x")


async def test_written_block(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent blocks", status(200, [row("human", "Ann", limit=4)]))
    server.on("write memory", status(200, row("human", "Cleo", limit=4)))
    server.on("conversations", status(200, [{"id": "conv-1"}]))
    assert await backend.write_memory(AGENT, "human", "Cleo") == MemoryBlock("human", "Cleo", limit=4)
    (written,) = server.asked("write memory")
    assert written.path.endswith(f"/agents/{AGENT}/core-memory/blocks/human")
    assert written.json() == {"value": "Cleo"}
    assert server.asked("conversations")[0].query["agent_id"] == AGENT


async def test_text_that_is_longer_than_its_block(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent blocks", status(200, [row("human", "Ann", limit=4)]))
    with pytest.raises(InvalidRequest, match="at most 4") as refused:
        await backend.write_memory(AGENT, "human", "Cleon")
    assert refused.value.param == "value"
    assert server.asked("write memory") == []


@pytest.mark.parametrize("label", ["nothing", "", "../persona"])
async def test_block_that_is_not_there(server: RecordingServer, backend: RestBackend, label: str) -> None:
    server.on("agent blocks", status(200, [row("human")]))
    with pytest.raises(MemoryNotFound):
        await backend.write_memory(AGENT, label, "x")
    assert server.asked("write memory") == []


async def test_block_that_goes_meanwhile(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent blocks", status(200, [row("human")]))
    with pytest.raises(MemoryNotFound):
        await backend.write_memory(AGENT, "human", "x")
    assert server.asked("conversations") == []
