import asyncio
import contextlib
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from gateway.letta import embedded_child

PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "gateway.letta.embedded_child", str(os.getpid()), "server"],
                         start_new_session=True, env={**os.environ, "PYTHONPATH": sys.argv[1]})
print(child.pid, flush=True)
sys.stdin.read()
"""
SLEEPER = """
def main():
    import os, sys, time
    open(os.environ["SEEN"], "w").write(" ".join(sys.argv[1:]))
    time.sleep(60)
"""


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a parent whose child is in the place of Letta; the value is both."""
    (tmp_path / "letta_code.py").write_text(SLEEPER)
    environment = {**os.environ, "SEEN": str(tmp_path / "seen")}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Letta alone watches its parent")
async def test_it_dies_with_its_parent_whatever_kills_that(tmp_path: Path) -> None:
    with parent(tmp_path) as (process, child):
        async with asyncio.timeout(10):
            while not (tmp_path / "seen").exists():  # noqa: ASYNC110 - a process tells nobody
                await asyncio.sleep(0.01)
        assert psutil.Process(child).is_running()
        process.kill()
        process.wait()
        await gone(child)


class Called:
    """Stands for Letta's launcher."""

    def __init__(self) -> None:
        self.arguments: list[str] | None = None

    def main(self) -> None:
        self.arguments = sys.argv[1:]


@pytest.fixture
def letta(monkeypatch: pytest.MonkeyPatch) -> Called:
    called = Called()
    module = types.ModuleType("letta_code")
    module.main = called.main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "letta_code", module)
    monkeypatch.setattr(embedded_child, "PR_SET_PDEATHSIG", 0)  # an option that there is not: the tests live on
    return called


def test_it_becomes_letta_with_the_arguments_that_follow(letta: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embedded_child", str(os.getppid()), "server", "--listen", "ws://x"])
    embedded_child.main()
    assert letta.arguments == ["server", "--listen", "ws://x"]


def test_parent_that_is_dead_already(letta: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embedded_child", "1" if os.getppid() != 1 else "2", "server"])
    with pytest.raises(SystemExit) as ended:
        embedded_child.main()
    assert ended.value.code == 0
    assert letta.arguments is None


def test_another_system_than_linux(letta: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["embedded_child", str(os.getppid()), "server"])
    embedded_child.main()
    assert letta.arguments == ["server"]


@pytest.mark.usefixtures("letta")
def test_it_is_run_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embedded_child", "0", "server"])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delitem(sys.modules, "gateway.letta.embedded_child")
    with pytest.raises(SystemExit):
        runpy.run_module("gateway.letta.embedded_child", run_name="__main__")
