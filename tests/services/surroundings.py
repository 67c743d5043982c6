"""Where a client runs: a home of its own, the gateway as its OpenAI, and no way out to the internet."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.server.subprocesses import GatewayProcess
from tests.services import installs

API_KEY: Final = "sk-services"
_NOWHERE: Final = "http://127.0.0.1:9"


class Client(msgspec.Struct, frozen=True):
    """Whom the client talks to."""

    base_url: str
    model: str


class Ended(msgspec.Struct, frozen=True):
    """A program that ended."""

    status: int
    output: str
    errors: str


def base_url(gateway: GatewayProcess) -> str:
    """Return what an OpenAI client takes as its base URL."""
    return f"http://127.0.0.1:{gateway.port}/v1"


def environment(client: Client, home: Path) -> dict[str, str]:
    """Return the environment of a client: nothing of ours but what it has to know."""
    return {
        "PATH": f"{installs.NODE.parent}:{os.defpath}",
        "HOME": str(home),
        "TMPDIR": str(home),
        "LC_ALL": "C.UTF-8",
        "OPENAI_BASE_URL": client.base_url,
        "OPENAI_API_KEY": API_KEY,
        "SERVICES_MODEL": client.model,
        "HTTP_PROXY": _NOWHERE,
        "HTTPS_PROXY": _NOWHERE,
        "NO_PROXY": "127.0.0.1,localhost",
        "DO_NOT_TRACK": "1",
        "LANGSMITH_TRACING": "false",
    }


async def run(
    client: Client,
    command: Sequence[str | Path],
    *,
    home: Path,
    cwd: Path,
    seconds: float,
    more: Mapping[str, str] | None = None,
) -> Ended:
    """Run a client's program to its end; it is killed when it takes longer than so many seconds."""
    program = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**environment(client, home), **(more or {})},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            output, errors = await program.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # what it started goes with it
        await program.wait()
    assert program.returncode is not None
    return Ended(program.returncode, output.decode(), errors.decode())
