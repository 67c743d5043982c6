"""The client's tools under the names by which a Letta agent knows them, and its calls back under the client's."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from gateway.letta.frames import ToolCallBody
from gateway.translation.agent_events import AgentEvent, Batch, ServerToolCall, Stop, StopReason, ToolCallDelta
from gateway.translation.agent_turn import ClientTool

LONGEST_NAME: Final = 64
PREFIX: Final = "client_"
RESERVED: Final = frozenset({"send_message"})
"""Names that Letta takes for its own, attached or not: it shows the calls as what the agent says (0.16.8)."""

_decode_arguments: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def native_names(tools: Sequence[ClientTool], own: Collection[str]) -> tuple[str, ...]:
    """Return the names under which tools go out to an agent that has these of its own.

    On Letta a client's tool hides a tool of the agent's own that has the same name (0.16.8), so it gets another.
    """
    taken = {*own, *RESERVED, *(tool.name for tool in tools)}
    names: list[str] = []
    for tool in tools:
        name = tool.name
        if name in own or name in RESERVED:
            name = _another(name, taken)
            taken.add(name)
        names.append(name)
    return tuple(names)


class ClientTools:
    """The calls of a turn that offers tools under these names.

    Those of a legacy agent come whole at the end, without the argument that Letta adds to each.
    """

    def __init__(self, tools: Sequence[ClientTool] = (), names: Sequence[str] = (), *, is_legacy: bool = False) -> None:
        self._client_names = {name: tool.name for name, tool in zip(names, tools, strict=True)}
        self._is_legacy = is_legacy
        self._is_clients: dict[str, bool] = {}
        self._held: dict[str, list[str]] = {}

    def called(self, call: ToolCallBody, *, waits: bool) -> AgentEvent | None:
        """Return the event of a fragment of a call: the agent's own tools may wait for somebody's approval too."""
        call_id, name, arguments = call.tool_call_id, call.name, call.arguments or ""
        if waits and call_id not in self._is_clients:
            self._is_clients[call_id] = name in self._client_names
        if not self._is_clients.get(call_id, False):
            return ServerToolCall(call_id, name, arguments)
        if self._is_legacy:
            self._held.setdefault(call_id, []).append(arguments)
            arguments = ""
        return ToolCallDelta(call_id, None if name is None else self._client_names.get(name, name), arguments)

    def stopped(self, reason: StopReason) -> Batch:
        """Return the end: what waits for somebody else is no call of the client's."""
        if reason == "requires_approval" and not any(self._is_clients.values()):
            return [Stop("end_turn")]
        held, self._held = self._held, {}
        whole = (ToolCallDelta(call_id, None, _without_heartbeat("".join(said))) for call_id, said in held.items())
        return [*whole, Stop(reason)]


def _without_heartbeat(arguments: str) -> str:
    try:
        given = _decode_arguments(arguments)
    except msgspec.DecodeError:
        return arguments
    given.pop("request_heartbeat", None)
    return msgspec.json.encode(given).decode()


def _another(name: str, taken: Collection[str]) -> str:
    """Return a name that nothing else has, always the same one where nothing else has it."""
    plain = PREFIX + name
    if len(plain) <= LONGEST_NAME and plain not in taken:
        return plain
    number = 0
    while True:
        mark = hashlib.blake2s(f"{name} {number}".encode(), digest_size=4).hexdigest()
        marked = f"{plain[: LONGEST_NAME - len(mark) - 1]}_{mark}"
        if marked not in taken:
            return marked
        number += 1
