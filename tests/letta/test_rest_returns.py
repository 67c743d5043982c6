import json
from typing import Any

import pytest

from gateway.letta.rest_returns import SUPERSEDED, Settled, decode_messages, settle, waiting_calls
from gateway.translation.agent_turn import ToolResult

ONE, TWO = ToolResult("call_1", "one"), ToolResult("call_2", "two", succeeded=False)
NO_RESULT = ToolResult("call_9", SUPERSEDED, succeeded=False)


@pytest.mark.parametrize(
    ("returns", "waiting", "settled"),
    [
        ((), (), Settled()),
        ((ONE, TWO), ("call_2", "call_1"), Settled((TWO, ONE))),
        ((), ("call_9",), Settled((NO_RESULT,))),
        ((ONE,), ("call_1", "call_9"), Settled((ONE, NO_RESULT))),
        ((ONE, TWO), ("call_1",), Settled((ONE,), (TWO,))),
        ((ONE, TWO), (), Settled((), (ONE, TWO))),
        ((ONE,), ("call_9",), Settled((NO_RESULT,), (ONE,))),
    ],
)
def test_what_becomes_of_calls_and_results(
    returns: tuple[ToolResult, ...], waiting: tuple[str, ...], settled: Settled
) -> None:
    assert settle(returns, waiting) == settled


def test_result_that_was_sent_twice_counts_once() -> None:
    again = ToolResult("call_1", "one, again")
    assert settle((ONE, again), ("call_1",)) == Settled((again,))


def row(kind: str, second: int, **fields: Any) -> dict[str, Any]:
    return {"message_type": kind, "date": f"2026-11-21T15:45:{second:02}+00:00", "id": "message-1", **fields}


def asks(second: int, *calls: str) -> dict[str, Any]:
    named = [{"name": "weather", "arguments": "{}", "tool_call_id": call} for call in calls]
    return row("approval_request_message", second, tool_call=named[0], tool_calls=named)


def answers(second: int, *calls: str) -> dict[str, Any]:
    approvals = [{"type": "tool", "tool_call_id": call, "tool_return": "", "status": "success"} for call in calls]
    return row("approval_response_message", second, approvals=approvals)


def returned(second: int, *calls: str) -> dict[str, Any]:
    listed = [{"tool_call_id": call, "status": "success"} for call in calls]
    return row("tool_return_message", second, tool_call_id=calls[0], tool_returns=listed, tool_return="sunny")


@pytest.mark.parametrize(
    ("rows", "waiting"),
    [
        ([], ()),
        ([asks(1, "a", "b")], ("a", "b")),
        ([asks(1, "a"), answers(2, "a")], ()),
        ([asks(1, "a"), returned(2, "a")], ()),
        ([asks(1, "a", "b"), returned(2, "a", "b")], ()),
        ([asks(1, "a"), answers(2, "a"), asks(3, "b")], ("b",)),
        ([asks(3, "b"), answers(2, "a"), asks(1, "a")], ("b",)),  # an agent's own thread is listed the other way round
        ([asks(1, "left"), asks(2, "b")], ("b",)),
        ([row("approval_request_message", 1, tool_calls=None)], ()),
        ([row("tool_return_message", 1, tool_returns=None)], ()),
    ],
)
def test_which_calls_wait(rows: list[dict[str, Any]], waiting: tuple[str, ...]) -> None:
    assert waiting_calls(decode_messages(json.dumps(rows))) == waiting
