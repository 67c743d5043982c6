import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]
import pytest

from gateway.errors import UpstreamUnavailable
from gateway.letta.backend import Capabilities
from gateway.letta.scripted import ScriptedBackend
from gateway.server.serve import AFTER_GRACE, StartFailed, _check_kind, banner
from gateway.storage.address import PostgresServer
from gateway.storage.opening import has_wal_reset_bug
from tests.live.postgres import Postgres
from tests.live.processes import free_port
from tests.server.running import chat_request, local_letta, settings
from tests.server.service_manager import told
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.server.upstream import Upstream
from tests.server.wire import Answer, Connection, ask

SHORT = {"LETTA_GATEWAY_GRACE": "0.3"}


@contextlib.asynccontextmanager
async def streaming(**environment: str) -> AsyncIterator[tuple[GatewayProcess, Upstream, Connection]]:
    """Run a gateway in the middle of a stream, whose end the upstream's gate holds back."""
    async with Upstream() as letta, gateway_process(letta.url, env=environment) as gateway, gateway.connect() as client:
        letta.gate.clear()
        await client.send(chat_request(stream=True))
        assert (await client.head()).status == 200
        yield gateway, letta, client


async def rest(client: Connection) -> Answer:
    """Read a stream to its end; raises where that is not a clean one."""
    async with asyncio.timeout(10):
        return Answer(200, [], b"".join([piece async for piece in client.pieces()]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signal_while_idle(number: signal.Signals) -> None:
    async with Upstream() as letta, gateway_process(letta.url) as gateway, gateway.connect() as idle:
        assert (await gateway.ask("GET", "/ready")).status == 200
        started = time.monotonic()
        gateway.signal(number)
        assert await gateway.ended() == 0
        assert time.monotonic() - started < 1
        assert await idle.closed()
    assert "Traceback" not in gateway.errors


async def test_signal_in_the_middle_of_a_stream() -> None:
    async with streaming() as (gateway, letta, client):
        gateway.signal(signal.SIGTERM)
        await gateway.says('"draining"')
        ready = await gateway.ask("GET", "/ready")
        assert (ready.status, ready.json()) == (503, {"status": "draining"})
        assert (await gateway.ask("GET", "/health")).status == 200
        assert (await gateway.ask("GET", "/v1/models")).status == 200, "who still comes is served"
        letta.gate.set()
        answer = await rest(client)
        assert await gateway.ended() == 0
    assert answer.events[-1] == "[DONE]"
    assert letta.cancelled == 0


async def test_grace_is_over() -> None:
    async with streaming(**SHORT) as (gateway, letta, client):
        started = time.monotonic()
        gateway.signal(signal.SIGTERM)
        answer = await rest(client)
        assert await gateway.ended() == 0
        assert 0.25 < time.monotonic() - started < 3
    assert answer.events[-1]["error"]["code"] == "shutting_down", gateway.errors
    assert "[DONE]" not in answer.events
    assert letta.cancelled == 1
    assert "Traceback" not in gateway.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal(number: signal.Signals) -> None:
    async with streaming(LETTA_GATEWAY_GRACE="600") as (gateway, letta, client):
        gateway.signal(signal.SIGTERM)
        await gateway.says('"draining"')
        started = time.monotonic()
        gateway.signal(number)
        answer = await rest(client)
        assert await gateway.ended() == 0
        assert time.monotonic() - started < 2
    assert answer.events[-1]["error"]["code"] == "shutting_down", gateway.errors
    assert letta.cancelled == 1


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.45])
async def test_signal_while_starting(delay: float) -> None:
    async with Upstream() as letta, gateway_process(letta.url, serves=False) as gateway:
        await asyncio.sleep(delay)
        started = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 1.5
    assert "Traceback" not in gateway.errors


async def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name in ("LETTA_GATEWAY_PORT", "LETTA_GATEWAY_METRICS_PORT"):
            async with gateway_process("http://127.0.0.1:9", serves=False, env={name: port}) as gateway:
                assert await gateway.ended() == 2
            (line,) = gateway.errors.splitlines()
            assert line.startswith("letta-gateway: cannot listen on 127.0.0.1")
            assert port in line
            assert "in use" in line


async def test_metrics_port() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with Upstream() as letta, gateway_process(letta.url, LETTA_GATEWAY_METRICS_PORT=str(port)) as gateway:
        metrics = await ask(port, "GET", "/metrics")
        assert (metrics.status, b"letta_gateway_open_streams" in metrics.body) == (200, True)
        assert (await ask(port, "GET", "/v1/models")).code == "unknown_url"
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0


