"""The walk through the platform API in the README, as somebody pastes it, with nothing configured."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

from tests.live.test_embedded import at_home

pytestmark = pytest.mark.services

README: Final = Path(__file__).parents[2] / "README.md"
_PATIENCE: Final = 60.0


def walk_through() -> str:
    """Return the commands between the README's marks."""
    found = re.search(
        r"<!-- walk-through -->\n```bash\n(.*?)```\n<!-- /walk-through -->", README.read_text(), re.DOTALL
    )
    assert found is not None
    return found[1]


async def pasted(commands: str) -> str:
    """Run commands as a shell does; return what they print."""
    shell = await asyncio.create_subprocess_exec(
        "bash",
        "-euo",
        "pipefail",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(_PATIENCE):
        said, problems = await shell.communicate(commands.encode())
    assert shell.returncode == 0, problems.decode()
    return said.decode()


async def test_from_registration_to_a_personal_key(tmp_path: Path) -> None:
    prices = '{"*": {"prompt": 2.5, "completion": 10}}'
    async with at_home(tmp_path, LETTA_GATEWAY_PRICES=prices) as gateway:
        said = await pasted(walk_through().replace(":8080", f":{gateway.port}"))
    events = re.findall(r"^event: (\w+)$", said, re.MULTILINE)
    assert (events[0], events[-2:]) == ("start", ["usage", "done"])
    assert set(events) == {"start", "text", "usage", "done"}
    told = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line.startswith("data: ")]
    streamed = told[-1]["message"]
    whole, history, usage, memory, written, models = _objects(said)
    assert "You said: And again" in whole["message"]["text"]
    assert [message["text"] for message in history["data"][:2]] == [whole["message"]["text"], "And again"]
    assert [message["role"] for message in history["data"]] == ["assistant", "user", "assistant", "user"]
    assert history["data"][2] == streamed
    assert usage["totals"]["turns"] == 2
    counted = [message["usage"] for message in (streamed, whole["message"])]
    for count in ("prompt_tokens", "completion_tokens"):
        assert usage["totals"][count] == sum(each[count] for each in counted)
    assert usage["totals"]["cost"] != "0.000000"
    assert [block["value"] for block in memory["data"] if block["label"] == "human"] == ["Name: Ann"]
    assert written["value"] == "Name: Ann. She likes short answers."
    assert [model["id"].startswith("Ann") for model in models["data"]] == [True]


def _objects(said: str) -> list[Any]:
    """Return the JSON objects that stand outside of events."""
    text = re.sub(r"^(event|data): .*$", "", said, flags=re.MULTILINE).strip()
    decoder, found, place = json.JSONDecoder(), [], 0
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        found.append(value)
        while place < len(text) and text[place].isspace():
            place += 1
    return found
