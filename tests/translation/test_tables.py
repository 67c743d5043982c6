from typing import get_args

import msgspec

from gateway.translation.agent_events import StopReason, Usage
from gateway.translation.openai_types import FinishReason
from gateway.translation.tables import FINISH_REASONS, completion_usage, finish_reason


def test_every_stop_reason_has_a_finish_reason() -> None:
    assert set(FINISH_REASONS) == set(get_args(StopReason))


def test_every_finish_reason_is_reached() -> None:
    reached = {finish_reason(stop, is_legacy=is_legacy) for stop in FINISH_REASONS for is_legacy in (True, False)}
    assert reached == set(get_args(FinishReason))
    assert finish_reason("requires_approval", is_legacy=True) == "function_call"


def test_no_usage_is_zeros() -> None:
    assert msgspec.to_builtins(completion_usage(None)) == {
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
    }


def test_details_stand_only_where_they_are_reported() -> None:
    assert msgspec.to_builtins(completion_usage(Usage(3, 4, cached_tokens=0))) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert msgspec.to_builtins(completion_usage(Usage(3, 4, reasoning_tokens=2))) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
