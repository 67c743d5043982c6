"""A real Letta V1 server with the demo model behind it, for tests, benches and trying things by hand.

`running_v1(model_base_url)` gives a `V1Server`; everything it starts ends with the context, or with this process.
`python -m tests.live.v1_server [--port 8283]` runs one in the foreground, with an agent named Milo.
"""

import argparse
import contextlib
import itertools
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from gateway.letta.demo_model import MODEL
from tests.live import processes
from tests.live.letta_server import Agent, Kind
from tests.live.model_thread import demo_model_in_thread
from tests.live.postgres import running_postgres
from tests.live.setup_v1 import SERVER_VENV, TEMPLATE, missing, server_environment, set_up, state_folder

MODEL_HANDLE = f"openai-proxy/{MODEL}"
EMBEDDING_HANDLE = "openai/text-embedding-3-small"
_READY = 120.0
_ANSWER = 30.0


class Memory(msgspec.Struct, frozen=True):
    """A memory block of an agent that is to be."""

    label: str
    value: str


class _NewAgent(msgspec.Struct, frozen=True):
    name: str
    agent_type: str
    model: str
    embedding: str
    include_base_tools: bool
    include_base_tool_rules: bool
    memory_blocks: Sequence[Memory]
    tags: Sequence[str] = ()
    parallel_tool_calls: bool = True
    """What OpenAI's API does unless told otherwise, and Letta does not."""


class _NewTool(msgspec.Struct, frozen=True):
    source_code: str
    default_requires_approval: bool = False


class _Tool(msgspec.Struct):
    id: str


class _Run(msgspec.Struct):
    status: str
    id: str = ""


class _Step(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class V1Error(Exception):
    """The server did not do what a helper asked for."""


class V1Server:
    """A Letta V1 server that can be stopped and started again on the same port and database."""

    kind: Kind = "v1"

    def __init__(self, port: int, environment: Mapping[str, str], home: Path) -> None:
        self.port = port
        self.log = home / "letta.log"
        self._environment = environment
        self._home = home
        self._program: processes.Program | None = None
        self._numbers = itertools.count(1)

    @property
    def base_url(self) -> str:
        """What LETTA_BASE_URL is set to, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        if self._program and self._program.running:
            return
        command: list[str | Path] = [
            SERVER_VENV / "bin" / "letta",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        self._program = processes.start(command, log=self.log, env=self._environment, cwd=self._home)
        end = time.monotonic() + _READY
        while not self.healthy():
            if not self._program.running or time.monotonic() > end:
                self._program.stop()
                raise V1Error(f"the Letta server did not get ready; the end of its log:\n{processes.tail(self.log)}")
            time.sleep(0.1)

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
        """Whether the server says that it is well."""
        try:
            self.call("GET", "/v1/health/", timeout=2)
        except (V1Error, OSError):
            return False
        return True

    def create_agent(
        self,
        name: str | None = None,
        *,
        agent_type: str = "letta_v1_agent",
        base_tools: bool | None = None,
        memory: Sequence[Memory] = (),
        tags: Sequence[str] = (),
    ) -> Agent:
        """Create an agent; without base tools, unless it is of a legacy type, which cannot speak without them."""
        with_tools = agent_type != "letta_v1_agent" if base_tools is None else base_tools
        wanted = _NewAgent(
            name or f"agent-{next(self._numbers)}",
            agent_type,
            MODEL_HANDLE,
            EMBEDDING_HANDLE,
            with_tools,
            with_tools,
            memory,
            tags,
        )
        return msgspec.json.decode(self.call("POST", "/v1/agents/", wanted), type=Agent)

    def attach_tool(self, agent: Agent, source: str, *, needs_approval: bool = False) -> None:
        """Give an agent a tool that runs on the server: a Python function with a docstring."""
        made = self.call("PUT", "/v1/tools/", _NewTool(source, needs_approval))
        tool = msgspec.json.decode(made, type=_Tool)
        self.call("PATCH", f"/v1/agents/{agent.id}/tools/attach/{tool.id}")

    @contextlib.contextmanager
    def crowd(self, names: Sequence[str]) -> Iterator[None]:
        """Have many more agents."""
        made = [self.create_agent(name) for name in names]
        try:
            yield
        finally:
            for agent in made:
                self.delete_agent(agent.id)

    def delete_agent(self, agent_id: str) -> None:
        """Delete an agent, if it is there."""
        with contextlib.suppress(V1Error):
            self.call("DELETE", f"/v1/agents/{agent_id}")

    def counted(self, agent_id: str) -> tuple[int, int]:
        """Return the prompt and completion tokens of all steps that an agent has taken, as the server keeps them."""
        runs = msgspec.json.decode(self.call("GET", f"/v1/runs/?agent_id={agent_id}&limit=1000"), type=list[_Run])
        steps: list[_Step] = []
        for run in runs:
            steps += msgspec.json.decode(self.call("GET", f"/v1/runs/{run.id}/steps?limit=1000"), type=list[_Step])
        return sum(step.prompt_tokens for step in steps), sum(step.completion_tokens for step in steps)

    def cancelled_within(self, agent: Agent, seconds: float) -> bool:
        """Tell whether the agent's newest run becomes a cancelled one, in so many seconds."""
        end = time.monotonic() + seconds
        while True:
            runs = msgspec.json.decode(self.call("GET", f"/v1/runs/?agent_id={agent.id}"), type=list[_Run])
            if runs and runs[0].status == "cancelled":
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)

    def call(self, method: str, path: str, body: object = None, *, timeout: float = _ANSWER) -> bytes:
        """Send one request and give the body of the answer."""
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base_url + path, data, headers, method=method)  # noqa: S310 - it is http
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as refused:
            with refused:
                raise V1Error(f"{method} {path}: {refused.code} {refused.read().decode(errors='replace')}") from None


@contextlib.contextmanager
def running_v1(
    model_base_url: str, *, port: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[V1Server]:
    """Run PostgreSQL and a Letta server whose OpenAI is the model at that address."""
    if problem := missing():
        raise V1Error(problem)
    with state_folder() as state, running_postgres(state, TEMPLATE) as database:
        home = state / "home"
        home.mkdir()
        settings = {
            **server_environment(database, home),
            # It makes some 25 connections for a turn otherwise, and one that hangs stops it for a minute.
            "LETTA_DISABLE_SQLALCHEMY_POOLING": "false",
            "OPENAI_API_KEY": "demo",
            "OPENAI_API_BASE": model_base_url,
            **(environment or {}),
        }
        server = V1Server(port or processes.free_port(), settings, home)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def main() -> None:
    """Run a server in the foreground."""
    parser = argparse.ArgumentParser(description="Run a Letta V1 server with the demo model behind it.")
    parser.add_argument("--port", type=int, default=8283)
    port: int = parser.parse_args().port
    set_up()
    with demo_model_in_thread() as model, running_v1(model.base_url, port=port) as server:
        agent = server.create_agent("Milo", memory=[Memory("persona", "I am Milo."), Memory("human", "Somebody new.")])
        sys.stdout.write(f"Letta V1: LETTA_BASE_URL={server.base_url}  agent Milo: {agent.id}\n")
        sys.stdout.write(f"demo model: {model.base_url}  log: {server.log}  (Ctrl-C ends it)\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
