"""The real Open WebUI in headless Chromium: an agent by both kinds of connection, and by the Function alone.

What it looked like is kept under ``.cache/screenshots``.
"""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
import pytest_asyncio

from tests.live.letta_server import Agent
from tests.live.test_chat import png
from tests.live.v1_server import V1Server
from tests.open_webui.shared_part import FOLDER
from tests.server.subprocesses import GatewayProcess
from tests.services import installs
from tests.services.open_webui.pipelines import running_pipelines
from tests.services.open_webui.server import RESPONSES, TITLE, OpenWebUI, running_open_webui
from tests.services.people import eventually
from tests.services.surroundings import API_KEY, Client, base_url, run

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("letta", ["v1"], indirect=True),
    pytest.mark.timeout(900),
]

_PAGE: Final = Path(__file__).parent / "clients" / "open_webui.mjs"
_SCREENSHOTS: Final = Path(__file__).parents[2] / ".cache" / "screenshots"
_OF_OPEN_WEBUI: Final = "get_current_timestamp"
_OF_LETTA: Final = "tell_weather"
_TOOL: Final = f'''
def {_OF_LETTA}(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city (str): Which city.
    """
    return f"It is sunny in {{city}}."
'''


class Told(msgspec.Struct):
    """What the page shows after each step."""

    thought: str
    tool: str
    again: str
    failed: str
    stopped: str
    chat: str


class _Row(msgspec.Struct):
    id: str


@pytest.fixture(scope="session")
def companion(letta: V1Server) -> Agent:
    agent = letta.create_agent("Milo")
    letta.attach_tool(agent, _TOOL)
    return agent


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def open_webui(
    letta: V1Server, gateway: GatewayProcess, companion: Agent, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[OpenWebUI]:
    home, folder = tmp_path_factory.mktemp("open-webui"), tmp_path_factory.mktemp("pipelines")
    by_the_gateway = {"base_url": base_url(gateway), "api_key": API_KEY}
    async with (
        running_pipelines(folder, by_the_gateway) as pipelines,
        running_open_webui(home, base_url(gateway), API_KEY, pipelines) as running,
    ):
        function = (FOLDER / "function.py").read_text("utf-8")
        await running.add_function("letta_v1", function, {"base_url": letta.base_url})
        await running.add_function("letta_gateway", function, by_the_gateway)
        yield running


def said_to(letta: V1Server, agent: Agent) -> list[bytes]:
    """Return the messages of the agent's own thread, and of each conversation that it has."""
    rows = msgspec.json.decode(letta.call("GET", f"/v1/conversations/?agent_id={agent.id}"), type=list[_Row])
    threads = [letta.call("GET", f"/v1/conversations/{row.id}/messages?limit=100") for row in rows]
    return [letta.call("GET", f"/v1/agents/{agent.id}/messages?limit=100"), *threads]


async def test_agent_can_be_picked_each_way(open_webui: OpenWebUI, companion: Agent) -> None:
    models = await open_webui.models()
    assert models[companion.name] == companion.name
    assert models[f"{RESPONSES}.{companion.name}"] == f"{RESPONSES}.{companion.name}"
    assert models[f"letta_v1.{companion.id}"] == f"Letta: {companion.name}"
    assert models[f"letta_gateway.{companion.name}"] == f"Letta: {companion.name}"
    assert models[f"letta.{companion.name}"] == f"Letta: {companion.name}"


PNG: Final = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png()}"}}


def ways(agent: Agent) -> dict[str, str]:
    """Return the model of an agent in each way that Open WebUI has it."""
    return {
        "chat": agent.name,
        "responses": f"{RESPONSES}.{agent.name}",
        "function": f"letta_v1.{agent.id}",
        "function by a gateway": f"letta_gateway.{agent.name}",
        "pipelines": f"letta.{agent.name}",
    }


FAILED: Final = "did not accept this message|model provider failed"
"""What a gateway says, and the Function straight to Letta, of a model that answers 400."""
WAYS: Final = tuple(ways(Agent("", "")))


@pytest.mark.parametrize("way", WAYS)
async def test_image_and_an_error(open_webui: OpenWebUI, companion: Agent, way: str) -> None:
    look = {"role": "user", "content": [{"type": "text", "text": "describe image"}, PNG]}
    seen = await open_webui.chat(ways(companion)[way], look)
    assert "I see 1 images: image/png" in json.dumps(seen)
    heard = await open_webui.stream(ways(companion)[way], "fail with 400")
    assert re.search(FAILED.encode(), heard)


@pytest.mark.parametrize("way", WAYS)
async def test_client_that_leaves_ends_the_run(
    open_webui: OpenWebUI, letta: V1Server, companion: Agent, way: str
) -> None:
    await open_webui.stream(ways(companion)[way], "count to 2000 every 20 ms", until=b"word3")
    assert await asyncio.to_thread(letta.cancelled_within, companion, 8.0)


async def test_pipelines_chat_has_a_conversation_of_its_own(
    open_webui: OpenWebUI, letta: V1Server, companion: Agent
) -> None:
    said = {"role": "user", "content": "Hello by Pipelines"}
    answer = await open_webui.chat(ways(companion)["pipelines"], said, chat_id="temporary:pipelines")
    assert answer["choices"][0]["message"]["content"] == "You said: Hello by Pipelines"
    _, *conversations = said_to(letta, companion)
    assert sum(b"Hello by Pipelines" in conversation for conversation in conversations) == 1


@pytest.mark.parametrize("way", ["chat", "responses", "function"])
async def test_chat(open_webui: OpenWebUI, letta: V1Server, companion: Agent, tmp_path: Path, way: str) -> None:
    model, name, tool = {
        "chat": (companion.name, companion.name, _OF_OPEN_WEBUI),
        "responses": (f"{RESPONSES}.{companion.name}", f"{RESPONSES}.{companion.name}", _OF_OPEN_WEBUI),
        "function": (f"letta_v1.{companion.id}", f"Letta: {companion.name}", _OF_LETTA),
    }[way]
    told = await _in_the_page(open_webui, tmp_path, way=way, model=model, name=name, tool=tool)
    assert "I have to think and count to 3" in told.thought
    assert "word0 word1 word2" in told.thought
    assert tool in told.tool
    assert f"I have to think and call {tool} now" in told.tool
    found = "sunny in Paris" if tool == _OF_LETTA else "current_timestamp"
    assert found in told.tool
    assert found in told.again
    assert re.search(FAILED, told.failed)
    assert "word9" in told.stopped
    assert "word1999" not in told.stopped
    assert await asyncio.to_thread(letta.cancelled_within, companion, 8.0)
    await eventually(lambda: _has_title(open_webui, told.chat))
    threads = said_to(letta, companion)
    assert any(b"count to 3" in thread for thread in threads)
    assert not any(TITLE.encode() in thread for thread in threads), "the agent heard of the title"


async def _has_title(open_webui: OpenWebUI, chat_id: str) -> bool:
    return await open_webui.title(chat_id) == TITLE


async def _in_the_page(open_webui: OpenWebUI, home: Path, **what: str) -> Told:
    shutil.copy(_PAGE, home)
    (home / "node_modules").symlink_to(installs.NODE_MODULES)
    _SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    said = {"base": open_webui.base_url, "token": open_webui.token, "folder": str(_SCREENSHOTS), **what}
    command: list[str | Path] = [installs.NODE, home / _PAGE.name, msgspec.json.encode(said).decode()]
    ended = await run(Client(open_webui.base_url, what["model"]), command, home=home, cwd=home, seconds=600)
    assert ended.status == 0, ended.errors
    return msgspec.json.decode(ended.output, type=Told)
