from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.errors import UpstreamInvalid
from gateway.letta import rest_blocks
from gateway.letta.rest import RestBackend, RestConfig
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import Overlay
from tests.letta.recording_server import AGENT, BLOCK, RecordingServer, status

OTHER = "block-00000000-0000-4000-8000-000000000009"
GONE = status(404, {"detail": "not found"})


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RecordingServer]:
    monkeypatch.setattr(rest_blocks, "TAKE_OFF_PAUSES", (0.01, 0.01))
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


def marked(server: RecordingServer, block: str = BLOCK) -> dict[str, Any]:
    """Return the block that was made last, as Letta lists it."""
    (request,) = server.asked("new block")
    return {"id": block, "label": "client_instructions", "metadata": request.json()["metadata"]}


async def test_first_overlay_makes_a_block(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("owner:client", "Be brief. " * 5_000))
    (request,) = server.asked("new block")
    block = request.json()
    assert (block["label"], block["value"], block["limit"]) == ("client_instructions", "Be brief. " * 5_000, 50_000)
    assert block["read_only"] is True
    assert "owner" not in request.body.decode()
    assert asked(server) == ["agent blocks", "blocks", "new block", "attach block", "recompile"]


async def test_same_text_again_changes_no_block(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    row = marked(server)
    server.on("agent blocks", status(200, [row]), status(200, []))
    asked(server)
    await backend.take_off(AGENT)
    assert asked(server) == ["agent blocks", "detach block", "recompile"]
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    assert asked(server) == ["agent blocks", "attach block", "recompile"]


async def test_another_text_changes_the_block_of_its_client(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    asked(server)
    await backend.put_on(AGENT, Overlay("a", "Be kind!!"))
    assert server.asked("change block")[0].json()["value"] == "Be kind!!"
    assert asked(server) == ["agent blocks", "change block", "attach block", "recompile"]
    await backend.put_on(AGENT, Overlay("b", "Be brief."))
    assert asked(server) == ["agent blocks", "blocks", "new block", "attach block", "recompile"]


async def test_block_is_found_again_after_a_restart(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    row = marked(server)
    tag = server.asked("new block")[0].json()["tags"][1]
    restarted = RestBackend(RestConfig(server.url), Metrics(), TaskSet())
    server.on("blocks", status(200, [row]))
    asked(server)
    await restarted.put_on(AGENT, Overlay("a", "Be brief."))
    assert server.asked("blocks")[0].query["tags"] == tag
    assert asked(server) == ["agent blocks", "blocks", "attach block", "recompile"]
    await restarted.close()


async def test_what_a_crash_left_on_the_agent(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    row = marked(server)
    left = {**row, "id": OTHER, "metadata": {"letta_gateway": {"key": "x", "hash": "y"}}}
    foreign = [{"id": "block-1", "label": "human", "metadata": None}, {"id": "block-2", "metadata": {"a": [1]}}]
    server.on("agent blocks", status(200, [*foreign, left, row]))
    asked(server)
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    (request,) = server.asked("detach block")
    assert OTHER in request.path
    assert asked(server) == ["agent blocks", "detach block", "recompile"]


async def test_block_that_somebody_deleted_is_made_again(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    asked(server)
    server.on("change block", GONE)
    await backend.put_on(AGENT, Overlay("a", "Be kind."))
    assert asked(server) == ["agent blocks", "change block", "new block", "attach block", "recompile"]
    server.on("attach block", GONE, status(200, {}))
    await backend.put_on(AGENT, Overlay("a", "Be kind."))
    assert asked(server) == ["agent blocks", "attach block", "blocks", "new block", "attach block", "recompile"]


async def test_taking_off_is_tried_again(server: RecordingServer, backend: RestBackend) -> None:
    await backend.put_on(AGENT, Overlay("a", "Be brief."))
    row = marked(server)
    server.on("agent blocks", status(500), status(200, [row]))
    server.on("detach block", status(503), GONE)
    asked(server)
    await backend.take_off(AGENT)
    assert asked(server) == [
        "agent blocks",
        *("agent blocks", "detach block"),
        *("agent blocks", "detach block", "recompile"),
    ]
    server.on("agent blocks", status(500))
    with pytest.raises(UpstreamInvalid):
        await backend.take_off(AGENT)


async def test_agent_that_is_gone_has_no_overlay(server: RecordingServer, backend: RestBackend) -> None:
    server.on("agent blocks", GONE)
    await backend.take_off(AGENT)
    assert asked(server) == ["agent blocks"]
