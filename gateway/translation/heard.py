"""AgentEvent -> what the agent said in a turn, as a message of the transcript."""

import io

import msgspec

from gateway.translation.agent_events import Batch, ReasoningDelta, Stop, StopReason, TextDelta, ToolCallDelta
from gateway.translation.agent_turn import AgentSaid, Call


def length_of(batch: Batch) -> int:
    """Return how many characters a model wrote for these events."""
    length = 0
    for event in batch:
        if type(event) is TextDelta or type(event) is ReasoningDelta:
            length += len(event.text)
        elif type(event) is ToolCallDelta:
            length += len(event.arguments)
    return length


class _Heard(msgspec.Struct):
    name: str
    arguments: io.StringIO


class Heard:
    """Gathers what an answer says; ``stop`` is why it ended well, None while or where it did not."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._calls: dict[str, _Heard] = {}
        self.stop: StopReason | None = None

    def receive(self, batch: Batch) -> None:
        """Take the events of one network read."""
        for event in batch:
            if type(event) is TextDelta:
                self._text.write(event.text)
            elif type(event) is ToolCallDelta:
                call = self._calls.get(event.call_id)
                if call is None:
                    call = self._calls[event.call_id] = _Heard("", io.StringIO())
                call.name = call.name or event.name or ""
                call.arguments.write(event.arguments)
            elif type(event) is Stop:
                self.stop = event.reason

    @property
    def calls(self) -> tuple[Call, ...]:
        """Return the calls that the client is to execute."""
        return tuple(Call(call_id, call.name, call.arguments.getvalue()) for call_id, call in self._calls.items())

    @property
    def said(self) -> AgentSaid:
        """Return the whole message."""
        return AgentSaid(self._text.getvalue(), self.calls)
