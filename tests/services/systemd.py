"""A real systemd for the tests, whatever init the machine has: PID 1 of namespaces of its own, see ``systemd.sh``."""

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import psutil  # type: ignore[import-untyped]

from tests.live import processes

ROOT: Final = Path(__file__).parents[2]
PROGRAM: Final = "/opt/letta-gateway/bin/letta-gateway"
_ENV: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_PATIENCE: Final = 20.0
_SYS_ADMIN: Final = 21
_NAMESPACES: Final = ("--mount", "--pid", "--cgroup", "--ipc", "--uts")


class Systemd(msgspec.Struct, frozen=True):
    """A systemd that runs; ``pid`` is its process on the machine."""

    pid: int

    def run(self, *command: str, input: str = "", timeout: float = 60.0) -> str:  # noqa: A002 - as subprocess has it
        """Run a command beside it and return what it prints; raises where it fails."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), *_NAMESPACES, *command],
            input=input,
            capture_output=True,
            text=True,
            check=False,
            env=_ENV,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file that root alone may read."""
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && umask 077 && cat > "$1"', "sh", path, input=text)

    def show(self, unit: str, what: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", what, unit).strip()

    def process(self, unit: str) -> psutil.Process:
        """Return a unit's main process."""
        inner = self.show(unit, "MainPID")
        for process in psutil.Process(self.pid).children(recursive=True):
            status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
            if f"\t{inner}\n" in status.partition("NSpid:")[2].partition("\n")[0] + "\n":
                return process
        raise RuntimeError(f"{unit} has no process {inner}")


def refusal() -> str | None:
    """Say why no systemd can be run here, if so."""
    mounts = "mount -t tmpfs tmpfs /mnt && mount -t cgroup2 cgroup2 /mnt"
    command = ["unshare", *_NAMESPACES, "--fork", "sh", "-c", mounts]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no namespaces for a systemd: {tried.stderr.strip()}" if tried.returncode else None


def may_administer() -> bool:
    """Tell whether this process has CAP_SYS_ADMIN, without which there are neither namespaces nor mounts."""
    status = Path("/proc/self/status").read_text("utf-8")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(effective >> _SYS_ADMIN & 1)


@contextlib.contextmanager
def running_systemd(folder: Path) -> Iterator[Systemd]:
    """Boot a systemd and end it, with all that it runs, at the end of the context."""
    state, log = folder / "machine", folder / "systemd.log"
    state.mkdir()
    script = Path(__file__).with_name("systemd.sh")
    packages = sysconfig.get_paths()["purelib"]
    program = processes.start(
        ["unshare", "--mount", "--propagation", "private", "sh", script, state, sys.base_prefix, packages, ROOT],
        log=log,
        env=_ENV,
        cwd=folder,
    )
    with processes.running(program):
        systemd = Systemd(_pid_1(program, log))
        try:
            _wait_for(systemd, log)
            yield systemd
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(systemd.pid, signal.SIGKILL)
            psutil.wait_procs([psutil.Process(program.pid)] if psutil.pid_exists(program.pid) else [], timeout=5)


def _pid_1(program: processes.Program, log: Path) -> int:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and program.running:
        for process in psutil.Process(program.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "systemd":
                    return int(process.pid)
        time.sleep(0.02)
    raise RuntimeError(f"systemd does not start:\n{processes.tail(log)}")


def _wait_for(systemd: Systemd, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(RuntimeError):
            if systemd.show("tests.target", "ActiveState") == "active":
                return
        time.sleep(0.05)
    raise RuntimeError(f"systemd does not answer:\n{processes.tail(log)}")
