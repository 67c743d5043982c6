"""Codex, headless (`codex exec`): a coding agent over the Responses API."""

import json
from pathlib import Path
from typing import Final

import msgspec
import pytest

from gateway.letta.demo_model import RunningDemoModel
from tests.live.letta_server import LettaServer
from tests.services import installs
from tests.services.surroundings import API_KEY, Client, Ended, run

pytestmark = pytest.mark.asyncio(loop_scope="session")

_CONFIG: Final = """
model = "{model}"
model_provider = "letta"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.letta]
name = "Letta Gateway"
base_url = "{base_url}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
"""
_PLACE: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


class Item(msgspec.Struct):
    """Something that happened in a turn."""

    type: str
    text: str = ""
    aggregated_output: str = ""
    exit_code: int | None = None


class Failure(msgspec.Struct):
    """Why a turn failed."""

    message: str


class Event(msgspec.Struct):
    """One line of `codex exec --json`."""

    type: str
    item: Item | None = None
    error: Failure | None = None


_read = msgspec.json.Decoder(Event).decode


class Codex:
    """Codex in a home of its own."""

    def __init__(self, client: Client, home: Path) -> None:
        self._client = client
        self._home = home
        self._work = home / "work"
        self._work.mkdir()
        config = home / ".codex" / "config.toml"
        config.parent.mkdir()
        config.write_text(_CONFIG.format(model=client.model, base_url=client.base_url))

    async def exec(self, *arguments: str) -> Ended:
        # Its sandbox needs what not every container has; the scripted model runs nothing but what the test names.
        options = ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        command: list[str | Path] = [installs.NODE, installs.CODEX, "exec", *arguments, *options]
        return await run(self._client, command, home=self._home, cwd=self._work, seconds=90)


@pytest.fixture
def codex(client: Client, tmp_path: Path) -> Codex:
    return Codex(client, tmp_path)


def items(ended: Ended, kind: str) -> list[Item]:
    events = [_read(line) for line in ended.output.splitlines()]
    assert events[-1].type == "turn.completed", ended.output + ended.errors
    completed = [event.item for event in events if event.type == "item.completed" and event.item is not None]
    return [item for item in completed if item.type == kind]


def said(ended: Ended) -> list[str]:
    return [item.text for item in items(ended, "agent_message")]


async def test_answer_and_the_session_resumed(codex: Codex, model: RunningDemoModel) -> None:
    assert said(await codex.exec("Hello there, friend.")) == ["You said: Hello there, friend."]
    resumed = await codex.exec("resume", "--last", "And now?")
    assert said(resumed) == ["You said: And now?"]
    seen = bytes(model.requests[-1].body).decode()
    assert seen.count("Hello there, friend.") == 2, "what the user said, and the answer: no transcript again"
    assert seen.count("You are a coding agent running in the Codex CLI") == 1


async def test_tool_loop(codex: Codex, letta: LettaServer) -> None:
    tool = "client_exec_command" if letta.kind == "app_server" else "exec_command"  # one of the App Server's own names
    ended = await codex.exec(f'call {tool} with {{"cmd": "echo it works"}}')
    (ran,) = items(ended, "command_execution")
    assert (ran.aggregated_output, ran.exit_code) == ("it works\n", 0)
    (answer,) = said(ended)
    assert answer.startswith("Tool said: ")
    assert answer.endswith("it works")


async def test_tool_of_a_namespace(codex: Codex) -> None:
    ended = await codex.exec('call multi_agent_v1__close_agent with {"target": "nobody"}')
    (answer,) = said(ended)
    assert answer.startswith("Tool said: invalid agent id nobody")


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_answer_of_a_schema(codex: Codex, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(_PLACE))
    ended = await codex.exec('call answer with {"city": "Rome", "people": 1}', "--output-schema", str(schema))
    (answer,) = said(ended)
    assert json.loads(answer) == {"city": "Rome", "people": 1}


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_reasoning(codex: Codex) -> None:
    ended = await codex.exec("think of Rome")
    assert [item.text for item in items(ended, "reasoning")] == ["I have to think of Rome"]
    assert said(ended) == ["You said: think of Rome"]


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_unknown_model(codex: Codex) -> None:
    ended = await codex.exec("Hello", "--model", "nobody-of-this-name")
    last = _read(ended.output.splitlines()[-1])
    assert last.type == "turn.failed"
    assert last.error is not None
    assert last.error.message.startswith("The model 'nobody-of-this-name' does not exist.")
    assert API_KEY not in ended.output + ended.errors
