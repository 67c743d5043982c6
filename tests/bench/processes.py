"""Starts what is measured, each as a process of its own, and reads its CPU and memory from /proc."""

import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class NotReadyError(Exception):
    """A process that did not come up, with the end of what it said."""


class DiedError(Exception):
    """A process that ended while it was still needed: whatever was measured then means nothing."""


class Child:
    """A running process and its descendants."""

    def __init__(self, pid: int, seconds_to_ready: float = 0.0) -> None:
        self.pid = pid
        self.seconds_to_ready = seconds_to_ready

    def cpu_seconds(self) -> float:
        """Give the user and system time of the whole family, as the kernel counted it."""
        return sum(sum(map(int, _stat(pid)[11:13])) for pid in _family(self.pid)) / _TICKS

    def rss(self) -> int:
        """Give the resident bytes of the whole family."""
        return sum(int(_stat(pid)[21]) * _PAGE for pid in _family(self.pid))

    def peak_rss(self) -> int:
        """Give the sum of the highest resident bytes each of the family ever had."""
        return sum(_peak(pid) for pid in _family(self.pid))


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raise_file_limit() -> int:
    """Let this process and its children open as many files as the system allows; give that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    *,
    log: Path,
    path: str = "/health",
    environment: Mapping[str, str] | None = None,
    patience: float = 30.0,
) -> Iterator[Child]:
    """Run a command until the block ends, from the moment that this path answers 200."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    variables = {**os.environ, **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, cwd=ROOT
        )
    try:
        _wait_for_ready(process, port, path, begin + patience, log)
        yield Child(process.pid, time.monotonic() - begin)
        if process.poll() is not None:
            raise DiedError(f"{log.stem} ended with status {process.returncode} while it was measured")
    finally:
        _end(process)


def _wait_for_ready(process: "subprocess.Popen[bytes]", port: int, path: str, deadline: float, log: Path) -> None:
    while not _answers(port, path):
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise NotReadyError(" | ".join(said) or f"{process.args!r} says nothing")
        time.sleep(0.005)


def _answers(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _family(pid: int) -> list[int]:
    children = [
        int(child) for listing in Path(f"/proc/{pid}/task").glob("*/children") for child in listing.read_text().split()
    ]
    return [pid, *(member for child in children for member in _family(child))]


def _stat(pid: int) -> list[str]:
    """Read the fields of /proc/PID/stat from the third on: utime and stime are 11 and 12, rss is 21."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
