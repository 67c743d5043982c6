"""The unit files of ``deploy/systemd``, read by systemd's own tools and run by a real systemd."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]
import pytest

from gateway.server.listener import RETIRING
from gateway.server.notify import BEATS
from gateway.server.serve import AFTER_GRACE
from gateway.settings import Settings, load, table
from tests.live import processes
from tests.live.postgres import Postgres
from tests.server.running import JSON, chat_request
from tests.server.upstream import Upstream
from tests.server.wire import Answer, ask, connect, until
from tests.services.systemd import PROGRAM, ROOT, Systemd, may_administer, refusal, running_systemd
from tests.storage.databases import new_database, postgres

__all__ = ["postgres"]  # a fixture that is asked for by name

FOLDER: Final = ROOT / "deploy" / "systemd"
SINGLE: Final = "letta-gateway.service"
TEMPLATE: Final = "letta-gateway@.service"
UNITS: Final = sorted(unit.name for unit in FOLDER.glob("*.service"))
every_unit = pytest.mark.parametrize("unit", UNITS)
RUN: Final = "/usr/local/sbin/letta-gateway-run"
SECRET: Final = "a secret of the tests, 32 characters"
SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
DYNAMIC_USERS: Final = range(61_184, 65_520)


def lines(unit: str) -> list[str]:
    """Return the assignments of a unit file."""
    return [line for line in (FOLDER / unit).read_text("utf-8").splitlines() if re.match(r"[A-Za-z]+=", line)]


def values(unit: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in lines(unit) if line.startswith(f"{key}=")]


def seconds(unit: str, key: str) -> float:
    """Return a time of a unit file, as systemd reads it."""
    (text,) = values(unit, key)
    said = subprocess.run(["systemd-analyze", "timespan", text], check=True, capture_output=True, text=True).stdout
    found = re.search(r"μs: (\d+)", said)
    assert found, said
    return int(found[1]) / 1_000_000


# As it is read -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the units, the program that they name, and systemd's own units."""
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    shutil.copytree(FOLDER, tmp_path / "etc/systemd/system")
    program = tmp_path / PROGRAM[1:]
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def verified(root: Path, unit: str) -> str:
    """Return what systemd has to say of a unit."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", unit], check=False, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_there_are_two_units() -> None:
    assert UNITS == [SINGLE, TEMPLATE]


@pytest.mark.parametrize("unit", [SINGLE, TEMPLATE.replace("@", "@8081")])
def test_systemd_finds_nothing_wrong(unit: str, root: Path) -> None:
    assert verified(root, unit) == ""
    (root / PROGRAM[1:]).unlink()
    assert PROGRAM in verified(root, unit), "and it does look"


@every_unit
def test_exposure_is_two_at_most(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", FOLDER / unit],
        check=True,
        capture_output=True,
        text=True,
    )
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert float(exposure) <= 2.0
    assert not re.findall(r"(?m)^✗.*CAP_", done.stdout)


def test_instances_have_the_same_sandbox() -> None:
    only = {unit: Counter(lines(unit)) - Counter(lines(other)) for unit, other in zip(UNITS, UNITS[::-1], strict=True)}
    keys = {unit: {line.partition("=")[0] for line in found} for unit, found in only.items()}
    assert keys[SINGLE] == {"Description", "WorkingDirectory", "Environment", "StateDirectory"}
    assert keys[TEMPLATE] == keys[SINGLE] | {"EnvironmentFile"}


@every_unit
def test_environment_holds_settings(unit: str) -> None:
    environ = dict(pair.replace("%i", "8081").split("=", 1) for pair in values(unit, "Environment"))
    names = {setting.row.env for setting in table()}
    assert {name for name in environ if not name.startswith("PYTHON")} <= names
    shared = {"LETTA_GATEWAY_DATABASE_URL": "postgresql://db/gateway", "LETTA_GATEWAY_REDIS_URL": "redis://cache"}
    loaded = load({**environ, **shared}, None)
    if unit == TEMPLATE:
        assert (loaded.port, loaded.metrics_port, loaded.shared_port) == (8081, 18081, 8080)


@every_unit
def test_credentials_are_the_secrets_of_a_gateway_before_a_letta_elsewhere(unit: str) -> None:
    pairs = [value.split(":") for value in values(unit, "LoadCredential")]
    local = {"OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY"}
    secrets = {setting.row.env for setting in table() if setting.row.secret} - local
    assert {name for name, _ in pairs} == secrets - {"LETTA_GATEWAY_MIDDLEWARE_CONFIG"}
    assert all(file == f"letta-gateway.{name.removeprefix('LETTA_GATEWAY_')}" for name, file in pairs)


@every_unit
def test_end_of_a_gateway_fits_into_the_time_that_systemd_gives(unit: str) -> None:
    assert seconds(unit, "TimeoutStopSec") >= RETIRING + Settings().grace + AFTER_GRACE
    assert values(unit, "KillMode") == ["mixed"], "a local Letta is not to be ended before its turns"


@every_unit
def test_loop_that_stands_still_for_five_seconds_restarts_nobody(unit: str) -> None:
    watchdog = seconds(unit, "WatchdogSec")
    assert watchdog - watchdog / BEATS > 5
    assert watchdog <= 60


# As it is installed --------------------------------------------------------------------------------------------------


def commands(unit: str) -> list[str]:
    """Return the commands that the head of a unit file tells the operator to give."""
    head = (FOLDER / unit).read_text("utf-8").partition("\n[Unit]")[0]
    return [found[1] for found in re.finditer(r"(?m)^#   (\S.*?)(?: {3,}.*)?$", head)]


def test_program_is_installed_by_the_lines_of_the_unit(tmp_path: Path) -> None:
    """On a machine with no other files than the release's; nothing is built by what no lock names."""
    source, target = tmp_path / "source", tmp_path / "opt"
    for name in ("gateway", "middleware", "deploy/locks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    lines = [line for line in commands(SINGLE) if "/opt/letta-gateway" in line]
    assert len(lines) == 3
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line.replace("/opt/letta-gateway", str(target))],
            cwd=source,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": SYSTEM_PATH},
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    installed = subprocess.run(
        [target / "bin/letta-gateway", "check", "--settings"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "LETTA_BASE_URL" in installed.stdout
    (locked,) = re.findall(r"(?m)^setuptools==(\S+)", (ROOT / "deploy/locks/build.txt").read_text("utf-8"))
    assert (target / f"lib/python3.11/site-packages/setuptools-{locked}.dist-info").is_dir()


# As it runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    if reason := refusal():
        if may_administer():
            pytest.fail(
                f"{reason}. As this process has CAP_SYS_ADMIN, it is not left out: run the tests where it may make "
                "namespaces and mount cgroup2 (in Docker: --privileged --cgroupns=private)."
            )
        pytest.skip(f"{reason}. This process has no CAP_SYS_ADMIN: run the tests as root.")
    with running_systemd(tmp_path_factory.mktemp("systemd")) as machine:
        machine.write("/opt/source/SECRET_KEY", SECRET)
        for unit in (SINGLE, TEMPLATE):
            for line in commands(unit):
                if line.startswith("install "):
                    machine.run("sh", "-c", f"cd /opt/source && {line}")
        assert machine.run("stat", "-c", "%a %n", "/etc/credstore", "/etc/letta-gateway/gateway.env").split()[::2] == [
            "700",
            "600",
        ]
        machine.write("/etc/credstore/letta-gateway.OPERATOR_KEY", "sk-operator\n")
        yield machine


class Service:
    """One unit as it runs; ``says`` is what it wrote."""

    def __init__(self, systemd: Systemd, unit: str, port: int) -> None:
        self.systemd = systemd
        self.unit = unit
        self.port = port

    async def do(self, what: str) -> None:
        """Start, stop or restart it, and wait until systemd says that it is done."""
        try:
            await asyncio.to_thread(self.systemd.run, "systemctl", what, self.unit)
        except RuntimeError as error:
            pytest.fail(f"{error}\n{self.says}")

    @property
    def says(self) -> str:
        return self.systemd.run("cat", f"/run/{self.unit}.log")

    def show(self, what: str) -> str:
        return self.systemd.show(self.unit, what)

    @property
    def process(self) -> psutil.Process:
        return self.systemd.process(self.unit)

    @property
    def status(self) -> str:
        """What the kernel says of its main process."""
        return Path(f"/proc/{self.process.pid}/status").read_text("utf-8")

    async def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
        return await ask(self.port, method, path, headers or {}, body)


@contextlib.asynccontextmanager
async def running(
    systemd: Systemd, unit: str, port: int, environ: dict[str, str], *more: str
) -> AsyncIterator[Service]:
    """Run a unit, with an environment and further lines of ``[Service]``."""
    text = "".join(f"{name}={value}\n" for name, value in environ.items())
    systemd.write(f"/etc/letta-gateway/{'gateway' if unit == SINGLE else port}.env", text)
    # Python's library lies elsewhere than it was built for.
    log = f"append:/run/{unit}.log"
    changes = (f"StandardOutput={log}", f"StandardError={log}", "Environment=LD_LIBRARY_PATH=/opt/python/lib", *more)
    systemd.write(f"/etc/systemd/system/{unit}.d/tests.conf", "\n".join(("[Service]", *changes, "")))
    systemd.run("systemctl", "daemon-reload")
    service = Service(systemd, unit, port)
    try:
        await service.do("start")
        yield service
    finally:
        await service.do("stop")
        systemd.run("rm", "-r", f"/etc/systemd/system/{unit}.d", f"/run/{unit}.log")


def environment(letta: str, port: int, **more: str) -> dict[str, str]:
    return {"LETTA_BASE_URL": letta, "LETTA_GATEWAY_PORT": str(port), "LETTA_GATEWAY_TRUSTED_NETWORKS": "none", **more}


async def test_gateway_in_its_sandbox(systemd: Systemd) -> None:
    port = processes.free_port()
    async with Upstream() as letta, running(systemd, SINGLE, port, environment(letta.url, port)) as service:
        assert (await service.ask("GET", "/health")).status == 200, "ready is ready"
        assert service.show("StatusText") == f"Serving 127.0.0.1, port {port}"
        status = service.status
        assert service.process.uids().real in DYNAMIC_USERS
        assert set(re.findall(r"(?m)^Cap\w+:\t(\w+)$", status)) == {"0" * 16}
        assert re.search(r"(?m)^NoNewPrivs:\t1$", status)
        assert re.search(r"(?m)^Seccomp:\t2$", status)
        # A chat, a user's password, and the operator's key that is a credential.
        async with connect(port) as client:
            await client.send(chat_request(stream=True))
            assert (await client.answer()).events[-1] == "[DONE]"
        person = b'{"email":"ann@example.com","password":"correct horse battery","name":"Ann"}'
        register = await service.ask("POST", "/api/v1/auth/register", JSON, person)
        assert register.status in (200, 201), f"{register}\n{service.says}"
        assert (await service.ask("GET", "/metrics")).status == 403
        metrics = await service.ask("GET", "/metrics", {"Authorization": "Bearer sk-operator"})
        assert metrics.status == 200
        assert systemd.run("stat", "-c", "%a", "/var/lib/private/letta-gateway/gateway.db") == "600\n"
        systemd.run("systemctl", "kill", "--kill-whom=main", "-s", "USR1", SINGLE)
        await until(lambda: " tasks:" in service.says)
        await service.do("stop")
        assert (service.show("Result"), service.show("ExecMainStatus")) == ("success", "0")
        assert not re.search("Traceback|SECRET_KEY|sk-operator", service.says)


@pytest.fixture(scope="module")
def bus(systemd: Systemd) -> None:
    """Give the machine the bus by which systemd-run hears the end of what it started."""
    systemd.run("sh", "-c", "mkdir -p /run/dbus && dbus-daemon --system --fork && kill -USR1 1")


@pytest.mark.usefixtures("bus")
async def test_command_line_works_on_what_the_service_has(systemd: Systemd) -> None:
    """A shell's own gateway is another one, which nobody means."""
    port = processes.free_port()
    async with Upstream() as letta, running(systemd, SINGLE, port, environment(letta.url, port)) as service:
        person = b'{"email":"bea@example.com","password":"correct horse battery","name":"Bea"}'
        assert (await service.ask("POST", "/api/v1/auth/register", JSON, person)).status == 201
        said = await asyncio.to_thread(systemd.run, RUN, "check")
        assert re.search(r"(?m)^agents     ok      1 found$", said.replace("\r", ""))
        assert letta.url in said
        await service.do("stop")
        assert "bea@example.com" in await asyncio.to_thread(systemd.run, RUN, "users", "list")
        made = await asyncio.to_thread(systemd.run, RUN, "keys", "make", "bea@example.com", "laptop")
        assert "laptop" in made
        await service.do("start")
        assert (await service.ask("GET", "/health")).status == 200, "whose files are its own still"


async def test_gateway_that_hangs_is_restarted_and_says_where_it_hung(systemd: Systemd) -> None:
    """And one whose Letta is dead is not: it beats on."""
    port = processes.free_port()
    dead = environment("http://127.0.0.1:9", port)
    async with running(systemd, SINGLE, port, dead, "WatchdogSec=2", "RestartSec=0") as service:
        assert (await service.ask("GET", "/ready")).status == 503
        await asyncio.sleep(5)
        assert service.show("NRestarts") == "0"
        before = service.process.pid
        os.kill(before, signal.SIGSTOP)
        async with asyncio.timeout(30):
            while (service.show("NRestarts"), service.show("ActiveState")) != ("1", "active"):  # noqa: ASYNC110 - as it is told
                await asyncio.sleep(0.1)
        assert service.process.pid != before
        assert (await service.ask("GET", "/health")).status == 200
        assert "Fatal Python error: Aborted" in service.says
        assert re.search(r'File "\S*/serve\.py", line \d+ in run', service.says)


async def test_grace_longer_than_the_units_time_to_stop(systemd: Systemd) -> None:
    port = processes.free_port()
    async with Upstream() as letta:
        letta.gate.clear()
        patient = environment(letta.url, port, LETTA_GATEWAY_GRACE="4")
        async with running(systemd, SINGLE, port, patient, "TimeoutStopSec=1") as service, connect(port) as client:
            await client.send(chat_request(stream=True))
            assert (await client.head()).status == 200
            started = time.monotonic()
            async with asyncio.TaskGroup() as group:
                group.create_task(service.do("stop"))
                await until(lambda: service.show("StatusText") == "Draining: open turns have 4 s to finish")
                pieces = [piece async for piece in client.pieces()]
            assert 3.5 < time.monotonic() - started < 10
            assert b"shutting_down" in b"".join(pieces)
            assert (service.show("Result"), service.show("ExecMainStatus")) == ("success", "0")


# Instances that share a port -----------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    port = processes.free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    program = processes.start(command, log=tmp_path / "redis.log", env={"PATH": os.defpath}, cwd=tmp_path)
    with processes.running(program):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two free ports below 10000, whose metrics ports are free as well."""
    found = []
    for port in range(8_300, 9_900):
        with contextlib.suppress(OSError):
            for each in (port, 10_000 + port):
                socket.create_server(("127.0.0.1", each)).close()
            found.append(port)
        if len(found) == 2:
            break
    return found[0], found[1]


async def test_rolling_restart_of_instances_loses_no_connection(
    systemd: Systemd, postgres: Postgres, redis: str, ports: tuple[int, int]
) -> None:
    shared = processes.free_port()
    database = new_database(postgres)
    more = {"LETTA_GATEWAY_DATABASE_URL": database.url, "LETTA_GATEWAY_REDIS_URL": redis}
    async with Upstream() as letta, contextlib.AsyncExitStack() as stack:
        services = []
        for port in ports:
            environ = environment(letta.url, port, LETTA_GATEWAY_SHARED_PORT=str(shared), **more)
            unit = TEMPLATE.replace("@", f"@{port}")
            services.append(await stack.enter_async_context(running(systemd, unit, port, environ)))
        for port in ports:
            assert (await ask(10_000 + port, "GET", "/health")).status == 200, "metrics of each"
            assert (await ask(10_000 + port, "GET", "/v1/models")).code == "unknown_url"
        async with asyncio.TaskGroup() as group:
            restarting = group.create_task(_one_after_the_other(services))
            answers = await _knocks(shared, 2_000, until_done=restarting.done)
        assert len(answers) >= 2_000
        assert max(answers) < 10, "who is not heard at first is heard a second later"
        assert [service.show("NRestarts") for service in services] == ["0", "0"]


async def _one_after_the_other(services: list[Service]) -> None:
    await asyncio.sleep(0.5)
    for service in services:
        before = service.process.pid
        await service.do("restart")
        assert service.process.pid != before


async def _knocks(port: int, least: int, until_done: Callable[[], bool]) -> list[float]:
    """Connect, ask and go, again and again, each on a connection of its own; return how long each took."""

    async def knock() -> float:
        started = time.monotonic()
        answer = await ask(port, "GET", "/health")
        assert answer.status == 200
        return time.monotonic() - started

    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[float]] = []
        while not until_done() or len(tasks) < least:
            tasks.append(group.create_task(knock()))
            await asyncio.sleep(0.003)
    return [task.result() for task in tasks]
