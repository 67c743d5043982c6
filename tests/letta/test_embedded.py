import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import stat
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest
from structlog.testing import capture_logs

from gateway.letta import embedded
from gateway.letta.embedded import EmbeddedFailed, EmbeddedLetta, is_installed, running_letta
from gateway.metrics import Metrics
from gateway.tasks import TaskSet

PYTHON: Final = sys.executable
CANARY: Final = "sk-canary-of-the-gateway"
LISTED: Final = {*embedded._KEPT, *embedded._PROXIES, "HOME", "DO_NOT_TRACK", "LETTA_CODE_TELEM"}

LISTENS: Final = """
    import http.server, json, os, signal, sys, urllib.parse
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    {more}
    port = urllib.parse.urlsplit(sys.argv[sys.argv.index("--listen") + 1]).port
    print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), flush=True)
    http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""
"""A child that only listens; what it was given is the first line of its log."""


async def until(true: Callable[[], object], within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while not true():  # noqa: ASYNC110 - a process tells nobody
            await asyncio.sleep(0.01)


def figure(metrics: Metrics) -> float:
    """How often the child died."""
    lines = metrics.expose().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("letta_gateway_embedded_restarts_total "))
    return float(line.split()[-1])


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a way to put a script of the test's own in the place of Letta."""

    def play(script: str) -> None:
        program = tmp_path / "child.py"
        program.write_text(textwrap.dedent(script))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{program}" "$@"\n')
        python.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(python))

    return play


def listens(more: str = "") -> str:
    return LISTENS.format(more=more)


@pytest.fixture
async def letta(tmp_path: Path) -> AsyncIterator[EmbeddedLetta]:
    tasks = TaskSet()
    letta = EmbeddedLetta(tmp_path / "home", {"LMSTUDIO_BASE_URL": "http://127.0.0.1:9/v1"}, Metrics(), tasks)
    yield letta
    await letta.stop()
    await tasks.close(0)


# The real one --------------------------------------------------------------------------------------------------------


async def test_real_letta_starts_comes_back_after_a_kill_and_ends_with_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "FIRST_PAUSE", 0.05)
    metrics, tasks = Metrics(), TaskSet()
    async with running_letta(tmp_path, {}, metrics, tasks) as letta:
        first = letta.pid
        assert first is not None
        family = [first, *(child.pid for child in psutil.Process(first).children(recursive=True))]
        assert letta.url.startswith("ws://127.0.0.1:")
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(f"{letta.url}/ws")
            async with session.ws_connect(f"{letta.url}/ws", headers={"Authorization": f"Bearer {letta.token}"}) as ws:
                await ws.send_str('{"type":"app_server_info","request_id":"r1"}')
                assert '"r1"' in (await ws.receive_str(timeout=10))
        os.kill(first, signal.SIGKILL)
        await until(lambda: letta.pid not in (first, None))
        await until(lambda: figure(metrics) == 1)
        assert letta.log.is_file()
        async with asyncio.timeout(20), aiohttp.ClientSession() as session:
            while not await embedded._listens(int(letta.url.rpartition(":")[2])):  # noqa: ASYNC110 - nor does it
                await asyncio.sleep(0.05)
            async with session.ws_connect(f"{letta.url}/ws", headers={"Authorization": f"Bearer {letta.token}"}):
                pass
        second = letta.pid
        assert second is not None
        family += [second, *(child.pid for child in psutil.Process(second).children(recursive=True))]
    assert letta.pid is None
    await until(lambda: not [pid for pid in family if psutil.pid_exists(pid)])
    await tasks.close(1)
    assert len(tasks) == 0
    assert CANARY not in letta.log.read_text()


# What it is given ----------------------------------------------------------------------------------------------------


