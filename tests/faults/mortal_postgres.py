"""A PostgreSQL of one file of tests, which is killed, stopped, and started again at the same address.

What it has acknowledged outlives a ``kill -9``; only a power cut would not be survived.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Final

from tests.live import processes
from tests.live.postgres import Postgres, database_user, running_postgres
from tests.live.setup_v1 import missing, state_folder

_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "30",
    "deadlock_timeout": "200ms",
}


class MortalPostgres:
    """The server; ``now`` runs SQL on it, while it is up."""

    def __init__(self, state: Path, programs: Path) -> None:
        self.now = Postgres(processes.free_port(), programs)
        self._state = state
        self._program: processes.Program | None = None

    def start(self) -> None:
        """Start it unless it is up, and wait until it takes connections."""
        if self._program is not None:
            return
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        self._program = processes.start(
            [self.now.programs / "postgres", "-D", self._state / "data", "-p", str(self.now.port), *settings],
            log=self._state / "mortal.log",
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            cwd=self._state,
            user=database_user(),
            stop_signal=signal.SIGINT,
        )
        while self._program.running:
            with contextlib.suppress(CalledProcessError):
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
