"""Programs that the live tests run: started under a guard, so that none of them outlives the tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_GUARD = Path(__file__).with_name("guard.py")
_PATIENCE = 15.0


class Program:
    """A program under its guard."""

    def __init__(self, guard: subprocess.Popen[bytes], pid: int) -> None:
        self._guard = guard
        self.pid = pid

    @property
    def running(self) -> bool:
        """Whether the program has not ended."""
        return self._guard.poll() is None

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to the program and its children."""
        os.killpg(self.pid, what)

    def kill(self) -> None:
        """Kill the program at once, as `kill -9` does, and wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._guard.wait(_PATIENCE)

    def stop(self) -> None:
        """Let the guard stop the program, and wait for both."""
        with contextlib.suppress(OSError):
            _close(self._guard)
        self._guard.wait(_PATIENCE)


def _close(guard: subprocess.Popen[bytes]) -> None:
    for pipe in (guard.stdin, guard.stdout):
        if pipe is not None:
            pipe.close()


def start(
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str],
    cwd: Path,
    user: tuple[int, int] | None = None,
    stop_signal: signal.Signals = signal.SIGKILL,
    remove: Path | None = None,
) -> Program:
    """Start a program that ends when this process does, its output in a log file."""
    options = ["--signal", str(int(stop_signal)), "--log", str(log)]
    options += ["--user", f"{user[0]}:{user[1]}"] if user else []
    options += ["--remove", str(remove)] if remove else []
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", _GUARD, *options, "--", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
    )
    first_line = guard.stdout.readline() if guard.stdout else b""
    if not first_line.strip():
        _close(guard)
        guard.wait(_PATIENCE)
        raise RuntimeError(f"{command[0]} could not be started")
    return Program(guard, int(first_line))


@contextlib.contextmanager
def running(program: Program) -> Iterator[Program]:
    """Stop a program at the end of the context."""
    try:
        yield program
    finally:
        program.stop()


def free_port() -> int:
    """Find a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path, lines: int = 30) -> str:
    """Give the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
