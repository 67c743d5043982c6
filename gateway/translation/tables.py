"""The mappings of the translation, as tables that can be read against both APIs."""

from typing import Final

from msgspec import UNSET

from gateway.translation.agent_events import StopReason, Usage
from gateway.translation.openai_types import (
    CompletionTokensDetails,
    CompletionUsage,
    FinishReason,
    PromptTokensDetails,
)

FINISH_REASONS: Final[dict[StopReason, FinishReason]] = {
    "end_turn": "stop",
    "tool_rule": "stop",  # the agent's own rule said that this tool ends the turn
    "no_tool_call": "stop",  # how agents of the older kinds yield
    "max_steps": "length",
    "max_tokens_exceeded": "length",
    "requires_approval": "tool_calls",
    "refusal": "content_filter",
}


def finish_reason(reason: StopReason, *, is_legacy: bool) -> FinishReason:
    """Return OpenAI's finish reason; calls of functions had one of their own."""
    finish = FINISH_REASONS[reason]
    return "function_call" if is_legacy and finish == "tool_calls" else finish


def completion_usage(usage: Usage | None) -> CompletionUsage:
    """Return OpenAI's usage object; zeros where Letta reported nothing, as clients read the field unasked."""
    if usage is None:
        return CompletionUsage(0, 0, 0)
    cached, reasoning = usage.cached_tokens, usage.reasoning_tokens
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=UNSET if cached is None else PromptTokensDetails(cached),
        completion_tokens_details=UNSET if reasoning is None else CompletionTokensDetails(reasoning),
    )
