"""How turns fail on Letta -> our errors: a table of stop reasons, one of error types, one of details.

From letta 0.16.8: ``StopReasonType``, ``streaming_service`` and the recorded frames. Letta's texts decide only where
its types do not, and are never shown.
"""

import re
from collections.abc import Callable
from typing import Final, get_args

from gateway.errors import (
    AgentGone,
    BudgetExceeded,
    GatewayError,
    InvalidRequest,
    PendingApproval,
    TurnCancelled,
    TurnFailed,
    UpstreamInvalid,
    UpstreamQuotaExceeded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.translation.agent_events import StopReason

_OVERFLOW: Final = "context_window_overflow_in_system_prompt"


def _context_overflow() -> GatewayError:
    return InvalidRequest(
        "The agent's memory and instructions alone fill its model's context window. Shorten its memory blocks or "
        "choose a model with a larger window.",
        code="context_length_exceeded",
        should_retry=False,
    )


_STOPS: Final[dict[str, Callable[[], GatewayError]]] = {
    "error": lambda: TurnFailed(should_retry=False),
    "llm_api_error": lambda: TurnFailed(
        "The agent's model provider failed. The message was delivered.", code="model_error", should_retry=False
    ),
    "invalid_llm_response": lambda: TurnFailed(
        "The agent's model answered something that Letta cannot read. The message was delivered.",
        code="model_error",
        should_retry=False,
    ),
    "invalid_tool_call": lambda: TurnFailed(
        "The agent's model called a tool in a way that Letta cannot read. The message was delivered.",
        code="model_error",
        should_retry=False,
    ),
    "cancelled": lambda: TurnCancelled(should_retry=False),
    "insufficient_credits": lambda: UpstreamQuotaExceeded(should_retry=False),
    _OVERFLOW: _context_overflow,
}

FOLLOWED_BY_DETAIL: Final = frozenset(_STOPS) - {"cancelled"}
"""What follows a stop of these is an error_message that says more."""

_ERROR_TYPES: Final[dict[str, Callable[[], GatewayError]]] = {
    "llm_rate_limit": lambda: UpstreamRateLimited(retry_after=5.0, should_retry=False),
    "llm_timeout": lambda: UpstreamTimeout(
        "The agent's model provider did not answer in time. The message was delivered.",
        code="model_timeout",
        should_retry=False,
    ),
    "llm_authentication": lambda: TurnFailed(
        "The agent's model provider refused Letta's key. The operator should check it on the Letta server.",
        code="model_auth_failed",
        should_retry=False,
    ),
    "llm_error": _STOPS["llm_api_error"],
    "insufficient_credits": _STOPS["insufficient_credits"],
}

# How Letta begins the detail of an error whose type says less than it knows (letta 0.16.8, llm_api/error_utils).
_DETAILS: Final[dict[str, Callable[[], GatewayError]]] = {
    "RATE_LIMIT_EXCEEDED": _ERROR_TYPES["llm_rate_limit"],
    "UNAUTHENTICATED": _ERROR_TYPES["llm_authentication"],
    "PERMISSION_DENIED": _ERROR_TYPES["llm_authentication"],
    "PAYMENT_REQUIRED": _ERROR_TYPES["insufficient_credits"],
    "INVALID_ARGUMENT": lambda: UpstreamRejected(should_retry=False),
}


class ReturnsRefused(UpstreamRejected):
    """Letta waits for results of other calls than those that were sent, or of none."""

    default_code = "tool_results_refused"
    default_message = (
        "The Letta server takes no results for these tool calls (any more). Send the results for the calls of the "
        "agent's last answer, or a new message."
    )


_PENDING: Final = "waiting for approval"
# How LiteLLM refuses (1.106.2), by whatever status it is told to (422, 429): no limit that some seconds lift.
_BUDGET: Final = re.compile(r"""["']type["']: ?["']budget_exceeded["']|ExceededBudget: """)
_OTHER_CALLS: Final = ("No tool call is currently awaiting approval", "Invalid tool call IDs")
_GOOD_STOPS: Final[dict[str, StopReason]] = {reason: reason for reason in get_args(StopReason)}
_ABANDONED: Final = re.compile(r"^Conversation \S+ already has an active run")
_NO_AGENT: Final = re.compile(r"Agent \S+ not found")
_NO_CONVERSATION: Final = re.compile(r"Conversation \S+ not found")


def good_stop(reason: str | None) -> StopReason | None:
    """Return the stop reason of a turn that ended well; None for every other one."""
    return _GOOD_STOPS.get(reason or "")


def of_stop(reason: str) -> GatewayError:
    """Return the error of a stop reason that is no good end."""
    known = _STOPS.get(reason)
    if known is not None:
        return known()
    return UpstreamInvalid(
        "The agent's run ended for a reason that this gateway does not know. Is it older than the Letta server?",
        should_retry=False,
    )


def of_error(
    error_type: str | None, message: str | None, detail: str | None, announced: GatewayError | None
) -> GatewayError:
    """Return the error of an ``error_message`` frame; ``announced`` is that of the stop reason before it."""
    if _PENDING in (message or "") or _PENDING in (detail or ""):
        return PendingApproval()
    if _BUDGET.search(detail or ""):
        return BudgetExceeded()
    if refuses_returns(detail or ""):
        return ReturnsRefused(should_retry=False)
    known = _DETAILS.get((detail or "").partition(":")[0]) or _ERROR_TYPES.get(error_type or "")
    if known is not None:
        return known()
    return announced or TurnFailed(should_retry=False)


def refuses_returns(detail: str) -> bool:
    """Tell whether a turn was refused for its results: nobody waits for them, or more is waited for."""
    return any(text in detail for text in _OTHER_CALLS)


# The App Server -------------------------------------------------------------------------------------------------------


def of_finish(reason: str | None, text: str) -> GatewayError:
    """Return the error of a turn that did not end well; ``text`` is what was said of its last failure.

    A model provider's failure arrives as ``429: {...}``, whatever its type (letta 0.34.12).
    """
    if _NO_AGENT.search(text):
        return AgentGone(should_retry=False)
    if _BUDGET.search(text):
        return BudgetExceeded()
    if _NO_TOOL in text:
        return TurnFailed(
            "LETTA_GATEWAY_SERVER_TOOLS names a tool that this Letta server lacks: the operator should mend it.",
            code="unknown_server_tool",
            should_retry=False,
        )
    if _NO_MODEL in text:
        return TurnFailed(
            "The agent's model is not to be had on the Letta server: the operator should connect its provider there, "
            "or choose another model for the agent.",
            code="model_not_available",
            should_retry=False,
        )
    status = _STATUS.search(text)
    known = _PROVIDER_STATUSES.get(status[1]) if status is not None else None
    if known is not None:
        return known()
    return of_stop(reason or "error")


def is_refusal(text: str) -> bool:
    """Tell whether the model's provider filtered the answer, which Letta takes for a failure."""
    return "finish_reason: content_filter" in text


def is_abandoned_run(text: str) -> bool:
    """Tell whether an input was not taken as its conversation waits for a run that nobody hears any more."""
    return _ABANDONED.search(text) is not None


def is_no_conversation(text: str | None) -> bool:
    """Tell whether a command failed because its conversation is not there."""
    return _NO_CONVERSATION.search(text or "") is not None


def of_refusal(text: str | None) -> GatewayError:
    """Return the error of a command or an input that was not accepted."""
    if _NO_AGENT.search(text or ""):
        return AgentGone(should_retry=False)
    return UpstreamRejected(should_retry=False)


_NO_MODEL: Final = "Unknown model "
_NO_TOOL: Final = "Unknown bundled client tool"
_STATUS: Final = re.compile(r"(?:^|\")([45]\d\d): ")
_PROVIDER_STATUSES: Final[dict[str, Callable[[], GatewayError]]] = {
    "400": _DETAILS["INVALID_ARGUMENT"],
    "401": _ERROR_TYPES["llm_authentication"],
    "402": _ERROR_TYPES["insufficient_credits"],
    "403": _ERROR_TYPES["llm_authentication"],
    "408": _ERROR_TYPES["llm_timeout"],
    "413": _context_overflow,
    "422": _DETAILS["INVALID_ARGUMENT"],
    "429": _ERROR_TYPES["llm_rate_limit"],
    **dict.fromkeys(("500", "502", "503", "504", "529"), _STOPS["llm_api_error"]),
}
