import itertools
from collections.abc import AsyncIterator

import pytest

from gateway.errors import AgentGone, MemoryNotFound, UpstreamInvalid, UpstreamRejected, UpstreamTimeout
from gateway.letta import app_server_memory
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.backend import MemoryBlock
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.letta.fake_app_server import AGENT, OTHER, FakeAppServer, hang, replies

HUMAN = "---\nname: Human\ndescription: Who.\n---\nAnn.\n"


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        server.memory[AGENT] = {
            "MEMORY.md": "# Memory\n",
            "persona.md": "---\nname: Persona\ndescription: Me.\n---\nBo.",
            "notes/later.md": "---\nname: L\ndescription: l\n---\nx",
            "face.png": "",
            "human.md": HUMAN,
            "bare.md": "nothing before",
            "system/older.md": "---\ndescription: Old.\n---\nolder",
        }
        yield server


@pytest.fixture
async def tasks() -> TaskSet:
    return TaskSet()


@pytest.fixture
async def backend(server: FakeAppServer, tasks: TaskSet) -> AsyncIterator[AppServerBackend]:
    backend = AppServerBackend(AppServerConfig(server.url), Metrics(), tasks)
    yield backend
    await tasks.close(1)
    await backend.close()


async def test_memory_is_what_stands_in_the_prompt(backend: AppServerBackend) -> None:
    assert await backend.memory(AGENT) == (
        MemoryBlock("bare", "nothing before"),
        MemoryBlock("human", "Ann.", "Who."),
        MemoryBlock("older", "older", "Old."),
        MemoryBlock("persona", "Bo.", "Me."),
    )


async def test_agent_without_memory(backend: AppServerBackend) -> None:
    assert await backend.memory(OTHER) == ()


@pytest.mark.parametrize("wanted", ["agent-local-gone", "../../etc"])
async def test_agent_that_is_gone_is_not_looked_into(
    server: FakeAppServer, backend: AppServerBackend, wanted: str
) -> None:
    server.memory[wanted] = {"human.md": HUMAN}
    with pytest.raises(AgentGone):
        await backend.memory(wanted)
    with pytest.raises(AgentGone):
        await backend.write_memory(wanted, "human", "x")
    assert server.asked("list_memory") == server.asked("write_memory_file") == []


@pytest.mark.parametrize("text", ["Cleo.", "", "---\nno: front\n---\n", "two\n\nlines\n", "äöü €"])
async def test_written_text_stands_below_the_front_matter(
    server: FakeAppServer, backend: AppServerBackend, text: str
) -> None:
    assert await backend.write_memory(AGENT, "human", text) == MemoryBlock("human", text, "Who.")
    assert server.memory[AGENT]["human.md"] == f"---\nname: Human\ndescription: Who.\n---\n{text}"
    assert (await backend.memory(AGENT))[1] == MemoryBlock("human", text.rstrip("\n"), "Who.")


async def test_file_whose_front_matter_ends_it(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.memory[AGENT]["human.md"] = "---\nname: Human\ndescription: Who.\n---"
    await backend.write_memory(AGENT, "human", "Cleo.")
    assert server.memory[AGENT]["human.md"] == "---\nname: Human\ndescription: Who.\n---\nCleo."


async def test_file_without_front_matter_gets_some(server: FakeAppServer, backend: AppServerBackend) -> None:
    await backend.write_memory(AGENT, "bare", "x")
    assert server.memory[AGENT]["bare.md"] == "---\nname: bare\ndescription: bare\n---\nx"


@pytest.mark.parametrize("label", ["MEMORY", "notes/later", "later", "face", "../persona", "persona.md", "", "nothing"])
async def test_block_that_is_not_there(server: FakeAppServer, backend: AppServerBackend, label: str) -> None:
    with pytest.raises(MemoryNotFound):
        await backend.write_memory(AGENT, label, "x")
    assert server.asked("write_memory_file") == []


async def test_file_that_goes_meanwhile(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("read_memory_file", replies(success=False, content=None, error="ENOENT /home/letta/x"))
    with pytest.raises(MemoryNotFound):
        await backend.write_memory(AGENT, "human", "x")


async def test_text_that_the_server_does_not_take(server: FakeAppServer, backend: AppServerBackend) -> None:
    server.on("write_memory_file", replies(success=False, error="Command failed: git in /home/letta"))
    with pytest.raises(UpstreamRejected) as refused:
        await backend.write_memory(AGENT, "human", "x")
    assert "/home" not in refused.value.message


async def test_listing_that_fails_and_one_that_does_not_come(
    server: FakeAppServer, backend: AppServerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_memory, "LIST_TIMEOUT", 0.05)
    server.on("list_memory", replies(success=False, error="EACCES"), replies(entries=7), hang)
    for _ in range(2):
        with pytest.raises(UpstreamInvalid):
            await backend.memory(AGENT)
    with pytest.raises(UpstreamTimeout):
        await backend.memory(AGENT)


# Conversations --------------------------------------------------------------------------------------------------------


async def test_prompts_are_compiled_anew_once_the_memory_is_written(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    before = server.agents[AGENT]
    before["system"] = "Be kind. {CORE_MEMORY}\nAlways."
    systems = []
    for text in ("Cleo.", "Dora.", "Eve."):
        await backend.write_memory(AGENT, "human", text)
        systems.append(server.agents[AGENT]["system"])
    assert systems == [
        "Be kind. {CORE_MEMORY}\nAlways.\n",
        "Be kind. {CORE_MEMORY}\nAlways.",
        "Be kind. {CORE_MEMORY}\nAlways.\n",
    ]
    kinds = [asked["type"] for asked in server.commands]
    assert [kind for kind in kinds if kind in {"write_memory_file", "agent_update"}] == [
        "write_memory_file",
        "agent_update",
    ] * 3
    assert {*itertools.chain(*(asked["body"] for asked in server.asked("agent_update")))} == {"system"}


async def test_server_that_fails_to_compile_is_not_passed_over(
    server: FakeAppServer, backend: AppServerBackend
) -> None:
    server.on("agent_update", replies(success=False, error="EACCES /home/letta"))
    with pytest.raises(UpstreamInvalid):
        await backend.write_memory(AGENT, "human", "Cleo.")


async def test_memory_of_an_agent_that_is_deleted_is_emptied(server: FakeAppServer, backend: AppServerBackend) -> None:
    await backend.delete_agent(AGENT)
    said = "".join(server.memory[AGENT].values())
    assert not any(word in said for word in ("Ann.", "Bo.", "nothing before", "older\n", "\nx"))
    assert server.memory[AGENT]["human.md"].startswith("---\n"), "without it the server commits no change"
    await backend.delete_agent("agent-local-gone")
