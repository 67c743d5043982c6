"""An agent's memory on the App Server: the files at the root of its memory tree, which stand in its system prompt.

A file begins with front matter, ``description`` in it; without that the server commits no change, and leaves the file
changed all the same. It reads and writes files of agents that are not there too, so the agent is asked for first. A
conversation hears of a change in its next turn and goes back to the memory that it began with in the one after, until
its prompt is compiled again, which takes a sixth of a second each: that is done behind the answer (letta 0.34.12).
"""

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from gateway.errors import GatewayError, MemoryNotFound, UpstreamInvalid, UpstreamRejected
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
MOST_CONVERSATIONS: Final = 1_000

_log: Final = structlog.get_logger("gateway.letta")


class AppServerMemory:
    """The memory of an App Server's agents."""

    def __init__(self, backend: "AppServerBackend") -> None:
        self._backend = backend
        self._outdated: dict[str, None] = {}
        self._is_compiling = False

    async def blocks(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return an agent's memory, in the order of labels; raises ``AgentGone``."""
        found = [(_label(entry.relative_path), entry) for entry in await self._files(agent_id)]
        return tuple(
            MemoryBlock(label, entry.content.rstrip("\n"), entry.description)
            for label, entry in sorted(found, key=lambda pair: pair[0])
        )

    async def write(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace what a file says, below its front matter; raises ``AgentGone`` and ``MemoryNotFound``."""
        entry = next((entry for entry in await self._files(agent_id) if _label(entry.relative_path) == label), None)
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
        self._compile_later(agent_id)
        return MemoryBlock(label, value, entry.description)

    async def _files(self, agent_id: str) -> list[wire.MemoryFile]:
        """Return the files that stand in an agent's prompt."""
        await self._backend.row(agent_id)
        socket = await self._backend.control_socket()
        files: list[wire.MemoryFile] = []
        command = wire.ListMemory(request_id=new_request_id(), agent_id=agent_id)
        async with aclosing(socket.ask_pages(command, LIST_TIMEOUT)) as pages:
            async for data in pages:
                page = _decoded(data)
                files.extend(entry for entry in page.entries if _is_block(entry.relative_path))
                if page.done:
                    break
        return files

    async def _read(self, agent_id: str, path: str) -> str:
        command = wire.ReadMemoryFile(request_id=new_request_id(), agent_id=agent_id, path=path)
        reply = await self._backend.reply_of(await self._backend.control_socket(), command, wire.FileReply)
        if reply.content is None:  # it was deleted just now
            raise MemoryNotFound
        return reply.content

    # Behind the answer -----------------------------------------------------------------------------------------------

    def _compile_later(self, agent_id: str) -> None:
        self._outdated[agent_id] = None
        if not self._is_compiling:
            self._is_compiling = True
            self._backend.tasks.spawn(self._compile(), "compile prompts")

    async def _compile(self) -> None:
        try:
            while self._outdated:
                agent_id, _ = self._outdated.popitem()
                try:
                    await self._compile_all(agent_id)
                except GatewayError as error:
                    _log.warning("conversations keep an older memory", agent=agent_id, code=error.code)
        finally:
            self._is_compiling = False

    async def _compile_all(self, agent_id: str) -> None:
        """Have an agent's conversations see its memory as it is, the newest first."""
        query = wire.ConversationsQuery(limit=MOST_CONVERSATIONS, agent_id=agent_id)
        command = wire.ListConversations(request_id=new_request_id(), query=query)
        for row in (await self._backend.ask(command, wire.ConversationsReply)).conversations:
            if agent_id in self._outdated:
                return  # it has changed once more: they all are to see that
            if not row.archived:
                body = wire.RecompileBody(agent_id)
                recompile = wire.RecompileConversation(request_id=new_request_id(), conversation_id=row.id, body=body)
                await self._backend.reply(await self._backend.control_socket(), recompile)


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
