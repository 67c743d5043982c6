import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Final

import pytest

from gateway.errors import GatewayError, UpstreamAuthFailed, UpstreamInvalid, UpstreamTimeout, UpstreamUnavailable
from gateway.letta import detect
from gateway.letta.backend import Agent, AgentBackend, AgentSpec, MemoryBlock, SentTurn
from gateway.letta.detect import DetectedBackend, Kind, kind_at
from gateway.letta.scripted import ScriptedBackend
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import Text
from tests.letta.recording_server import (
    AGENT,
    HEALTH,
    Answer,
    RecordingServer,
    garbage,
    rst,
    silence,
    status,
)
from tests.said import said_to

APP_SERVER: Final = {"server": "letta-code", "letta_code_version": "0.34.12", "backend": "local", "listen": "ws://x"}
FRIEND: Final = Agent(AGENT, "friend", 0)


@contextlib.asynccontextmanager
async def server(info: Answer | None = None, health: Answer | None = None) -> AsyncIterator[RecordingServer]:
    """Run a server that says this of itself; what is not given is not found."""
    async with RecordingServer() as running:
        running.on("unknown", *([] if info is None else [info]), status(404, {"detail": "Not Found"}))
        running.on("health", status(404, {"detail": "Not Found"}) if health is None else health)
        yield running


async def failure(running: RecordingServer | str) -> GatewayError:
    url = running if isinstance(running, str) else running.url
    with pytest.raises(GatewayError) as raised:
        await kind_at(url, None, 0.5)
    return raised.value


# Which it is ---------------------------------------------------------------------------------------------------------


async def test_app_server() -> None:
    async with server(status(200, APP_SERVER)) as running:
        assert await kind_at(running.url, None, 1) == "app_server"
        assert [request.path for request in running.requests] == ["/app-server-info"]


async def test_v1_server() -> None:
    async with server(health=status(200, HEALTH)) as running:
        assert await kind_at(running.url, None, 1) == "rest"
        assert [request.path for request in running.requests] == ["/app-server-info", "/v1/health/"]


@pytest.mark.parametrize("prefix", ["", "/", "/letta", "/letta/"])
async def test_base_url_with_and_without_a_path(prefix: str) -> None:
    async with RecordingServer() as running:
        assert await kind_at(running.url + prefix, None, 1) == "rest"
        base = prefix.rstrip("/")
        assert [request.path for request in running.requests] == [f"{base}/app-server-info", f"{base}/v1/health/"]


async def test_key_goes_along_where_there_is_one() -> None:
    async with RecordingServer() as running:
        await kind_at(running.url, "sk-let", 1)
        await kind_at(running.url, None, 1)
        sent = [request.header("Authorization") for request in running.requests]
        assert sent == ["Bearer sk-let", "Bearer sk-let", None, None]


@pytest.mark.parametrize(
    "info",
    [
        status(200, "<html>a web page for every path</html>", {"Content-Type": "text/html"}),
        status(200, HEALTH),
        status(200, "null"),
        status(200, b"\xff"),
        status(200, b"[" * 60_000),
        status(200, b""),
        status(302, b"", {"Location": "/login"}),
        status(401),
        status(500),
    ],
)
async def test_v1_server_behind_something_that_answers_every_path(info: Answer) -> None:
    async with server(info, status(200, HEALTH)) as running:
        assert await kind_at(running.url, None, 1) == "rest"


async def test_redirection_is_not_followed() -> None:
    async with server(status(302, b"", {"Location": "/v1/health/"}), status(200, APP_SERVER)) as running:
        assert isinstance(await failure(running), UpstreamInvalid)
        assert [request.path for request in running.requests] == ["/app-server-info", "/v1/health/"]


# Neither -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "health",
    [
        status(404),
        status(200, "<html>Welcome to nginx</html>", {"Content-Type": "text/html"}),
        status(200, {"status": "ok"}),
        status(200, {"version": 1, "status": "ok"}),
        status(418),
    ],
)
async def test_neither(health: Answer) -> None:
    async with server(health=health) as running:
        error = await failure(running)
    assert isinstance(error, UpstreamInvalid)
    assert (error.should_retry, "LETTA_BASE_URL" in error.message) == (False, True)


@pytest.mark.parametrize("number", [401, 403])
async def test_key_is_refused(number: int) -> None:
    async with server(status(number), status(number)) as running:
        error = await failure(running)
    assert isinstance(error, UpstreamAuthFailed)
    assert error.should_retry is False


@pytest.mark.parametrize("number", [429, 500, 502, 503, 504])
async def test_proxy_before_a_server_that_is_down(number: int) -> None:
    page = status(number, "<html>Bad Gateway</html>", {"Content-Type": "text/html"})
    async with server(page, page) as running:
        error = await failure(running)
    assert isinstance(error, UpstreamUnavailable)
    assert (error.should_retry, error.retry_after) == (True, 2.0)


@pytest.mark.parametrize("odd", [garbage(), garbage(b"")])
async def test_what_answers_is_no_http(odd: Answer) -> None:
    async with server(odd) as running:
        assert (await failure(running)).status in (502, 503)


async def test_connection_is_reset() -> None:
    async with server() as running:
        running.on("unknown", rst())
        assert isinstance(await failure(running), UpstreamUnavailable)


