import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.errors import UpstreamUnavailable
from gateway.letta import app_server_spent
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_spent import WITH_FILES
from gateway.letta.app_server_threads import MOVED
from gateway.letta.app_server_wire import iso_time
from gateway.letta.backend import SentTurn
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from tests.letta.fake_app_server import AGENT, HOME, Exchange, FakeAppServer, conversation_row, replies

NOW = 1_795_219_200.0
SENT = SentTurn("mark-1", AGENT, None, NOW)
CHAT = SentTurn("mark-1", AGENT, "local-conv-8", NOW)


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        server.agents[AGENT]["tags"] = [WITH_FILES]
        server.conversations.append(conversation_row("local-conv-8", AGENT, None))
        yield server


@pytest.fixture
async def backend(server: FakeAppServer) -> AsyncIterator[AppServerBackend]:
    backend = AppServerBackend(AppServerConfig(server.url), Metrics(), TaskSet())
    yield backend
    await backend.close()


def user(otid: str | None, at: float = 1.0) -> dict[str, Any]:
    return {"type": "message", "timestamp": iso_time(NOW + at), "message": {"role": "user", "otid": otid}}


def result(at: float = 1.0) -> dict[str, Any]:
    return {"type": "message", "timestamp": iso_time(NOW + at), "message": {"role": "toolResult"}}


def step(fresh: int, output: int, cached: int = 0, at: float = 1.0) -> dict[str, Any]:
    usage = {"input": fresh, "output": output, "cacheRead": cached, "cacheWrite": 0, "reasoning": 1}
    usage["totalTokens"] = fresh + output + cached
    message = {"role": "assistant", "usage": usage, "content": [{"type": "text", "text": "said"}]}
    return {"type": "message", "timestamp": iso_time(NOW + at), "message": message}


def store(server: FakeAppServer, conversation: str, *entries: dict[str, Any], rest: str = "") -> None:
    name = base64.urlsafe_b64encode(f"conversation:{conversation}".encode()).decode().rstrip("=")
    lines = [{"type": "session", "timestamp": iso_time(NOW)}, *entries]
    text = "".join(json.dumps(line) + "\n" for line in lines) + rest
    server.files[f"{HOME}/conversations/{name}/messages.jsonl"] = text


@pytest.mark.parametrize(("sent", "conversation"), [(SENT, "local-conv-1"), (CHAT, "local-conv-8")])
async def test_steps_behind_the_turns_message(
    server: FakeAppServer, backend: AppServerBackend, sent: SentTurn, conversation: str
) -> None:
    store(server, conversation, user("mark-0.1"), step(1, 1), user("mark-1.1"), step(100, 4), result(), step(6, 3, 94),
          user("mark-2.1"), step(7, 7))  # fmt: skip
    assert await backend.spent(sent) == Usage(200, 7, 94, 2)
    assert server.asked("runtime_start") == server.asked("input") == []


