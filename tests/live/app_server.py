"""A real App Server (PyPI `letta`, `letta server --listen`) with the demo model behind it, for tests and by hand.

`running_app_server(model)` gives an `AppServer`; everything it starts ends with the context, or with this process.
`python -m tests.live.app_server [--port 4500]` runs one in the foreground, with an agent named Milo.
"""

import argparse
import asyncio
import base64
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from gateway.letta.demo_model import MODEL, RunningDemoModel
from tests.live import processes
from tests.live.letta_server import Agent, Kind
from tests.live.model_thread import demo_model_in_thread

MODEL_HANDLE = f"lmstudio/{MODEL}"
_LETTA = Path(sys.executable).with_name("letta")
INTERRUPTED = "The user interrupted the active stream."
"""What the model is told in the turn after one that was cancelled, on the socket that cancelled it."""
_READY = 60.0
_ANSWER = 30.0


class _Usage(msgspec.Struct, frozen=True, rename="camel"):
    input: int
    output: int
    cache_read: int


class _Message(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Line(msgspec.Struct):
    timestamp: str
    message: _Message = _Message()


class _Conversation(msgspec.Struct):
    agent_id: str


class AppServerError(Exception):
    """The server did not do what a helper asked for."""


class AppServer:
    """An App Server that can be stopped and started again on the same port and state."""

    kind: Kind = "app_server"

    def __init__(self, port: int, home: Path, model: RunningDemoModel, environment: Mapping[str, str]) -> None:
        self.port = port
        self.model = model
        self.log = home / "letta.log"
        self._home = home
        self._environment = environment
        self._program: processes.Program | None = None
        self._numbers = itertools.count(1)

    @property
    def base_url(self) -> str:
        """What LETTA_BASE_URL is set to, as the server itself says it."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def http_url(self) -> str:
        """What LETTA_BASE_URL is set to by somebody who takes it for a web server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        if self._program and self._program.running:
            return
        work = self._home / "work"
        work.mkdir(exist_ok=True)
        command: list[str | Path] = [_LETTA, "server", "--backend", "local", "--listen", self.base_url]
        # The guard is the parent, which Letta watches: when it goes away, so does Letta.
        self._program = processes.start(command, log=self.log, env=self._environment, cwd=work)
        end = time.monotonic() + _READY
        while not self.healthy():
            if not self._program.running or time.monotonic() > end:
                self._program.stop()
                raise AppServerError(f"the App Server did not get ready; its log ends:\n{processes.tail(self.log)}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the server as `kill -9` does; `start` brings it back."""
        if self._program:
            self._program.kill()
            self._program.stop()

    def freeze(self) -> None:
        """Stop the server without ending it: connections stay open, nothing is answered."""
        if self._program:
            self._program.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        if self._program:
            self._program.signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the server for good."""
        if self._program:
            self._program.stop()

    def healthy(self) -> bool:
        """Whether the server says that it is ready."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.http_url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def create_agent(self, name: str | None = None) -> Agent:
        """Create an agent on the demo model."""
        body = {"name": name or f"agent-{next(self._numbers)}", "model": MODEL_HANDLE}
        return msgspec.convert(self.ask("agent_create", body=body)["agent"], Agent)

    @contextlib.contextmanager
    def crowd(self, names: Sequence[str]) -> Iterator[None]:
        """Have many more agents, put into the state of the stopped server: making one takes it half a second."""
        agents = [Agent(f"agent-local-{uuid.uuid4()}", name) for name in names]
        self.kill()
        for agent in agents:
            record = {"id": agent.id, "name": agent.name, "model": MODEL_HANDLE, "system": "", "tags": []}
            path = self._record(agent.id)
            path.parent.mkdir(parents=True, exist_ok=True)  # the server makes it with its first agent
            path.write_bytes(msgspec.json.encode({**record, "model_settings": {}}))
        self.start()
        try:
            yield
        finally:
            self.kill()
            for agent in agents:
                self._record(agent.id).unlink()
            self.start()

    def delete_agent(self, agent_id: str) -> None:
        """Delete an agent, if it is there."""
        with contextlib.suppress(AppServerError):
            self.ask("agent_delete", agent_id=agent_id)

    def counted(self, agent_id: str) -> tuple[int, int]:
        """Return the prompt and completion tokens of all steps that an agent has taken, as the server keeps them."""
        steps: dict[str, _Usage] = {}  # the copy of a conversation has the steps of the original
        for folder in (self._home / ".letta" / "lc-local-backend" / "conversations").iterdir():
            about = msgspec.json.decode((folder / "conversation.json").read_bytes(), type=_Conversation)
            stored = folder / "messages.jsonl"
            if about.agent_id == agent_id and stored.exists():
                for line in stored.read_bytes().splitlines():
                    stored_line = msgspec.json.decode(line, type=_Line)
                    if stored_line.message.usage is not None:
                        steps[stored_line.timestamp] = stored_line.message.usage
        return sum(step.input + step.cache_read for step in steps.values()), sum(step.output for step in steps.values())

    def memory_files(self, agent_id: str) -> list[str]:
        """Return what the files of an agent's memory say on the disk, whether it is there or not."""
        (folder,) = (self._home / ".letta").glob(f"**/memfs/{agent_id}/memory")
        return [path.read_text() for path in folder.rglob("*.md")]

    def ask(self, command: str, **fields: object) -> dict[str, Any]:
        """Send one command on a socket of its own and give the reply; from any thread, whatever runs in it."""
        with ThreadPoolExecutor(1) as thread:
            reply = thread.submit(asyncio.run, self._ask({"type": command, "request_id": "test", **fields})).result()
        if not reply.get("success"):
            raise AppServerError(f"{command}: {reply}")
        return reply

    async def _ask(self, command: Mapping[str, object]) -> dict[str, Any]:
        async with (
            asyncio.timeout(_ANSWER),
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.base_url}/ws", max_msg_size=0) as socket,
        ):
            await socket.send_str(msgspec.json.encode(command).decode())
            async for message in socket:
                frame = msgspec.json.decode(message.data, type=dict[str, Any])
                if frame.get("request_id") == command["request_id"]:
                    return frame
        raise AppServerError(f"{command['type']}: the server hung up")

    def _record(self, agent_id: str) -> Path:
        name = base64.urlsafe_b64encode(agent_id.encode()).decode().rstrip("=")
        return self._home / ".letta" / "lc-local-backend" / "agents" / f"{name}.json"


@contextlib.contextmanager
def running_app_server(
    model: RunningDemoModel, *, port: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[AppServer]:
    """Run an App Server whose LM Studio is this model, its state in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="app-server-", ignore_cleanup_errors=True) as folder:
        settings = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": folder,
            "LMSTUDIO_BASE_URL": model.base_url,
            "DO_NOT_TRACK": "1",
            "LETTA_CODE_TELEM": "0",
            **(environment or {}),
        }
        server = AppServer(port or processes.free_port(), Path(folder), model, settings)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def main() -> None:
    """Run a server in the foreground."""
    parser = argparse.ArgumentParser(description="Run an App Server with the demo model behind it.")
    parser.add_argument("--port", type=int, default=4500)
    port: int = parser.parse_args().port
    with demo_model_in_thread() as model, running_app_server(model, port=port) as server:
        agent = server.create_agent("Milo")
        sys.stdout.write(f"App Server: LETTA_BASE_URL={server.base_url}  agent Milo: {agent.id}\n")
        sys.stdout.write(f"demo model: {model.base_url}  log: {server.log}  (Ctrl-C ends it)\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