async def test_connection_is_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        error = await failure(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert isinstance(error, UpstreamUnavailable)
    assert error.should_retry is True


async def test_name_that_does_not_resolve() -> None:
    assert (await failure("http://letta.invalid")).code == "upstream_name_not_resolved"


@pytest.mark.parametrize("hangs_at", ["info", "health"])
async def test_server_that_hangs(hangs_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "TIMEOUT", 0.2)
    async with (
        server(**{hangs_at: silence()}) as running,
        asyncio.timeout(2),
    ):
        error = await failure(running)
    assert isinstance(error, UpstreamTimeout)
    assert error.should_retry is True


# Found once ----------------------------------------------------------------------------------------------------------


class Finder:
    """Finds what it is told, and counts; an error is raised."""

    def __init__(self, *said: Kind | GatewayError) -> None:
        self.said = list(said)
        self.asked = 0

    async def __call__(self) -> Kind:
        self.asked += 1
        await asyncio.sleep(0.01)
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, GatewayError):
            raise said
        return said


class Made:
    """A scripted backend for each kind that is made."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []
        self.backend = ScriptedBackend([FRIEND])

    def __call__(self, kind: Kind) -> AgentBackend:
        self.kinds.append(kind)
        return self.backend


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    tasks = TaskSet()
    yield tasks
    await tasks.close(1.0)
    assert not tasks


@pytest.mark.parametrize("kind", ["rest", "app_server"])
async def test_kind_is_asked_for_once_and_kept(kind: Kind, tasks: TaskSet) -> None:
    find, made = Finder(kind), Made()
    backend = DetectedBackend(find, made, tasks)
    assert await backend.agents() == [FRIEND]
    assert await backend.find_agents("friend") == [FRIEND]
    await backend.ping()
    running = backend.turn(said_to(AGENT, Text("Hi")))
    await running.open()
    running.close()
    await backend.close()
    assert (find.asked, made.kinds, made.backend.pings) == (1, [kind], 1)


async def test_nothing_is_asked_before_it_is_needed(tasks: TaskSet) -> None:
    find = Finder("rest")
    backend = DetectedBackend(find, Made(), tasks)
    await backend.close()
    assert find.asked == 0


async def test_many_ask_at_once(tasks: TaskSet) -> None:
    find, made = Finder("rest"), Made()
    backend = DetectedBackend(find, made, tasks)
    assert await asyncio.gather(*(backend.agents() for _ in range(20))) == [[FRIEND]] * 20
    assert (find.asked, made.kinds) == (1, ["rest"])


async def test_server_that_is_down_is_asked_again(tasks: TaskSet) -> None:
    find, made = Finder(UpstreamUnavailable(), UpstreamTimeout(), "app_server"), Made()
    backend = DetectedBackend(find, made, tasks)
    for error in (UpstreamUnavailable, UpstreamTimeout):
        with pytest.raises(error):
            await backend.ping()
    await backend.ping()
    await backend.ping()
    assert (find.asked, made.kinds) == (3, ["app_server"])


async def test_turn_before_anything_was_found_is_refused(tasks: TaskSet) -> None:
    with pytest.raises(UpstreamUnavailable) as raised:
        DetectedBackend(Finder("rest"), Made(), tasks).turn(said_to(AGENT, Text("Hi")))
    assert raised.value.should_retry is True


async def test_many_ask_at_once_while_the_server_is_down(tasks: TaskSet) -> None:
    find, made = Finder(UpstreamUnavailable(), "rest"), Made()
    backend = DetectedBackend(find, made, tasks)
    said = await asyncio.gather(*(backend.agents() for _ in range(20)), return_exceptions=True)
    assert {type(each) for each in said} == {UpstreamUnavailable}
    assert find.asked == 1
    assert await backend.agents() == [FRIEND]
    assert (find.asked, made.kinds) == (2, ["rest"])


@pytest.mark.parametrize("others", [0, 1])
async def test_client_that_goes_away_while_the_kind_is_found_out(tasks: TaskSet, others: int) -> None:
    find, made = Finder("rest"), Made()
    backend = DetectedBackend(find, made, tasks)
    first = asyncio.get_running_loop().create_task(backend.agents())
    waiting = [asyncio.get_running_loop().create_task(backend.agents()) for _ in range(others)]
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await asyncio.gather(backend.agents(), *waiting) == [[FRIEND]] * (others + 1)
    assert (find.asked, made.kinds) == (1, ["rest"])


async def test_agents_are_made_and_asked_of_what_was_found(tasks: TaskSet) -> None:
    made = Made()
    backend = DetectedBackend(Finder("rest"), made, tasks)
    agent = await backend.create_agent(AgentSpec(name="Bo", blocks=(MemoryBlock("human", "Ann."),), tags=("a",)))
    assert await backend.find_tagged("a") == [agent]
    assert (await backend.write_memory(agent.id, "human", "Cleo.")).value == "Cleo."
    assert await backend.memory(agent.id) == (MemoryBlock("human", "Cleo."),)
    made.backend.spendings["mark-1"] = Usage(1, 2)
    assert await backend.spent(SentTurn("mark-1", agent.id, None, 0.0)) == Usage(1, 2)
    await backend.delete_agent(agent.id)
    assert await backend.find_tagged("a") == []
    assert made.kinds == ["rest"]