async def test_message_that_was_sent_twice_and_one_that_came_with_results(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    store(server, "local-conv-1", user("mark-1.1"), step(10, 1), result(), user("mark-1.2"), step(20, 2))
    assert await backend.spent(SENT) == Usage(30, 3, 0, 2)


async def test_turn_that_said_nothing_begins_with_its_results(server: FakeAppServer, backend: AppServerBackend) -> None:
    store(server, "local-conv-1", user("mark-0.1", -9), step(1, 1, at=-8), result(1), step(20, 2, at=2), user("x", 3))
    assert await backend.spent(SENT) == Usage(20, 2, 0, 1)


async def test_results_that_come_right_after_their_call(server: FakeAppServer, backend: AppServerBackend) -> None:
    asked = user("mark-0.1", -1.5), step(1, 1, at=-0.5)
    store(server, "local-conv-1", *asked, result(0.1), step(20, 2, at=0.2), user("x", 3), step(5, 5, at=4))
    assert await backend.spent(SENT) == Usage(20, 2, 0, 1)


async def test_results_at_a_server_whose_clock_is_behind(server: FakeAppServer, backend: AppServerBackend) -> None:
    store(server, "local-conv-1", user("mark-0.1", -9), step(1, 1, at=-8), result(-1), step(20, 2, at=-0.5))
    assert await backend.spent(SENT) == Usage(20, 2, 0, 1)


@pytest.mark.parametrize(
    "entries",
    [
        (),
        (user("mark-10.1"), step(1, 1)),
        (user("mark-0.1", -9), result(-8), step(1, 1, at=-7)),
        (user("mark-0.1", -9), step(1, 1, at=1), result(2), step(1, 1, at=3)),
        (user(None), step(1, 1)),
    ],
)
async def test_turn_that_never_came(
    server: FakeAppServer, backend: AppServerBackend, entries: tuple[dict[str, Any], ...]
) -> None:
    store(server, "local-conv-1", *entries)
    assert await backend.spent(SENT) is None


async def test_turn_that_was_cut_off_in_its_first_step(server: FakeAppServer, backend: AppServerBackend) -> None:
    store(server, "local-conv-1", user("mark-1.1"))
    assert await backend.spent(SENT) == Usage(0, 0)


async def test_line_that_is_being_written_just_now(server: FakeAppServer, backend: AppServerBackend) -> None:
    store(server, "local-conv-1", user("mark-1.1"), step(10, 1), rest='{"type":"message","mess')
    assert await backend.spent(SENT) == Usage(10, 1, 0, 1)


async def test_conversation_that_goes_on_in_a_copy(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.conversations[-1]["summary"] = f"{MOVED}local-conv-9"
    server.conversations.append(conversation_row("local-conv-9", AGENT, None))
    store(server, "local-conv-8", user("mark-1.1"))
    store(server, "local-conv-9", user("mark-1.1"), step(10, 1))
    assert await backend.spent(CHAT) == Usage(10, 1, 0, 1)


async def test_file_is_read_on_a_connection_of_its_own(server: FakeAppServer, backend: AppServerBackend) -> None:
    store(server, "local-conv-1", user("mark-1.1"), step(10, 1), rest=" " * 40_000_000)
    await backend.ping()
    before = server.connections
    assert await backend.spent(SENT) == Usage(10, 1, 0, 1)
    assert server.connections == before + 1
    await backend.ping()
    assert server.connections == before + 1


async def test_server_that_keeps_no_files(server: FakeAppServer, backend: AppServerBackend) -> None:
    assert await backend.spent(SENT) is None
    server.on("enable_memfs", replies(memory_directory="C:\\elsewhere"))
    assert await backend.spent(SENT) is None
    server.agents[AGENT]["tags"] = []
    asked = len(server.asked("enable_memfs"))
    assert await backend.spent(SENT) is None
    assert len(server.asked("enable_memfs")) == asked, "no agent gets a memory by being asked for"


async def test_agent_or_conversation_that_is_gone(server: FakeAppServer, backend: AppServerBackend) -> None:
    assert await backend.spent(SentTurn("mark-1", AGENT, "local-conv-none", NOW)) is None
    del server.agents[AGENT]
    assert await backend.spent(SENT) is None


async def test_server_that_is_down(server: FakeAppServer, backend: AppServerBackend) -> None:
    await server.stop()
    with pytest.raises(UpstreamUnavailable):
        await backend.spent(SENT)


async def test_turn_that_goes_on_is_stopped_and_read_once_more(
    server: FakeAppServer, backend: AppServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_spent, "SETTLE", 0.01)
    store(server, "local-conv-1", user("mark-1.1"))

    async def just_over(exchange: Exchange) -> None:
        store(server, "local-conv-1", user("mark-1.1"), step(10, 1))
        await exchange.reply(aborted=True)

    server.on("abort_message", just_over)
    assert await backend.spent(SENT) == Usage(10, 1, 0, 1)
    (asked,) = server.asked("abort_message")
    assert asked["runtime"] == {"agent_id": AGENT, "conversation_id": "local-conv-1"}


async def test_turn_of_another_is_not_stopped(server: FakeAppServer, backend: AppServerBackend) -> None:
    store(server, "local-conv-1", user("mark-1.1"), step(10, 1), user("mark-2.1"))
    assert await backend.spent(SENT) == Usage(10, 1, 0, 1)
    store(server, "local-conv-1", user("mark-2.1"))
    assert await backend.spent(SENT) is None
    assert server.asked("abort_message") == []
