"""The pipeline's file alone, with the packages alone that it names: before a gateway, and before a Letta V1 server."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from tests.live.letta_server import Agent
from tests.live.v1_server import V1Server
from tests.open_webui.shared_part import FOLDER
from tests.server.subprocesses import GatewayProcess
from tests.services import installs
from tests.services.surroundings import API_KEY, Client, base_url, run

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("letta", ["v1"], indirect=True),
]

_ROOT: Final = Path(__file__).parents[2]
_PROGRAM: Final = _ROOT / "tests" / "services" / "clients" / "pipeline_alone.py"
_LOADER: Final = _ROOT / "tests" / "open_webui" / "pipelines_server.py"


class Told(msgspec.Struct):
    """What the program heard."""

    streamed: str
    whole: dict[str, Any]
    requirements: list[str]


@pytest.mark.parametrize("way", ["gateway", "letta"])
async def test_chat(letta: V1Server, gateway: GatewayProcess, agent: Agent, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "pipelines"
    (folder / "pipeline").mkdir(parents=True)
    shutil.copy(FOLDER / "pipeline.py", folder)
    for file in (_PROGRAM, _LOADER):
        shutil.copy(file, tmp_path)
    url = base_url(gateway) if way == "gateway" else letta.base_url
    valves = {"base_url": url, "api_key": API_KEY if way == "gateway" else ""}
    (folder / "pipeline" / "valves.json").write_text(json.dumps(valves))
    command: list[str | Path] = [installs.PIPELINE_PYTHON, "-W", "error", tmp_path / _PROGRAM.name, folder]
    client = Client(url, agent.name)
    ended = await run(client, [*command, f"Letta: {agent.name}"], home=tmp_path, cwd=tmp_path, seconds=120)
    assert ended.status == 0, ended.errors
    told = msgspec.json.decode(ended.output, type=Told)
    *lines, done = [line.removeprefix("data: ") for line in told.streamed.split("\n\n")]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line).get("choices", [])]
    assert done == "[DONE]"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I have to think about tea"
    assert "".join(delta.get("content", "") for delta in deltas) == "You said: think about tea"
    assert told.whole["choices"][0]["message"]["content"].startswith("You said: ### Task:")
    assert told.requirements == ["httpx", " pydantic"]