async def test_no_secret_in_any_line_figure_or_answer() -> None:
    keys = {
        "LETTA_API_KEY": "sk-canary-letta",
        "LETTA_GATEWAY_API_KEYS": "sk-canary-one,sk-canary-two",
        "LETTA_GATEWAY_OPERATOR_KEY": "sk-canary-operator",
    }
    async with Upstream() as letta, gateway_process(letta.url, LOG_LEVEL="DEBUG", env=keys) as gateway:
        known = {"Authorization": "Bearer sk-canary-one"}
        said = [
            await gateway.ask("GET", "/v1/models", known),
            await gateway.ask("GET", "/v1/models?api_key=sk-canary-two", {"X-Api-Key": "sk-canary-guess"}),
            await gateway.ask("GET", "/sk-canary-path", known),
            await gateway.ask(
                "GET",
                "/v1/models",
                [("Authorization", b"Bearer sk-canary-\xff")],
            ),
            await gateway.ask("GET", "/metrics", {"X-Api-Key": "sk-canary-operator"}),
            await gateway.ask("GET", "/ready", {"X-Api-Key": "sk-canary-operator"}),
            await gateway.ask("GET", "/v1/models", [("Authorization", b"Bearer sk-canary-\x00")]),
            await gateway.ask("GET", "/v1/models", {"Expect": "sk-canary-expect"}),
        ]
        async with gateway.connect() as client:
            await client.send(chat_request(stream=True, headers=known))
            said.append(await client.answer())
        assert letta.secrets
        assert set(letta.secrets) == {"Bearer sk-canary-letta"}, "what the server itself needs, and only that"
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
    for answer in said:
        assert "canary" not in str(answer)
    assert "canary" not in gateway.errors + gateway.output
    assert "canary" not in repr(settings(letta_api_key="canary", api_keys=("canary",), operator_key="canary"))
    banner_lines = 2
    for line in gateway.errors.splitlines()[banner_lines:]:
        msgspec.json.decode(line)


async def test_few_descriptors_and_many_connections() -> None:
    """The gateway sheds turns, throws idle connections out, and is alive all along."""
    async with (
        Upstream() as letta,
        gateway_process(letta.url, descriptors=256, env={"LETTA_GATEWAY_QUEUE_DEPTH": "500"}) as gateway,
    ):
        letta.gate.clear()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(300):
                await stack.enter_async_context(gateway.connect())
            for path in ("/health", "/ready", "/v1/models"):
                assert (await gateway.ask("GET", path)).status == 200
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(gateway.connect()) for _ in range(100)]
            for client in clients:
                await client.send(chat_request(stream=False))
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.2)
            refused = await gateway.ask("GET", "/health")
            assert refused.status == 200, "while every turn is taken"
            shed = [client for client in clients if client.reader._buffer]  # type: ignore[attr-defined, unused-ignore]
            answers = [await client.answer() for client in shed]
            assert len(answers) >= 15
            assert {(answer.status, answer.code) for answer in answers} == {(503, "overloaded")}
            assert {answer.header("x-should-retry") for answer in answers} == {"true"}
            letta.gate.set()
            served = [await client.answer() for client in clients if client not in shed]
            assert {answer.status for answer in served} == {200}
        assert (await gateway.ask("GET", "/health")).status == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
    assert "Traceback" not in gateway.errors


# What systemd is told ------------------------------------------------------------------------------------------------


