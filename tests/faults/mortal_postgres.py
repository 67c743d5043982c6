"""A PostgreSQL of one file of tests, which is killed, stopped, and started again at the same address.

What it has acknowledged outlives a ``kill -9``; only a power cut would not be survived.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.live import processes
from tests.live.postgres import Postgres, database_user, running_postgres
from tests.live.setup_v1 import missing, state_folder

_ENV: Final = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}
_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "30",
    "deadlock_timeout": "200ms",
}


class MortalPostgres:
    """The server, with its data in a folder below ``state``; ``now`` runs SQL on it, while it is up."""

    def __init__(self, state: Path, programs: Path, data: str = "data") -> None:
        self.now = Postgres(processes.free_port(), programs)
        self._state = state
        self._data = state / data
        self._program: processes.Program | None = None

    def start(self) -> None:
        """Start it unless it is up, and wait until it takes connections."""
        if self._program is not None:
            return
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        self._program = processes.start(
            [self.now.programs / "postgres", "-D", self._data, "-p", str(self.now.port), *settings],
            log=self._state / "mortal.log",
            env=_ENV,
            cwd=self._state,
            user=database_user(),
            stop_signal=signal.SIGINT,
        )
        while self._program.running:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.now.run("select 1")
                return
        raise RuntimeError(processes.tail(self._state / "mortal.log"))

    def stop(self) -> None:
        """Stop it in good order: who is connected is told, and thrown out."""
        if self._program is not None:
            self._program.stop()
        self._program = None

    def kill(self) -> None:
        """Kill it and all that it has started, as ``kill -9`` does."""
        if self._program is not None:
            self._signal(signal.SIGKILL)
            self._program.stop()
        self._program = None

    def pause(self) -> None:
        """Let it do nothing any more, with every connection open: the kernel goes on taking new ones."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def standby(self) -> Iterator["MortalPostgres"]:
        """Have a second server for as long as the context, which follows this one until it is promoted."""
        standby = MortalPostgres(self._state, self.now.programs, f"standby-{processes.free_port()}")
        user = database_user()
        standby._data.mkdir(mode=0o700)
        if user:
            os.chown(standby._data, *user)
        here = ["-h", "127.0.0.1", "-p", str(self.now.port), "-U", "postgres"]
        subprocess.run(
            [self.now.programs / "pg_basebackup", *here, "-D", standby._data, "-R", "-c", "fast", "--no-sync"],
            check=True,
            capture_output=True,
            env=_ENV,
            cwd=self._state,
            user=user[0] if user else None,
            group=user[1] if user else None,
            extra_groups=[] if user else None,
        )
        standby.start()
        try:
            yield standby
        finally:
            standby.kill()

    def _signal(self, what: signal.Signals) -> None:
        """Signal it first, so that it starts no others, and then all that it has started: each has its own group."""
        assert self._program is not None
        main = self._program.pid
        os.kill(main, what)
        for child in _children(main):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, what)


def _children(parent: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def mortal_postgres() -> Iterator[MortalPostgres]:
    """Have one for as long as the context."""
    if problem := missing():
        raise RuntimeError(problem)
    with state_folder() as state:
        with running_postgres(state, None, keep=True) as first:
            programs = first.programs
        server = MortalPostgres(state, programs)
        server.start()
        try:
            yield server
        finally:
            server.kill()
