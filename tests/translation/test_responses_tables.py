from typing import get_args

import pytest

from gateway.errors import (
    ConversationBusy,
    GatewayError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    TurnFailed,
    UpstreamQuotaExceeded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnavailable,
)
from gateway.translation.agent_events import StopReason, Usage
from gateway.translation.responses_tables import (
    INCOMPLETE_REASONS,
    WIRES,
    ItemKind,
    error_code,
    response_usage,
)
from gateway.translation.tables import FINISH_REASONS


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_a_response_is_complete_where_a_chat_completion_is(reason: StopReason) -> None:
    assert {"stop": None, "tool_calls": None, "length": "max_output_tokens", "content_filter": "content_filter"}[
        FINISH_REASONS[reason]
    ] == INCOMPLETE_REASONS[reason]


def test_every_kind_of_item_has_its_wire() -> None:
    assert set(WIRES) == set(get_args(ItemKind))
    assert len({wire.prefix for wire in WIRES.values()}) == len(WIRES)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UpstreamRateLimited(), "rate_limit_exceeded"),
        (UpstreamQuotaExceeded(), "insufficient_quota"),
        (InvalidRequest(), "invalid_prompt"),
        (UpstreamRejected(), "invalid_prompt"),
        (ModelNotFound("friend"), "invalid_prompt"),
        (ConversationBusy(), "server_error"),
        (UpstreamUnavailable(), "server_error"),
        (TurnFailed(), "server_error"),
        (InternalError(), "server_error"),
    ],
)
def test_code_says_whether_to_try_again(error: GatewayError, code: str) -> None:
    assert error_code(error) == code


def test_usage_has_every_figure() -> None:
    empty = response_usage(None)
    assert (empty.input_tokens, empty.input_tokens_details.cached_tokens, empty.total_tokens) == (0, 0, 0)
    usage = response_usage(Usage(5, 2, None, 1))
    assert (usage.total_tokens, usage.output_tokens_details.reasoning_tokens) == (7, 1)
