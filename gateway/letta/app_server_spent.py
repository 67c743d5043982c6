"""What turns took on the App Server, from the files in which it keeps its conversations.

It tells of a step's usage while that is heard, and never again: no command asks for it, but a conversation's file has
the message by its ``client_message_id`` (as ``otid``), and every step that came to its end with what it took. The file
is read by the server's own ``read_file``, on a connection of its own, as it may be long. A server that keeps no such
files keeps no count either. A turn whose socket is closed goes on where another socket hears its conversation, too
(letta 0.34.12): it is stopped as long as it is the conversation's last one.
"""

import asyncio
import base64
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.errors import AgentGone
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_socket import new_request_id
from gateway.letta.app_server_wire import Runtime
from gateway.letta.backend import SentTurn
from gateway.letta.wire import otid_of
from gateway.translation.agent_events import Usage

if TYPE_CHECKING:
    from gateway.letta.app_server import AppServerBackend

READ_TIMEOUT: Final = 60.0
MOST_BYTES: Final = 134_217_728
"""Of one conversation's file."""
SETTLE: Final = 1.0
"""Seconds for a stopped turn to be written down."""
CLOCKS: Final = 2.0
"""Seconds by which the server's clock may be behind."""
WITH_FILES: Final = "git-memory-enabled"
"""The tag of agents whose memory is a tree of files, beside which their conversations are."""
_folder: Final = re.compile(r"(.+[/\\])memfs[/\\][^/\\]+[/\\]memory[/\\]?").fullmatch


class StepUsage(msgspec.Struct, rename="camel"):
    """What a step took; ``input`` leaves out what came from a cache, the total does not."""

    input: int = 0
    output: int = 0
    cache_read: int | None = None
    reasoning: int | None = None
    total_tokens: int = 0

    def usage(self) -> Usage:
        """Return it as the server's frames tell it."""
        return Usage(max(self.input, self.total_tokens - self.output), self.output, self.cache_read, self.reasoning)


class StoredMessage(msgspec.Struct):
    """A message of a conversation: ``otid`` is what the sender of a user's called it."""

    role: str = ""
    otid: str | None = None
    usage: StepUsage | None = None


class Entry(msgspec.Struct):
    """A line of a conversation's file; ``timestamp`` is in ISO's notation."""

    timestamp: str = ""
    message: StoredMessage | None = None


_decode_entry: Final = msgspec.json.Decoder(Entry).decode


async def spent(backend: "AppServerBackend", turn: SentTurn) -> Usage | None:
    """Return what a turn took, as the server has written it down; None where it has nothing of it."""
    try:
        if WITH_FILES not in (await backend.row(turn.agent_id)).tags:
            return None
    except AgentGone:
        return None
    runtime = await backend.threads.find(turn.agent_id, turn.conversation_id)
    if runtime is None:
        return None
    entries = await _entries(backend, runtime)
    if _is_last(entries, turn) and await _stop(backend, runtime):
        entries = await _entries(backend, runtime)
    steps = steps_of(entries, turn)
    if steps is None:
        return None
    total = Usage(0, 0)
    for step in steps:
        total = total.plus(step.usage())
    return total


def steps_of(entries: Sequence[Entry], turn: SentTurn) -> list[StepUsage] | None:
    """Return the steps of a turn, from its message or the results that it brought to the next message of another's."""
    messages = [(entry.timestamp, entry.message) for entry in entries if entry.message is not None]
    first = _beginning(messages, turn)
    if first is None:
        return None
    steps: list[StepUsage] = []
    for _, message in messages[first:]:
        if message.role == "user" and not _is_marked(message, turn):
            break
        if message.role == "assistant" and message.usage is not None:
            steps.append(message.usage)
    return steps


def _is_last(entries: Sequence[Entry], turn: SentTurn) -> bool:
    """Tell whether what runs in the conversation, if anything, can only be this turn."""
    messages = [(entry.timestamp, entry.message) for entry in entries if entry.message is not None]
    first = _beginning(messages, turn)
    return first is not None and not any(
        message.role == "user" and not _is_marked(message, turn) for _, message in messages[first:]
    )


async def _stop(backend: "AppServerBackend", runtime: Runtime) -> bool:
    command = wire.Abort(request_id=new_request_id(), runtime=runtime)
    reply = await backend.reply_of(await backend.control_socket(), command, wire.AbortReply)
    if reply.aborted:
        await asyncio.sleep(SETTLE)
    return reply.aborted


def _beginning(messages: Sequence[tuple[str, StoredMessage]], turn: SentTurn) -> int | None:
    for index, (_, message) in enumerate(messages):
        if _is_marked(message, turn):
            return index
    # A turn that brings results and says nothing has no message: its results come first after it was sent.
    # The call may have come just before: only where the clocks differ is what is older than the turn of the turn.
    for since in (wire.iso_time(turn.sent_at), wire.iso_time(turn.sent_at - CLOCKS)):
        later = next((index for index, (at, _) in enumerate(messages) if at >= since), None)
        if later is not None and messages[later][1].role == "toolResult":
            return later
    return None


def _is_marked(message: StoredMessage, turn: SentTurn) -> bool:
    return message.otid is not None and message.otid.startswith(otid_of(turn.mark))


async def _entries(backend: "AppServerBackend", runtime: Runtime) -> list[Entry]:
    enabled = wire.EnableMemory(request_id=new_request_id(), agent_id=runtime.agent_id)
    directory = (await backend.ask(enabled, wire.DirectoryReply)).memory_directory
    folder = _folder(directory or "")
    if folder is None:
        return []
    name = base64.urlsafe_b64encode(f"conversation:{runtime.conversation_id}".encode()).decode().rstrip("=")
    command = wire.ReadFile(request_id=new_request_id(), path=f"{folder[1]}conversations/{name}/messages.jsonl")
    async with backend.own_socket(MOST_BYTES) as socket:
        reply = await backend.reply_of(socket, command, wire.FileReply, READ_TIMEOUT)
    return list(_decoded(reply.content or ""))


def _decoded(lines: str) -> Iterator[Entry]:
    for line in lines.splitlines():
        try:
            yield _decode_entry(line)
        except msgspec.DecodeError:
            continue  # the server may be writing it just now
