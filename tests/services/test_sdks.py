"""SDKs and frameworks, each as its users write it, before both Letta servers: `heard.py` says what they are to hear."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

import msgspec
import pytest
import pytest_asyncio

from tests.live.letta_server import LettaServer
from tests.server.subprocesses import GatewayProcess
from tests.services import installs
from tests.services.heard import Heard, expected
from tests.services.surroundings import Client, base_url, run

pytestmark = pytest.mark.asyncio(loop_scope="session")

_ROOT: Final = Path(__file__).parents[2]
_CLIENTS: Final = Path(__file__).parent / "clients"
_PATIENCE: Final = 300.0
_read = msgspec.json.Decoder(Heard).decode


def _both(steps: Iterable[str]) -> tuple[str, ...]:
    """Return steps over chat completions, and the same over Responses."""
    return (*steps, *(f"responses_{step}" for step in steps))


_ALL: Final = ("plain", "streamed", "tool_loop", "streamed_tool_loop", "structured", "unknown_model")
STEPS: Final = {
    "openai_sdk.py": (*_both(_ALL), "reasoning", "responses_streamed_reasoning", "responses_follow_up"),
    "openai_agents.py": _both((*_ALL, "streamed_reasoning")),
    "pydantic_agents.py": _both((*_ALL, "reasoning", "structured_by_tool")),
    "langchain_agents.py": _both(_ALL),
    "openai_node.mjs": (*_both((*_ALL, "streamed_reasoning")), "responses_follow_up"),
    "ai_sdk.mjs": (
        *(f"{way}{step}" for way in ("", "chat_", "responses_") for step in _ALL),
        "streamed_reasoning",
        "responses_streamed_reasoning",
    ),
}
"""What each program tries: the file, and its steps."""


class Clients:
    """Runs each program once before one Letta, with all of its steps, two at a time."""

    def __init__(self, letta: LettaServer, gateway: GatewayProcess, node_programs: Path, home: Path) -> None:
        self._letta = letta
        self._gateway = gateway
        self._node_programs = node_programs
        self._home = home
        self._places = asyncio.Semaphore(2)
        self._runs: dict[str, asyncio.Task[dict[str, Heard]]] = {}

    def start(self, programs: Iterable[str]) -> None:
        """Start what is going to be asked for."""
        loop = asyncio.get_running_loop()
        self._runs = {program: loop.create_task(self._run(program)) for program in programs}

    async def stop(self) -> None:
        """End what nobody waited for."""
        for running in self._runs.values():
            running.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)

    async def heard(self, program: str, step: str) -> Heard:
        """Return what a program heard of a step."""
        return (await self._runs[program])[step]

    async def _run(self, program: str) -> dict[str, Heard]:
        async with self._places:
            agent = self._letta.create_agent()
            try:
                client = Client(base_url(self._gateway), agent.name)
                command = self._command(program)
                ended = await run(client, command, home=self._home, cwd=_ROOT, seconds=_PATIENCE)
            finally:
                self._letta.delete_agent(agent.id)
        told = [_read(line) for line in ended.output.splitlines() if line.startswith('{"step"')]
        assert {heard.step for heard in told} == set(STEPS[program]), ended.errors
        return {heard.step: heard for heard in told}

    def _command(self, program: str) -> list[str | Path]:
        if program.endswith(".mjs"):
            return [installs.NODE, self._node_programs / program]
        return [installs.PYTHON, "-m", f"tests.services.clients.{Path(program).stem}"]


@pytest.fixture(scope="session")
def node_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of Node.js, which looks for packages beside a program and above it."""
    folder = tmp_path_factory.mktemp("node-programs")
    for program in _CLIENTS.glob("*.mjs"):
        shutil.copy(program, folder)
    (folder / "node_modules").symlink_to(installs.NODE_MODULES)
    return folder


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def clients(
    request: pytest.FixtureRequest,
    letta: LettaServer,
    gateway: GatewayProcess,
    node_programs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Clients]:
    """The programs whose tests this session runs, on their way."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    programs = {call.params["program"]: None for call in calls if call is not None and "program" in call.params}
    clients = Clients(letta, gateway, node_programs, tmp_path_factory.mktemp("home"))
    clients.start(programs)
    yield clients
    await clients.stop()


@pytest.mark.parametrize(("program", "step"), [(program, step) for program in STEPS for step in STEPS[program]])
async def test_client(clients: Clients, program: str, step: str) -> None:
    heard, wanted = await clients.heard(program, step), expected(step)
    assert not heard.failed, heard.failed
    assert (heard.text, heard.calls, heard.status) == (wanted.text, wanted.calls, wanted.status)
    assert heard.reasoning == wanted.reasoning or not wanted.reasoning
    assert heard.pieces > 1 or not wanted.streamed
