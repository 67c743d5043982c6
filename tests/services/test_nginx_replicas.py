"""Two gateways behind nginx: a chat keeps its gateway, and a gateway that goes takes no request with it."""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest

from tests.bench import upstream
from tests.bench.frames import agent_name
from tests.bench.processes import free_port
from tests.server.running import JSON, chat_body, serving, settings
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.server.wire import Connection, request
from tests.services.nginx import KEY, PROXY, Nginx, nginx

CLIENTS: Final = 100
KEYS: Final = tuple(f"sk-client-{number}" for number in range(CLIENTS))


def gateway_of(running: Nginx) -> str:
    """Return which gateway answered last."""
    return str(running.requests[-1]["gateway"])


SAME_CHAT: Final[dict[str, tuple[Callable[[int], dict[str, str]], Callable[[int], dict[str, str]]]]] = {
    "a chat key, whoever asks": (
        lambda n: {"X-Letta-Chat-Key": f"chat-{n}", **KEY},
        lambda n: {"X-Letta-Chat-Key": f"chat-{n}", "X-Api-Key": f"sk-{n}", "X-OpenWebUI-Chat-Id": "other"},
    ),
    "a chat of Open WebUI": (
        lambda n: {"X-OpenWebUI-Chat-Id": f"chat-{n}", **KEY},
        lambda n: {"X-OpenWebUI-Chat-Id": f"chat-{n}", "X-Letta-Chat-Key": ""},
    ),
    "a key": (lambda n: {"Authorization": f"Bearer sk-{n}"}, lambda n: {"Authorization": f"Bearer sk-{n}"}),
    "a key in the other header": (lambda n: {"X-Api-Key": f"sk-{n}"}, lambda n: {"X-Api-Key": f"sk-{n}"}),
}


@pytest.mark.parametrize(("first", "again"), SAME_CHAT.values(), ids=SAME_CHAT.keys())
async def test_the_same_chat_goes_to_the_same_gateway(
    tmp_path: Path, first: Callable[[int], dict[str, str]], again: Callable[[int], dict[str, str]]
) -> None:
    async with serving(settings()) as one, serving(settings()) as two, nginx(tmp_path, one.port, two.port) as running:
        found = []
        for number in range(20):
            await running.ask("GET", "/v1/models", first(number))
            found.append(gateway_of(running))
            await running.ask("GET", "/v1/models", again(number), source="127.0.0.2")
            assert gateway_of(running) == found[-1]
        shares = Counter(found)
    assert set(shares) == {f"127.0.0.1:{port}" for port in (one.port, two.port)}
    assert min(shares.values()) >= 3, shares


async def test_who_names_no_chat_and_no_key_stays_by_address(tmp_path: Path) -> None:
    async with serving(settings()) as one, serving(settings()) as two, nginx(tmp_path, one.port, two.port) as running:
        found: dict[str, set[str]] = {}
        for number in range(2, 22):
            source = f"127.0.0.{number}"
            for _ in range(2):
                await running.ask("GET", "/health", source=source)
                found.setdefault(source, set()).add(gateway_of(running))
    assert all(len(gateways) == 1 for gateways in found.values())
    assert len(set.union(*found.values())) == 2


# Gateways that go ----------------------------------------------------------------------------------------------------


class Client:
    """Who keeps a connection to nginx, an API key and an agent of its own."""

    def __init__(self, running: Nginx, number: int) -> None:
        self._running = running
        self._number = number
        self._connection: Connection | None = None
        self._stack = contextlib.AsyncExitStack()
        self.answers: list[tuple[int, str]] = []
        self.connected = 0

    async def say(self) -> None:
        """Send a message; on the connection that is there, or on a new one where nginx has closed it."""
        if self._connection is None:
            self._connection = await self._stack.enter_async_context(self._running.connect())
            self.connected += 1
        headers = {**JSON, "Authorization": f"Bearer {KEYS[self._number]}"}
        body = chat_body("Hi", model=agent_name(self._number))
        await self._connection.send(request("POST", "/v1/chat/completions", headers, body))
        answer = await self._connection.answer()
        self.answers.append((answer.status, "" if answer.status == 200 else str(answer.code)))
        if answer.header("connection") == "close":
            await self.leave()

    async def leave(self) -> None:
        """Close the connection."""
        self._connection = None
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def clients(running: Nginx) -> AsyncIterator[list[Client]]:
    """Let all of them say something, and keep their connections."""
    crowd = [Client(running, number) for number in range(CLIENTS)]
    try:
        await all_say(crowd)
        yield crowd
    finally:
        for client in crowd:
            await client.leave()


