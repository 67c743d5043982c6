"""The command `llm`, pointed at an OpenAI-compatible endpoint as its help says."""

from pathlib import Path
from typing import Final

import pytest

from tests.services import installs
from tests.services.heard import expected
from tests.services.surroundings import API_KEY, Client, Ended, run

pytestmark = pytest.mark.asyncio(loop_scope="session")

_TOOLS: Final = '''
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It is sunny in {city}."

def get_time(city: str) -> str:
    """Tell the time of a city."""
    return f"It is noon in {city}."
'''
_STREAMED: Final = ((), ("--responses",))
_WAYS: Final = (*_STREAMED, ("--no-stream",), ("--responses", "--no-stream"))


async def llm(client: Client, home: Path, *arguments: str, model: str | None = None) -> Ended:
    whom = ("openai", "endpoint", client.base_url, "--model", model or client.model, "--key", API_KEY)
    more = {"LLM_USER_PATH": str(home)}
    return await run(client, [installs.LLM, *whom, *arguments], home=home, cwd=home, seconds=60, more=more)


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_models(client: Client, tmp_path: Path) -> None:
    ended = await llm(client, tmp_path, "--models")
    assert client.model in ended.output.split(), ended.errors


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
@pytest.mark.parametrize("way", _STREAMED, ids=" ".join)
async def test_answer(client: Client, tmp_path: Path, way: tuple[str, ...]) -> None:
    ended = await llm(client, tmp_path, "Hello there, friend.", "--system", "You guide travellers.", *way)
    assert ended.output.strip() == expected("plain").text, ended.errors


@pytest.mark.parametrize("way", _WAYS, ids=" ".join)
async def test_tool_loop(client: Client, tmp_path: Path, way: tuple[str, ...]) -> None:
    ended = await llm(client, tmp_path, "call get_weather and get_time now", "--functions", _TOOLS, *way)
    assert ended.output.strip() == expected("tool_loop").text, ended.errors


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
@pytest.mark.parametrize("way", _STREAMED, ids=" ".join)
async def test_answer_of_a_schema(client: Client, tmp_path: Path, way: tuple[str, ...]) -> None:
    asked = 'call answer with {"city": "Rome", "people": 2800000}'
    ended = await llm(client, tmp_path, asked, "--schema", "city, people int", *way)
    assert "".join(ended.output.split()) == expected("structured").text, ended.errors


@pytest.mark.parametrize("letta", ["app_server"], indirect=True)
async def test_unknown_model(client: Client, tmp_path: Path) -> None:
    ended = await llm(client, tmp_path, "Hello", model="nobody-of-this-name")
    assert ended.status == 1
    assert "404" in ended.errors
    assert "The model 'nobody-of-this-name' does not exist." in ended.errors
