"""A client's tools on the App Server: external tools, and which of the calls in a turn are calls of theirs.

The server checks a call of a name that one of its own tools has against that tool's schema, wherever the tool came
from, and refuses it (letta 0.34.12): such a tool has another name there.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_wire import ExternalTool, ToolGroup
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    ServerToolCall,
    ServerToolReturn,
    ToolCallDelta,
)
from gateway.translation.agent_turn import ClientTool

PREFIX: Final = "client_"
LONGEST_NAME: Final = 64
# fmt: off
RESERVED: Final = frozenset({
    "Agent", "ApplyPatch", "AskUserQuestion", "AskUserQuestionAsync", "Bash", "Edit", "EnterWorktree",
    "ExitWorktree", "Glob", "Grep", "LS", "Memory", "MessageChannel", "Monitor", "Read", "ReadLSP",
    "SendAgentMessage", "SetWorkingDirectory", "Skill", "Task", "TaskCreate", "TaskGet", "TaskList", "TaskStop",
    "TaskUpdate", "UpdatePlan", "ViewImage", "Wake", "WatchPR", "Workflow", "Write", "exec_command",
    "message_channel", "read_artifact_file", "write_artifact_file", "write_stdin",
})
# fmt: on
"""The names of the server's own tools (letta 0.34.12, ``TOOL_DEFINITIONS``)."""

_encode: Final = msgspec.json.Encoder().encode


class Toolkit(msgspec.Struct, frozen=True):
    """What a turn may use: the client's tools, and those of the server's machine.

    ``names`` are the client's tools by the names that they have on the server; toolkits of one ``digest`` are the same.
    """

    server_tools: tuple[str, ...] = ()
    offered: tuple[ExternalTool, ...] = ()
    names: dict[str, str] = {}
    digest: bytes = b""

    @property
    def allowed(self) -> tuple[str, ...]:
        """Return the names of all that the model may see."""
        return (*self.server_tools, *self.names)

    @property
    def groups(self) -> tuple[ToolGroup, ...]:
        """Return the client's tools as they are registered."""
        return (ToolGroup(wire.SCOPE, self.offered),) if self.offered else ()


def toolkit_of(tools: Sequence[ClientTool], server_tools: tuple[str, ...]) -> Toolkit:
    """Return what a turn may use, with names on the server that are nobody else's."""
    if not tools:
        return Toolkit(server_tools)
    taken = {*RESERVED, *server_tools, *(tool.name for tool in tools)}
    names: dict[str, str] = {}
    for tool in tools:
        is_free = tool.name not in RESERVED and tool.name not in server_tools
        names[tool.name if is_free else _free_name(tool.name, taken)] = tool.name
    offered = tuple(
        ExternalTool(name, tool.description, tool.parameters) for name, tool in zip(names, tools, strict=True)
    )
    return Toolkit(server_tools, offered, names, hashlib.blake2s(_encode((server_tools, offered))).digest())


def _free_name(name: str, taken: set[str]) -> str:
    number = 1
    while True:
        ending = "" if number == 1 else f"_{number}"
        free = f"{PREFIX}{name}"[: LONGEST_NAME - len(ending)] + ending
        if free not in taken:
            taken.add(free)
            return free
        number += 1


class ClientCalls:
    """Tells the calls of the client's tools from those that run on Letta, step by step.

    They are held back until the server has checked them: one that lacks an argument it refuses by itself, and the
    agent tries again, so that the client never gets to answer it. ``names`` are the client's tools by the ids of
    their calls; the results of those that are ``answered`` are no news to anybody.
    """

    def __init__(self, toolkit: Toolkit, answered: frozenset[str] = frozenset()) -> None:
        self.toolkit = toolkit
        self.names: dict[str, str] = {}
        self._answered = answered
        self._held: list[ServerToolCall] = []

    @property
    def waits(self) -> bool:
        """Tell whether calls are held back."""
        return bool(self._held)

    def sort(self, batch: Batch) -> Batch:
        """Return the events of a batch that are told now."""
        return [event for event in batch if self._is_told(event)] if self.toolkit.names else batch

    def release(self, refused: Collection[str] = ()) -> Batch:
        """Return the calls held back, except that the server's affair are those that it ``refused``."""
        batch: Batch = []
        for call in self._held:
            if call.call_id in refused:
                self.names.pop(call.call_id, None)
                batch.append(call)
            else:
                name = None if call.name is None else self.toolkit.names.get(call.name)
                batch.append(ToolCallDelta(call.call_id, name, call.arguments))
        self._held = []
        return batch

    def _is_told(self, event: AgentEvent) -> bool:
        match event:
            case ServerToolCall(call_id=call_id, name=name):
                if name is not None and name in self.toolkit.names:
                    self.names[call_id] = self.toolkit.names[name]
                if call_id not in self.names:
                    return call_id not in self._answered
                self._held.append(event)
                return False
            case ServerToolReturn(call_id=call_id):
                return call_id not in self.names and call_id not in self._answered
            case _:
                return True
