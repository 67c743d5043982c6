"""The mappings of the Responses API's translation, as tables that can be read against both APIs."""

from http import HTTPStatus
from typing import Final, Literal, TypeAlias

import msgspec

from gateway.errors import ClientError, GatewayError, UpstreamQuotaExceeded
from gateway.translation.agent_events import StopReason, Usage
from gateway.translation.openai_types import TextPart
from gateway.translation.responses_types import (
    ErrorCode,
    IncompleteReason,
    InputTokensDetails,
    ItemStatus,
    OutputTokensDetails,
    ResponseUsage,
    ToolFailure,
)

INCOMPLETE_REASONS: Final[dict[StopReason, IncompleteReason | None]] = {
    "end_turn": None,
    "tool_rule": None,
    "no_tool_call": None,
    "max_steps": "max_output_tokens",  # the API has no nearer word; chat completions say "length" to both
    "max_tokens_exceeded": "max_output_tokens",
    "requires_approval": None,  # calls for the client complete a response
    "refusal": "content_filter",
}

ItemKind: TypeAlias = Literal["message", "reasoning", "function_call", "custom_tool_call", "mcp_call"]
"""What an agent puts out.

Calls of its own tools are ``mcp_call``: of the API's executed tools the only kind with a free name and free arguments.
``web_search_call`` and its like would want fields that no tool of Letta's gives, and a ``function_call`` would ask the
client to execute it again.
"""


class Wire(msgspec.Struct, frozen=True):
    """How a kind of item shows in a stream: the prefix of its ids, and the types of its events."""

    prefix: str
    delta: str
    done: str
    part_added: str | None = None
    part_done: str | None = None
    begun: str | None = None


WIRES: Final[dict[ItemKind, Wire]] = {
    "message": Wire(
        "msg",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.added",
        "response.content_part.done",
    ),
    "reasoning": Wire(
        "rs",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
    ),
    "function_call": Wire("fc", "response.function_call_arguments.delta", "response.function_call_arguments.done"),
    "custom_tool_call": Wire("ctc", "response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"),
    "mcp_call": Wire(
        "mcp",
        "response.mcp_call_arguments.delta",
        "response.mcp_call_arguments.done",
        begun="response.mcp_call.in_progress",
    ),
}

SERVER_TOOL_ENDS: Final[dict[ItemStatus, str]] = {
    "completed": "response.mcp_call.completed",
    "failed": "response.mcp_call.failed",
}
"""The event that ends a call of the agent's own; one that never returned has none."""

TOOL_FAILURE: Final = ToolFailure((TextPart("The agent's tool failed."),))
"""What it failed of is for the agent to read: a tool's error may hold what the client must not see."""


def error_code(error: GatewayError) -> ErrorCode:
    """Return the API's own code of an error: clients decide by it whether to send the request again."""
    if error.type == UpstreamQuotaExceeded.type:
        return "insufficient_quota"
    if error.status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_exceeded"
    is_permanent = error.type == ClientError.type or (isinstance(error, ClientError) and not error.should_retry)
    return "invalid_prompt" if is_permanent else "server_error"


def response_usage(usage: Usage | None) -> ResponseUsage:
    """Return the usage object; zeros where Letta reported nothing, as SDKs require every figure."""
    usage = usage or Usage(0, 0)
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.cached_tokens or 0),
        usage.completion_tokens,
        OutputTokensDetails(usage.reasoning_tokens or 0),
        usage.prompt_tokens + usage.completion_tokens,
    )