async def test_child_sees_nothing_but_what_is_listed(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LETTA_API_KEY", "OPENAI_API_KEY", "LETTA_GATEWAY_API_KEYS", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("https_proxy", "http://proxy.example.com")
    monkeypatch.setenv("HOME", "/home/somebody")
    play(listens())
    await letta.start()
    arguments, environment, folder = await told(letta)
    made_by_python_and_sh = {"LC_CTYPE", "PWD", "OLDPWD", "SHLVL", "_"}
    assert set(environment) - made_by_python_and_sh <= LISTED | {"LMSTUDIO_BASE_URL"}
    assert CANARY not in str(environment)
    assert environment["LMSTUDIO_BASE_URL"] == "http://127.0.0.1:9/v1"
    assert (environment["TZ"], environment["https_proxy"]) == ("UTC", "http://proxy.example.com")
    assert environment["HOME"] == str(letta.log.parent)
    assert (environment["DO_NOT_TRACK"], environment["LETTA_CODE_TELEM"]) == ("1", "0")
    assert folder == str(letta.log.parent / "work")
    assert arguments[:2] == ["gateway.letta.embedded_child", str(os.getpid())]
    assert arguments[2:7] == ["server", "--backend", "local", "--listen", letta.url]
    assert arguments[7:] == ["--ws-auth", "capability-token", "--ws-token-file", str(letta._token_file)]
    assert letta._token_file.read_text() == letta.token, "everybody sees a process's arguments"


async def told(letta: EmbeddedLetta) -> tuple[list[str], dict[str, str], str]:
    """Return the arguments, the environment and the folder that a child was given."""
    await until(lambda: "\n" in letta.log.read_text())
    arguments, environment, folder = json.loads(letta.log.read_text().splitlines()[0])
    return arguments[1:], environment, folder


async def test_what_it_keeps_is_for_its_user_alone(letta: EmbeddedLetta, play: Callable[[str], None]) -> None:
    play(listens())
    await letta.start()
    for path, mode in ((letta.log.parent, 0o700), (letta.log.parent / "work", 0o700), (letta._token_file, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


async def test_each_start_has_a_token_of_its_own(tmp_path: Path) -> None:
    made = [EmbeddedLetta(tmp_path, {}, Metrics(), TaskSet()) for _ in range(2)]
    assert made[0].token != made[1].token
    assert min(len(letta.token) for letta in made) >= 32
    assert {letta.pid for letta in made} == {None}


async def test_log_that_has_grown_is_put_aside(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "MOST_LOG", 10)
    letta.log.parent.mkdir(parents=True)
    letta.log.write_text("what was said before\n")
    play(listens())
    await letta.start()
    assert letta.log.with_suffix(".log.1").read_text() == "what was said before\n"
    assert "what was said before" not in letta.log.read_text()


async def test_log_that_is_short_is_added_to(letta: EmbeddedLetta, play: Callable[[str], None]) -> None:
    letta.log.parent.mkdir(parents=True)
    letta.log.write_text("what was said before\n")
    play(listens())
    await letta.start()
    await until(lambda: letta.log.read_text().count("\n") >= 2)
    assert letta.log.read_text().startswith("what was said before\n")


# What goes wrong -----------------------------------------------------------------------------------------------------


async def test_not_installed(letta: EmbeddedLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not is_installed()
    with pytest.raises(EmbeddedFailed, match=r"letta-gateway\[embedded\].*LETTA_BASE_URL.*LETTA_API_KEY") as raised:
        await letta.start()
    assert "\n" not in str(raised.value)
    assert not letta.log.parent.exists(), "nothing is left behind"


async def test_child_that_ends_at_once(letta: EmbeddedLetta, play: Callable[[str], None]) -> None:
    play('print("no such option"); raise SystemExit(3)')
    with pytest.raises(EmbeddedFailed, match=r"^the local Letta ended at once; .*letta\.log says why\.$"):
        await letta.start()
    assert letta.pid is None
    assert letta.log.read_text() == "no such option\n"
    await letta.stop()


async def test_child_that_never_listens(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "READY", 0.3)
    play("import time; time.sleep(60)")
    with pytest.raises(EmbeddedFailed, match=r"did not listen within 0\.3 seconds; see .*letta\.log"):
        await letta.start()


async def test_child_that_never_listens_is_gone_after_the_context(
    tmp_path: Path, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "READY", 0.3)
    play(f'import os, time; open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid())); time.sleep(60)')
    with pytest.raises(EmbeddedFailed):
        async with running_letta(tmp_path / "home", {}, Metrics(), TaskSet()):
            pytest.fail("it cannot be used")
    pid = tmp_path / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


@contextlib.asynccontextmanager
async def watched(letta: EmbeddedLetta) -> AsyncIterator[EmbeddedLetta]:
    await letta.start()
    letta.watch()
    yield letta


async def test_child_that_dies_again_and_again_is_started_ever_later(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(embedded, "LONGEST_PAUSE", 0.1)
    play(listens())
    with capture_logs() as logs:
        async with watched(letta):
            for number in range(1, 5):
                pid = letta.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await until(partial(dies, letta, number))
                await until(partial(is_back, logs, number))
    died = events(logs, "local letta died")
    assert [line["again_in"] for line in died] == [0.02, 0.04, 0.08, 0.1]
    assert {line["status"] for line in died} == {-signal.SIGKILL}
    assert {line["log"] for line in died} == {str(letta.log)}


async def test_child_that_lived_long_is_started_soon(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(embedded, "STEADY", 0.0)
    play(listens())
    with capture_logs() as logs:
        async with watched(letta):
            for number in range(1, 4):
                pid = letta.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await until(partial(is_back, logs, number))
    assert [line["again_in"] for line in events(logs, "local letta died")] == [0.02] * 3


async def test_child_that_cannot_be_started_again_is_tried_again(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(embedded, "LONGEST_PAUSE", 0.05)
    play(listens())
    with capture_logs() as logs:
        async with watched(letta):
            pid = letta.pid
            assert pid is not None
            play("raise SystemExit(1)")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: len(events(logs, "local letta cannot be started")) >= 2)
            play(listens())
            await until(lambda: events(logs, "local letta is back"))
            assert letta.pid not in (None, pid)
    assert "ended at once" in events(logs, "local letta cannot be started")[0]["reason"]


def dies(letta: EmbeddedLetta, times: int) -> bool:
    return figure(letta._metrics) == times


def is_back(logs: list[Any], times: int) -> bool:
    return len(events(logs, "local letta is back")) == times


def events(logs: list[Any], name: str) -> list[dict[str, Any]]:
    return [line for line in logs if line["event"] == name]


# The end -------------------------------------------------------------------------------------------------------------


async def test_end_is_polite(letta: EmbeddedLetta, play: Callable[[str], None]) -> None:
    play(listens("signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), os._exit(0)))"))
    with capture_logs() as logs:
        async with watched(letta):
            process = letta._process
            await letta.stop()
            await asyncio.sleep(0.05)
    assert process is not None
    assert process.returncode == 0
    assert letta.log.read_text().endswith("bye\n")
    assert (letta.pid, figure(letta._metrics)) == (None, 0)
    assert not events(logs, "local letta died"), "it was told to"


async def test_end_of_one_that_will_not_go(
    letta: EmbeddedLetta, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "STOP", 0.2)
    play(listens("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    await letta.start()
    process = letta._process
    await letta.stop()
    assert process is not None
    assert process.returncode == -signal.SIGKILL


async def test_end_before_the_start_and_twice(letta: EmbeddedLetta, play: Callable[[str], None]) -> None:
    await letta.stop()
    play(listens())
    await letta.start()
    await letta.stop()
    await letta.stop()
    assert letta.pid is None


async def test_end_while_it_waits_to_start_again(
    tmp_path: Path, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may be started by a watch that outlives its context."""
    monkeypatch.setattr(embedded, "FIRST_PAUSE", 0.15)
    play(listens())
    tasks, metrics = TaskSet(), Metrics()
    async with running_letta(tmp_path / "home", {}, metrics, tasks) as letta:
        assert letta.pid is not None
        os.kill(letta.pid, signal.SIGKILL)
        await until(lambda: figure(metrics) == 1)
    try:
        await asyncio.sleep(0.6)
        assert letta.pid is None
    finally:
        await tasks.close(0)
        await letta.stop()
