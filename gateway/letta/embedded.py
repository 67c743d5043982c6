"""A local App Server as a supervised child: what the gateway speaks to when nobody named a Letta server.

Its state is under the gateway's home, so the next start finds the agent and what it remembers. It listens on a free
port of loopback, behind a token that is made anew for each start: others on this machine have no way in.
"""

import asyncio
import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp
import structlog

from gateway.letta import upstream_errors
from gateway.metrics import Metrics
from gateway.tasks import TaskSet

READY: Final = 30.0
"""Seconds for the child to listen: it takes two, more on a machine that is busy."""
GLANCE: Final = 0.05
STOP: Final = 5.0
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
STEADY: Final = 60.0
"""Seconds after which a child that dies is no longer one that cannot live."""
MOST_LOG: Final = 5_242_880

_KEPT: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Of the gateway's environment the child sees these alone: its agents may run tools."""

_log: Final = structlog.get_logger("gateway.embedded")


class EmbeddedFailed(Exception):
    """The local Letta cannot be started; the message says why in one line."""


class EmbeddedLetta:
    """The child: started, watched, started again when it dies, stopped with the gateway."""

    def __init__(self, home: Path, environment: dict[str, str], metrics: Metrics, tasks: TaskSet) -> None:
        self._home = (home / "letta").absolute()
        self._environment = environment
        self._metrics = metrics
        self._tasks = tasks
        self._port = _free_port()
        self.token = secrets.token_urlsafe(32)
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._token_file = self._home / "token"
        self.log = self._home / "letta.log"

    @property
    def url(self) -> str:
        """What a client of it connects to."""
        return f"ws://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it listens; raises ``EmbeddedFailed``."""
        if not is_installed():
            raise EmbeddedFailed(
                "nothing is configured and no local Letta is installed: pip install 'letta-gateway[embedded]', "
                "or set LETTA_BASE_URL (your Letta server) or LETTA_API_KEY (Letta Cloud)."
            )
        for folder in (self._home, self._home / "work"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._token_file.touch(mode=0o600)
        self._token_file.write_text(self.token)
        await self._start_child()

    def watch(self) -> None:
        """Start it again whenever it dies, from now on."""
        self._watching = self._tasks.spawn(self._watch(), "watch embedded letta")

    async def stop(self) -> None:
        """Stop it, politely first."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        process = self._process
        if process is None or process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP):
                    await process.wait()
                    return

    async def _start_child(self) -> None:
        self._process = await self._spawn()
        deadline = asyncio.get_running_loop().time() + READY
        while not await _listens(self._port):
            if self._process.returncode is not None:
                raise EmbeddedFailed(f"the local Letta ended at once; {self.log} says why.")
            if asyncio.get_running_loop().time() > deadline:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise EmbeddedFailed(f"the local Letta did not listen within {READY:g} seconds; see {self.log}.")
            await asyncio.sleep(GLANCE)

    async def _spawn(self) -> asyncio.subprocess.Process:
        kept = {name: os.environ[name] for name in (*_KEPT, *_PROXIES) if name in os.environ}
        environment = {
            **kept,
            **self._environment,
            "HOME": str(self._home),
            "DO_NOT_TRACK": "1",
            "LETTA_CODE_TELEM": "0",
        }
        with _rotated(self.log).open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway.letta.embedded_child",
                str(os.getpid()),
                *("server", "--backend", "local", "--listen", self.url),
                *("--ws-auth", "capability-token", "--ws-token-file", str(self._token_file)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._home / "work",
                start_new_session=True,  # Ctrl-C is for the gateway: open turns may still finish
            )

    async def _watch(self) -> None:
        pause, loop = FIRST_PAUSE, asyncio.get_running_loop()
        while self._process is not None:
            started = loop.time()
            status = await self._process.wait()
            pause = FIRST_PAUSE if loop.time() - started > STEADY else pause
            _log.error("local letta died", status=status, again_in=pause, log=str(self.log))
            self._metrics.embedded_restarts.inc()
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            try:
                await self._start_child()
            except (EmbeddedFailed, OSError) as error:
                _log.error("local letta cannot be started", reason=str(error))
            else:
                _log.info("local letta is back")


@contextlib.asynccontextmanager
async def running_letta(
    home: Path, environment: dict[str, str], metrics: Metrics, tasks: TaskSet
) -> AsyncIterator[EmbeddedLetta]:
    """Run a local Letta while the context is open, with these variables."""
    letta = EmbeddedLetta(home, environment, metrics, tasks)
    try:
        await letta.start()
        letta.watch()
        yield letta
    finally:
        await letta.stop()


def is_installed() -> bool:
    """Tell whether the extra ``embedded`` is there."""
    return importlib.util.find_spec("letta_code") is not None


async def _listens(port: int) -> bool:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as session,
            session.get(f"http://127.0.0.1:{port}/readyz") as response,
        ):
            return response.status == 200  # noqa: PLR2004
    except upstream_errors.FOREIGN:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rotated(log: Path) -> Path:
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > MOST_LOG:
            log.replace(log.with_suffix(".log.1"))
    return log
