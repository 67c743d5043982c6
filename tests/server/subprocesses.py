"""The gateway as people run it: the real command, in a process of its own."""

import asyncio
import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import Final

from tests.server.wire import Answer, Connection, Headers, ask, connect, until

PATIENCE: Final = 45.0
_SERVES: Final = re.compile(r"serves http://(?:127\.0\.0\.1|\[::1\]|localhost):(\d+)/v1")


class GatewayProcess:
    """A running command; ``errors`` is what it wrote to standard error so far, ``output`` what else it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.errors = ""
        self.output = ""
        self.port = 0
        loop = asyncio.get_running_loop()
        self._reading = [loop.create_task(self._read_errors()), loop.create_task(self._read_output())]

    async def serves(self) -> None:
        """Wait for the banner."""
        async with asyncio.timeout(PATIENCE):
            while not (found := _SERVES.search(self.errors)):
                assert self.process.returncode is None, self.errors
                await asyncio.sleep(0.005)
        self.port = int(found[1])

    async def says(self, text: str) -> None:
        """Wait until standard error holds a text."""
        await until(lambda: text in self.errors)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and return its exit status."""
        async with asyncio.timeout(PATIENCE):
            status = await self.process.wait()
            await asyncio.gather(*self._reading)
        return status

    def connect(self) -> contextlib.AbstractAsyncContextManager[Connection]:
        """Open a connection to it."""
        return connect(self.port)

    async def ask(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> Answer:
        """Send one request."""
        return await ask(self.port, method, target, headers, body)

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.errors += line.decode()

    async def _read_output(self) -> None:
        assert self.process.stdout is not None
        self.output = (await self.process.stdout.read()).decode()


@contextlib.asynccontextmanager
async def gateway_process(
    letta: str | None,
    *command: str,
    serves: bool = True,
    env: Mapping[str, str] | None = None,
    descriptors: int | None = None,
    **environment: str,
) -> AsyncIterator[GatewayProcess]:
    """Run ``letta-gateway`` (``serve`` unless told otherwise) for as long as the context, on a free port."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LETTA_", "PYTHON", "COV"))}
    chosen = {
        "LETTA_GATEWAY_PORT": "0",
        "ENVIRONMENT": "production",
        "PYTHONWARNINGS": "error",
        **({"LETTA_BASE_URL": letta} if letta else {}),
        **(env or {}),
        **environment,
    }

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    with tempfile.TemporaryDirectory() as folder:
        if not chosen.keys() & {"HOME", "LETTA_GATEWAY_HOME"}:
            chosen["LETTA_GATEWAY_HOME"] = folder  # a database of its own
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            *(command or ("serve",)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**inherited, **chosen},
            cwd=folder,
            preexec_fn=limit,
        )
        gateway = GatewayProcess(process)
        try:
            if serves:
                await gateway.serves()
            yield gateway
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await gateway.ended()