async def test_systemd_is_told_of_a_life(tmp_path: Path) -> None:
    """Ready when it answers and not before; a beat while the loop turns; and the end as soon as it begins."""
    with told(str(tmp_path / "notify")) as systemd:
        environment = {"NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "400000", "LETTA_GATEWAY_GRACE": "45"}
        async with streaming(**environment) as (gateway, letta, client):
            ready = await systemd.next()
            assert ready == {"READY": "1", "STATUS": f"Serving 127.0.0.1, port {gateway.port}"}
            for _ in range(3):
                assert await systemd.next() == {"WATCHDOG": "1"}
            gateway.signal(signal.SIGTERM)
            stopping = await systemd.next()
            while "STOPPING" not in stopping:
                assert stopping == {"WATCHDOG": "1"}
                stopping = await systemd.next()
            assert stopping["STATUS"] == "Draining: open turns have 45 s to finish"
            assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= (45 + AFTER_GRACE) * 1_000_000
            assert await systemd.next() == {"WATCHDOG": "1"}, "while it drains"
            letta.gate.set()
            await rest(client)
            assert await gateway.ended() == 0


async def test_systemd_is_told_nothing_before_the_gateway_answers(tmp_path: Path) -> None:
    with told(str(tmp_path / "notify")) as systemd:
        environment = {"NOTIFY_SOCKET": systemd.name, "LETTA_GATEWAY_PORT": str(free_port())}
        port = int(environment["LETTA_GATEWAY_PORT"])
        async with Upstream() as letta, gateway_process(letta.url, serves=False, env=environment) as gateway:
            early = 0
            while not (said := systemd.so_far()):
                with contextlib.suppress(OSError):
                    early += (await ask(port, "GET", "/health")).status == 200
                await asyncio.sleep(0.005)
            assert said[0]["READY"] == "1"
            assert (await ask(port, "GET", "/health")).status == 200
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
    assert early <= 20, "and it is told soon"


async def test_systemd_hears_no_beat_of_a_process_that_hangs(tmp_path: Path) -> None:
    with told(str(tmp_path / "notify")) as systemd:
        environment = {"NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "200000"}
        async with Upstream() as letta, gateway_process(letta.url, env=environment) as gateway:
            await systemd.next()
            assert await systemd.next() == {"WATCHDOG": "1"}
            gateway.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            systemd.so_far()
            await asyncio.sleep(0.5)
            assert systemd.so_far() == []
            gateway.signal(signal.SIGCONT)
            assert await systemd.next() == {"WATCHDOG": "1"}


async def test_systemd_hears_the_beat_while_nothing_else_answers(tmp_path: Path) -> None:
    """Letta is dead: that is for readiness to say, and no reason to be restarted."""
    with told(str(tmp_path / "notify")) as systemd:
        environment = {"NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "200000"}
        async with gateway_process("http://127.0.0.1:9", env=environment) as gateway:
            assert (await gateway.ask("GET", "/ready")).status == 503
            await systemd.next()
            for _ in range(5):
                assert await systemd.next() == {"WATCHDOG": "1"}


async def test_systemd_is_not_told_of_a_start_that_fails(tmp_path: Path) -> None:
    with told(str(tmp_path / "notify")) as systemd, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"NOTIFY_SOCKET": systemd.name, "LETTA_GATEWAY_PORT": port}
        async with gateway_process("http://127.0.0.1:9", serves=False, env=environment) as gateway:
            assert await gateway.ended() == 2
        assert systemd.so_far() == []


def test_banner() -> None:
    text = banner(settings(), 8080)
    assert "http://127.0.0.1:8080/v1" in text
    assert "http://letta.invalid" in text
    assert "curl http://127.0.0.1:8080/v1/models" in text
    assert "no API key" in text
    guarded = banner(settings(host="::", api_keys=("sk-canary",)), 80)
    assert "http://[::]:80/v1" in guarded
    assert "Authorization: Bearer $" in guarded
    assert "no API key" not in guarded
    assert "canary" not in guarded


def test_banner_of_a_local_letta() -> None:
    text = banner(settings(), 8080, local_letta())
    assert "Milo, on this machine: a scripted model answers" in text
    assert "curl -N http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{" in text
    body = msgspec.json.decode(text.split(" -d '")[1].split("'")[0])
    assert (body["model"], body["stream"]) == ("Milo", True)
    assert "no API key" in text
    guarded = banner(settings(api_keys=("sk-canary",)), 80, local_letta(model="openai/gpt-5"))
    assert "openai/gpt-5 answers" in guarded
    assert 'Authorization: Bearer $API_KEY" -H' in guarded
    assert "canary" not in guarded


# A local Letta -------------------------------------------------------------------------------------------------------


async def test_nothing_is_configured(tmp_path: Path) -> None:
    async with gateway_process(None, LETTA_GATEWAY_HOME=str(tmp_path), LETTA_GATEWAY_GRACE="1") as gateway:
        assert "Milo, on this machine" in gateway.errors
        assert (await gateway.ask("GET", "/v1/models")).json()["data"][0]["id"] == "Milo"
        async with gateway.connect() as client:
            await client.send(chat_request("Hello there", model="Milo", stream=False))
            said = (await client.answer()).json()["choices"][0]["message"]["content"]
        assert said.startswith("You said: Hello there\n\n(This is Letta Gateway's scripted model")
        family = psutil.Process(gateway.process.pid).children(recursive=True)
        assert family
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in gateway.errors


async def test_signal_while_a_local_letta_starts(tmp_path: Path) -> None:
    async with gateway_process(None, serves=False, LETTA_GATEWAY_HOME=str(tmp_path)) as gateway:
        async with asyncio.timeout(10):
            while not (tmp_path / "letta/letta.log").exists():  # noqa: ASYNC110 - a process tells nobody
                await asyncio.sleep(0.01)
        family = psutil.Process(gateway.process.pid).children(recursive=True)
        started = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        assert time.monotonic() - started < 6
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in gateway.errors


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"LETTA_GATEWAY_MIDDLEWARE": "auth"}, "LETTA_GATEWAY_MIDDLEWARE"),
        ({"LETTA_GATEWAY_MODEL": "openai/none"}, "LETTA_GATEWAY_MODEL is 'openai/none'"),
        ({"LMSTUDIO_BASE_URL": "http://127.0.0.1:9/v1"}, "LM Studio offers no model"),
    ],
)
async def test_local_letta_that_cannot_be_made_ready(environment: dict[str, str], told: str, tmp_path: Path) -> None:
    async with gateway_process(None, serves=False, env=environment, LETTA_GATEWAY_HOME=str(tmp_path)) as gateway:
        assert await gateway.ended() == 2
    (line,) = (line for line in gateway.errors.splitlines() if line.startswith("letta-gateway: "))
    assert told in line
    assert "Traceback" not in gateway.errors


