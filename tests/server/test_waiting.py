"""A gateway whose PostgreSQL is not there yet; with a real one that comes and goes: tests/faults/test_postgres.py."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from gateway.server import waiting
from gateway.server.waiting import opened
from gateway.storage.address import PostgresServer
from gateway.storage.engine import Database, StorageLimits
from gateway.storage.failures import StorageFailed
from tests.live.processes import free_port
from tests.server.recorded_logs import recorded_logs
from tests.server.running import chat_request
from tests.server.service_manager import told
from tests.server.subprocesses import PATIENCE, GatewayProcess, gateway_process
from tests.server.wire import ask, connect, request, until

KEY: Final = {"Authorization": "Bearer sk-operator"}
ORIGIN: Final = "https://app.example.com"


@contextlib.asynccontextmanager
async def waiting_gateway(database: int, **environment: str) -> AsyncIterator[GatewayProcess]:
    """Run a gateway whose database is to be at a port of this machine, until it listens."""
    env = {
        "LETTA_GATEWAY_DATABASE_URL": f"postgresql://me:hunter2@127.0.0.1:{database}/gateway",
        "SECRET_KEY": "a secret of the tests, 32 characters",
        "LETTA_GATEWAY_PORT": str(free_port()),
        "LETTA_GATEWAY_OPERATOR_KEY": "sk-operator",
        "LETTA_GATEWAY_TRUSTED_NETWORKS": "none",
        **environment,
    }
    async with gateway_process("http://127.0.0.1:9", serves=False, env=env) as gateway:
        gateway.port = int(env["LETTA_GATEWAY_PORT"])
        async with asyncio.timeout(PATIENCE):
            while not _listens(gateway.port):
                assert gateway.process.returncode is None, gateway.errors
                await asyncio.sleep(0.02)
        yield gateway


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_process_lives_and_is_not_ready_and_answers_503() -> None:
    async with waiting_gateway(free_port()) as gateway:
        assert (await gateway.ask("GET", "/health")).status == 200
        ready = await gateway.ask("GET", "/ready", KEY)
        assert ready.status == 503
        assert ready.json()["status"] == "not_ready"
        assert ready.json()["dependencies"]["database"]["code"] == "storage_unavailable"
        assert (await gateway.ask("GET", "/ready")).json() == {"status": "not_ready"}
        for method, path in (("GET", "/v1/models"), ("DELETE", "/api/v1/user"), ("GET", "/ui"), ("GET", "/")):
            answer = await gateway.ask(method, path)
            assert (answer.status, answer.code) == (503, "storage_unavailable"), path
            assert answer.header("retry-after")
            assert answer.header("x-should-retry") == "true"
            assert answer.header("x-request-id")
        async with connect(gateway.port) as client:
            await client.send(chat_request())
            assert (await client.answer()).status == 503
            assert await client.closed(), "the next request is to meet a gateway that serves"
        figures = await gateway.ask("GET", "/metrics", KEY)
        assert 'letta_gateway_dependency_up{dependency="database"} 0.0' in figures.body.decode()
        assert (await gateway.ask("GET", "/metrics")).status == 403
    assert gateway.errors.count("waiting for the database") == 1, "and not for each try"
    assert "cannot be reached: check its host and port" in gateway.errors
    assert "hunter2" not in gateway.errors


async def test_port_for_figures_is_there_meanwhile() -> None:
    figures = free_port()
    async with waiting_gateway(free_port(), LETTA_GATEWAY_METRICS_PORT=str(figures)):
        await until(lambda: _listens(figures))
        assert (await ask(figures, "GET", "/health")).status == 200
        assert (await ask(figures, "GET", "/ready")).status == 503
        assert b"letta_gateway_dependency_up" in (await ask(figures, "GET", "/metrics")).body


async def test_web_page_of_an_origin_that_is_allowed_reads_the_503() -> None:
    async with waiting_gateway(free_port(), LETTA_GATEWAY_CORS_ORIGINS=ORIGIN) as gateway:
        async with connect(gateway.port) as client:
            asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
            await client.send(request("OPTIONS", "/v1/chat/completions", asked))
            assert (await client.answer()).status == 204
        answer = await gateway.ask("GET", "/v1/models", {"Origin": ORIGIN})
        assert (answer.status, answer.header("access-control-allow-origin")) == (503, ORIGIN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_waiting(number: signal.Signals) -> None:
    async with waiting_gateway(free_port()) as gateway:
        started = time.monotonic()
        gateway.signal(number)
        assert await gateway.ended() == 0
        assert time.monotonic() - started < 5
    assert "Traceback" not in gateway.errors


async def test_systemd_hears_that_it_waits_and_does_not_take_it_for_ready(tmp_path: Path) -> None:
    """Or the next of several gateways would be restarted while this one serves nobody yet."""
    with told(str(tmp_path / "notify")) as systemd:
        environment = {"NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "200000"}
        async with waiting_gateway(free_port(), **environment):
            assert await systemd.next() == {"STATUS": "Waiting for the database"}
            await asyncio.sleep(0.5)
            assert systemd.so_far() == []


async def test_port_that_is_taken_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with waiting_gateway(free_port(), LETTA_GATEWAY_PORT=str(port)) as gateway:
            assert await gateway.ended() == 2
        assert f"cannot listen on 127.0.0.1:{port}" in gateway.errors


async def test_what_does_not_pass_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def fail(address: PostgresServer, limits: StorageLimits) -> Database:
        nonlocal tries
        _ = address, limits
        tries += 1
        raise StorageFailed("as it is", passes=tries < 4)

    monkeypatch.setattr(Database, "open", fail)
    monkeypatch.setattr(waiting, "AGAIN", 0.01)
    with recorded_logs() as logs, pytest.raises(StorageFailed, match="as it is"):
        async with asyncio.timeout(5):
            await opened(PostgresServer("postgresql://host/gateway"), StorageLimits())
    assert tries == 4
    assert [line["event"] for line in logs.lines] == ["waiting for the database"]