async def all_say(crowd: list[Client]) -> None:
    async with asyncio.TaskGroup() as group:
        for client in crowd:
            group.create_task(client.say())


class Letta:
    """A Letta server with an agent for each client; ``heard`` counts the messages."""

    def __init__(self, port: int, played: upstream.Upstream) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._played = played

    @property
    def heard(self) -> int:
        """Return how many messages came."""
        return self._played.serial


@contextlib.asynccontextmanager
async def letta_server() -> AsyncIterator[Letta]:
    played = upstream.Upstream(upstream.Plan(events=2, interval=0.0), CLIENTS)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: upstream.Connection(played), "127.0.0.1", 0, backlog=4_096)
    try:
        yield Letta(server.sockets[0].getsockname()[1], played)
    finally:
        server.close()


def gateway_at(letta: Letta, port: int) -> contextlib.AbstractAsyncContextManager[GatewayProcess]:
    """Run a gateway that knows all of these clients."""
    return gateway_process(
        letta.url,
        LETTA_GATEWAY_PORT=str(port),
        LETTA_GATEWAY_API_KEYS=",".join(KEYS),
        LETTA_GATEWAY_RATE_LIMIT="100000/minute",
    )


async def test_gateway_that_is_killed(tmp_path: Path) -> None:
    """With idle connections to it: whoever asks from then on is answered by the other, and is heard once."""
    ports = free_port(), free_port()
    front_end = {"front_ends": f"{PROXY} 1;"}
    async with (
        letta_server() as letta,
        gateway_at(letta, ports[0]) as one,
        gateway_at(letta, ports[1]),
        nginx(tmp_path, *ports, **front_end) as running,
        clients(running) as crowd,
    ):
        assert Counter(str(line["gateway"]) for line in running.requests).keys() == {
            f"127.0.0.1:{port}" for port in ports
        }
        one.signal(signal.SIGKILL)
        await one.ended()
        for _ in range(2):
            await all_say(crowd)
        said = Counter(answer for client in crowd for answer in client.answers)
        assert said == {(200, ""): 3 * CLIENTS}
        assert letta.heard == 3 * CLIENTS
        assert {str(line["gateway"]).split(", ")[-1] for line in running.requests[-CLIENTS:]} == {
            f"127.0.0.1:{ports[1]}"
        }


async def test_rolling_restart(tmp_path: Path) -> None:
    """F28: a hundred clients with idle connections, who now and then say something while each gateway restarts."""
    ports = free_port(), free_port()
    front_end = {"front_ends": f"{PROXY} 1;"}
    async with (
        letta_server() as letta,
        contextlib.AsyncExitStack() as first,
        contextlib.AsyncExitStack() as second,
        nginx(tmp_path, *ports, **front_end) as running,
    ):
        gateways = [await first.enter_async_context(gateway_at(letta, port)) for port in ports]
        async with clients(running) as crowd:
            over = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for number, client in enumerate(crowd):
                    group.create_task(say_now_and_then(client, number, over))
                for gateway, port in zip(gateways, ports, strict=True):
                    await asyncio.sleep(3)  # as the site file says
                    gateway.signal(signal.SIGTERM)
                    assert await gateway.ended() == 0
                    await asyncio.sleep(0.5)
                    await second.enter_async_context(gateway_at(letta, port))
                await asyncio.sleep(2)
                over.set()
            said = Counter(answer for client in crowd for answer in client.answers)
            assert said.keys() == {(200, "")}, said
            assert said.total() > 5 * CLIENTS
            assert letta.heard == said.total()
            assert sum(client.connected for client in crowd) == CLIENTS, "nobody's connection to nginx was closed"


async def say_now_and_then(client: Client, number: int, over: asyncio.Event) -> None:
    pause = 0.7 + number / CLIENTS
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await over.wait()
        await client.say()