# What cannot work is said at the start -------------------------------------------------------------------------------

LITELLM = {
    "billing": "litellm",
    "litellm_base_url": "http://litellm.invalid",
    "litellm_master_key": "sk-master",
    "user_model": "gpt-5",
}


async def test_server_whose_agents_have_no_providers_cannot_bill_by_litellm() -> None:
    backend = ScriptedBackend()
    backend.capabilities = Capabilities(providers=False)
    with pytest.raises(StartFailed, match="LETTA_GATEWAY_BILLING=litellm needs a Letta V1 server") as caught:
        await _check_kind(settings(**LITELLM), backend)
    assert "\n" not in str(caught.value)
    backend.capabilities = Capabilities(providers=True)
    await _check_kind(settings(**LITELLM), backend)


async def test_server_that_does_not_answer_yet_may_be_one_that_can() -> None:
    backend = ScriptedBackend()
    backend.capabilities = Capabilities(providers=False)
    backend.down = UpstreamUnavailable()
    await _check_kind(settings(**LITELLM), backend)


async def test_nobody_is_asked_where_the_gateway_bills_itself() -> None:
    backend = ScriptedBackend()
    await _check_kind(settings(), backend)
    assert backend.pings == 0


async def test_old_sqlite_is_one_warning_and_no_refusal() -> None:
    async with Upstream() as letta, gateway_process(letta.url) as gateway:
        assert (await gateway.ask("GET", "/ready")).status == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
    assert gateway.errors.count("WAL-reset bug") == (1 if has_wal_reset_bug() else 0)


@pytest.mark.live
async def test_gateway_has_no_more_connections_to_postgresql_than_it_may(
    postgres_address: PostgresServer, postgres: Postgres
) -> None:
    environment = {
        "LETTA_GATEWAY_DATABASE_URL": postgres_address.url,
        "LETTA_GATEWAY_DATABASE_CONNECTIONS": "3",
        "SECRET_KEY": "made at random, 32 characters and more",
    }
    async with Upstream() as letta, gateway_process(letta.url, env=environment) as gateway:
        asked = (gateway.ask("GET", f"/v1/responses/resp_{number}") for number in range(30))
        assert {answer.status for answer in await asyncio.gather(*asked)} == {404}
        name = postgres_address.url.rpartition("/")[2].partition("?")[0]
        count = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
        assert int(await asyncio.to_thread(postgres.run, count)) == 3


async def test_shared_database_without_a_shared_secret_stops_the_start() -> None:
    url = "postgresql://me:hunter2@127.0.0.1:9/gateway"
    async with gateway_process(None, serves=False, env={"LETTA_GATEWAY_DATABASE_URL": url}) as gateway:
        assert await gateway.ended() == 2
    (line,) = gateway.errors.splitlines()
    assert line.startswith("letta-gateway: SECRET_KEY is needed with LETTA_GATEWAY_DATABASE_URL")
    assert "hunter2" not in line


async def test_replica_that_the_others_could_not_reach_does_not_start() -> None:
    environment = {
        "LETTA_GATEWAY_DATABASE_URL": "postgresql://me@127.0.0.1:9/gateway",
        "LETTA_GATEWAY_REDIS_URL": "redis://127.0.0.1:9/0",
        "SECRET_KEY": "made at random, 32 characters and more",
    }
    async with gateway_process("http://127.0.0.1:9", serves=False, env=environment) as gateway:
        assert await gateway.ended() == 2
    assert gateway.errors.startswith("letta-gateway: LETTA_GATEWAY_ADVERTISE is needed")


async def test_secret_that_everybody_can_read_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_text("x" * 64)
    (tmp_path / "secret.key").chmod(0o644)
    environment = {"LETTA_GATEWAY_HOME": str(tmp_path)}
    async with Upstream() as letta, gateway_process(letta.url, serves=False, env=environment) as gateway:
        assert await gateway.ended() == 2
    (line,) = gateway.errors.splitlines()
    assert line.startswith("letta-gateway: ")
    assert "secret.key" in line
    assert "xxxx" not in line
