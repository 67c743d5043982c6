"""An agent's memory on the App Server: the files at the root of its memory tree, which stand in its system prompt.

A file begins with front matter, ``description`` in it; without that the server commits no change, and leaves the file
changed all the same. It reads and writes files of agents that are not there too, so the agent is asked for first. A
conversation hears of a change in its next turn and goes back to the memory that it began with in the one after, until
its prompt is compiled again. Asked for one conversation at a time that takes a sixth of a second each and is lost where
a turn begins meanwhile; but a change of the agent's own system prompt has the server compile every conversation's
prompt in its next turn, so the white space at that prompt's end is changed with the memory (letta 0.34.12).
"""

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.errors import MemoryNotFound, UpstreamInvalid, UpstreamRejected
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_socket import new_request_id
from gateway.letta.backend import MemoryBlock

if TYPE_CHECKING:
    from gateway.letta.app_server import AppServerBackend

LIST_TIMEOUT: Final = 15.0
"""Seconds for each page of a listing."""
ENDING: Final = ".md"
SYSTEM: Final = "system/"
"""Where the files are that stand in the prompt, in trees of an older kind."""
INDEX: Final = "MEMORY.md"
"""The index of what the agent may look up: the server's own affair."""
FENCE: Final = "---\n"


class AppServerMemory:
    """The memory of an App Server's agents."""

    def __init__(self, backend: "AppServerBackend") -> None:
        self._backend = backend

    async def blocks(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return an agent's memory, in the order of labels; raises ``AgentGone``."""
        found = [(_label(entry.relative_path), entry) for entry in await self._files(agent_id, _is_block)]
        return tuple(
            MemoryBlock(label, entry.content.rstrip("\n"), entry.description)
            for label, entry in sorted(found, key=lambda pair: pair[0])
        )

    async def write(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace what a file says, below its front matter; raises ``AgentGone`` and ``MemoryNotFound``."""
        blocks = await self._files(agent_id, _is_block)
        entry = next((entry for entry in blocks if _label(entry.relative_path) == label), None)
        if entry is None:
            raise MemoryNotFound
        content = _front_matter(await self._read(agent_id, entry.relative_path), entry) + value
        command = wire.WriteMemoryFile(
            request_id=new_request_id(), agent_id=agent_id, path=entry.relative_path, content=content
        )
        reply = await self._backend.reply(await self._backend.control_socket(), command)
        if not reply.success:
            raise UpstreamRejected(
                "The Letta server did not take this text into the agent's memory. Shorten it, or ask the operator "
                "about the limits of the agent's memory.",
                should_retry=False,
            )
        await self._compile_prompts(agent_id)
        return MemoryBlock(label, value, entry.description)

    async def blank(self, agent_id: str) -> None:
        """Empty the files of a memory; raises ``AgentGone``. What they said before stays in their git history."""
        for entry in await self._files(agent_id, lambda path: path.endswith(ENDING)):
            try:
                content = _front_matter(await self._read(agent_id, entry.relative_path), entry)
            except MemoryNotFound:
                continue
            command = wire.WriteMemoryFile(
                request_id=new_request_id(), agent_id=agent_id, path=entry.relative_path, content=content
            )
            await self._backend.reply(await self._backend.control_socket(), command)

    async def _files(self, agent_id: str, concerned: Callable[[str], bool]) -> list[wire.MemoryFile]:
        """Return the files whose paths are asked for."""
        await self._backend.row(agent_id)
        socket = await self._backend.control_socket()
        files: list[wire.MemoryFile] = []
        command = wire.ListMemory(request_id=new_request_id(), agent_id=agent_id)
        async with aclosing(socket.ask_pages(command, LIST_TIMEOUT)) as pages:
            async for data in pages:
                page = _decoded(data)
                files.extend(entry for entry in page.entries if concerned(entry.relative_path))
                if page.done:
                    break
        return files

    async def _read(self, agent_id: str, path: str) -> str:
        command = wire.ReadMemoryFile(request_id=new_request_id(), agent_id=agent_id, path=path)
        reply = await self._backend.reply_of(await self._backend.control_socket(), command, wire.FileReply)
        if reply.content is None:  # it was deleted just now
            raise MemoryNotFound
        return reply.content

    async def _compile_prompts(self, agent_id: str) -> None:
        """Have each conversation's next turn see the memory as it is.

        The prompt is read after the memory was written: of two gateways that read the same one, the first to change it
        does so after both wrote.
        """
        command = wire.RetrieveAgent(request_id=new_request_id(), agent_id=agent_id)
        agent = (await self._backend.ask(command, wire.SystemPromptReply)).agent
        if agent is None:
            raise UpstreamInvalid(should_retry=False)
        changed = agent.system[:-1] if agent.system.endswith("\n") else f"{agent.system}\n"
        await self._backend.update_agent(agent_id, wire.AgentBody(system=changed))


def _is_block(path: str) -> bool:
    name = path.removeprefix(SYSTEM)
    return name.endswith(ENDING) and "/" not in name and name != INDEX


def _label(path: str) -> str:
    return path.removeprefix(SYSTEM).removesuffix(ENDING)


def _front_matter(text: str, entry: wire.MemoryFile) -> str:
    """Return how a file begins, by the two fences; one that has none gets what the server asks for."""
    if text.startswith(FENCE):
        inner, fence, _ = text[len(FENCE) :].partition(f"\n{FENCE}")
        if fence:
            return f"{FENCE}{inner}{fence}"
        if text.endswith("\n---"):
            return f"{text}\n"
    label = _label(entry.relative_path)
    return f"{FENCE}name: {label}\ndescription: {entry.description or label}\n{FENCE}"


def _decoded(data: bytes) -> wire.MemoryReply:
    try:
        reply = msgspec.json.decode(data, type=wire.MemoryReply)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamInvalid(should_retry=False) from error
    if not reply.success:
        raise UpstreamInvalid(should_retry=False)
    return reply
