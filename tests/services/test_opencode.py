"""opencode, headless (`opencode run`): a coding agent over chat completions."""

import json
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from tests.services import installs
from tests.services.surroundings import API_KEY, Client, Ended, run

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not installs.OPENCODE.exists(), reason="opencode is pinned for Linux on x86-64 alone"),
]

_NOBODY: Final = "nobody-of-this-name"
_QUIET: Final = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
}


class State(msgspec.Struct):
    """What became of a tool's call."""

    status: str
    output: str = ""


class Part(msgspec.Struct):
    """A part of an answer."""

    text: str = ""
    tool: str = ""
    state: State | None = None


class Event(msgspec.Struct):
    """One line of `opencode run --format json`."""

    type: str
    part: Part = msgspec.field(default_factory=Part)
    error: Any = None


_read = msgspec.json.Decoder(Event).decode


class Opencode:
    """opencode in a home of its own."""

    def __init__(self, client: Client, home: Path) -> None:
        self._client = client
        self._home = home
        self._work = home / "work"
        self._work.mkdir()
        (self._work / "opencode.json").write_text(json.dumps(_config(client)))

    async def run(self, text: str, *options: str) -> Ended:
        # It puts quotes around an argument with blanks: the text goes in word by word.
        command: list[str | Path] = [installs.OPENCODE, "run", "--format", "json", *options, *text.split(" ")]
        return await run(self._client, command, home=self._home, cwd=self._work, seconds=120, more=_QUIET)


def _config(client: Client) -> dict[str, object]:
    models = {name: {"name": name, "tool_call": True, "reasoning": True} for name in (client.model, _NOBODY)}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Letta Gateway",
        "options": {"baseURL": client.base_url, "apiKey": API_KEY},
        "models": models,
    }
    chosen = f"letta/{client.model}"
    return {
        "model": chosen,
        "small_model": chosen,
        "autoupdate": False,
        "share": "disabled",
        "enabled_providers": ["letta"],
        "provider": {"letta": provider},
    }


@pytest.fixture
def opencode(client: Client, tmp_path: Path) -> Opencode:
    return Opencode(client, tmp_path)


def events(ended: Ended) -> list[Event]:
    assert ended.output, ended.errors
    return [_read(line) for line in ended.output.splitlines()]


def texts(ended: Ended, kind: str = "text") -> list[str]:
    return [event.part.text for event in events(ended) if event.type == kind]


async def test_tool_loop_and_the_session_continued(opencode: Opencode) -> None:
    ended = await opencode.run('call bash with {"command": "echo it works", "description": "Says so"}')
    (used,) = (event.part for event in events(ended) if event.type == "tool_use")
    assert (used.tool, used.state) == ("bash", State("completed", "it works\n"))
    assert texts(ended) == ["Tool said: it works"]
    ended = await opencode.run("think of Rome", "--continue", "--thinking")
    assert texts(ended) == ["You said: think of Rome"]
    assert texts(ended, "reasoning") == ["I have to think of Rome"]


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_answer(opencode: Opencode) -> None:
    assert texts(await opencode.run("Hello there, friend.")) == ["You said: Hello there, friend."]


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_unknown_model(opencode: Opencode) -> None:
    (failed,) = (event for event in events(await opencode.run("Hello", "--model", f"letta/{_NOBODY}")) if event.error)
    assert failed.error["data"]["statusCode"] == 404
    assert failed.error["data"]["message"].startswith(f"The model '{_NOBODY}' does not exist.")
