"""Which calls wait in a conversation on Letta, and how a turn settles them.

Letta takes results for exactly the calls that wait, or refuses the whole request; but of a call that was answered
lately it takes another result, and drops it without a word (letta 0.16.8).
"""

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from gateway.translation.agent_turn import ToolResult

SUPERSEDED: Final = "No result: the client went on without running this call."


class Settled(msgspec.Struct, frozen=True):
    """``answers`` go to the calls that wait; the ``stale`` ones go in as words, as no call waits for them."""

    answers: tuple[ToolResult, ...] = ()
    stale: tuple[ToolResult, ...] = ()


NOTHING: Final = Settled()


def settle(returns: Sequence[ToolResult], waiting: Sequence[str]) -> Settled:
    """Settle the calls that wait, those that nobody answers as superseded."""
    given = {said.call_id: said for said in returns}
    return Settled(
        tuple(given.get(call_id) or ToolResult(call_id, SUPERSEDED, succeeded=False) for call_id in waiting),
        tuple(said for call_id, said in given.items() if call_id not in waiting),
    )


class CallRow(msgspec.Struct):
    """A call, or what became of one."""

    tool_call_id: str


class MessageRow(msgspec.Struct):
    """A stored message, as far as it tells of calls: each kind of message has some of these."""

    message_type: str
    date: dt.datetime
    tool_calls: list[CallRow] | None = None
    approvals: list[CallRow] | None = None
    tool_call_id: str | None = None
    tool_returns: list[CallRow] | None = None


decode_messages: Final = msgspec.json.Decoder(list[MessageRow]).decode


def waiting_calls(rows: Sequence[MessageRow]) -> tuple[str, ...]:
    """Return the calls that wait for results: those of the newest request that has no answer."""
    answered = {call_id for row in rows for call_id in _answered_by(row)}
    requests = [row for row in rows if row.message_type == "approval_request_message"]
    for row in sorted(requests, key=lambda row: row.date, reverse=True):
        waiting = tuple(call.tool_call_id for call in row.tool_calls or () if call.tool_call_id not in answered)
        if waiting:
            return waiting
    return ()


def _answered_by(row: MessageRow) -> Iterator[str]:
    yield from (call.tool_call_id for call in (*(row.approvals or ()), *(row.tool_returns or ())))
    if row.tool_call_id is not None:
        yield row.tool_call_id
