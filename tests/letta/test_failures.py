"""How turns fail on Letta."""

from typing import get_args

import pytest
from letta_client.types import StopReasonType

from gateway.errors import AgentGone, GatewayError, PendingApproval, TurnFailed, UpstreamInvalid, UpstreamRejected
from gateway.letta.failures import (
    FOLLOWED_BY_DETAIL,
    good_stop,
    is_abandoned_run,
    is_refusal,
    of_error,
    of_finish,
    of_refusal,
    of_stop,
)
from gateway.translation.agent_events import StopReason

BAD_STOPS = sorted(set(get_args(StopReasonType)) - set(get_args(StopReason)))


@pytest.mark.parametrize("reason", BAD_STOPS)
def test_every_bad_stop_of_letta_is_known(reason: str) -> None:
    error = of_stop(reason)
    assert not isinstance(error, UpstreamInvalid)
    assert error.should_retry is False
    assert reason == "cancelled" or reason in FOLLOWED_BY_DETAIL


def test_stop_that_nobody_knows() -> None:
    assert isinstance(of_stop("struck_by_lightning"), UpstreamInvalid)
    assert "struck_by_lightning" not in of_stop("struck_by_lightning").message


@pytest.mark.parametrize(
    ("error_type", "detail", "code"),
    [
        ("llm_rate_limit", None, "upstream_rate_limited"),
        ("llm_timeout", None, "model_timeout"),
        ("llm_authentication", None, "model_auth_failed"),
        ("llm_error", None, "model_error"),
        ("llm_error", "INVALID_ARGUMENT: bad image", "upstream_rejected"),
        ("internal_error", "RATE_LIMIT_EXCEEDED: slow down", "upstream_rate_limited"),
        ("internal_error", "PAYMENT_REQUIRED: pay", "insufficient_quota"),
        ("internal_error", "something else", "agent_run_failed"),
        (None, None, "agent_run_failed"),
    ],
)
def test_error_message(error_type: str | None, detail: str | None, code: str) -> None:
    error = of_error(error_type, "secret", detail, None)
    assert error.code == code
    assert "secret" not in error.message


_REFUSED = "{'error': {'message': '%s', 'type': 'budget_exceeded', 'param': None, 'code': '%d'}} [BYOK]"
USED_UP = (
    f"INVALID_ARGUMENT: Invalid request content for OpenAI: Error code: 422 - {_REFUSED % ('Key=secret', 422)}",
    f"RATE_LIMIT_EXCEEDED: Rate limited by OpenAI: Error code: 429 - {_REFUSED % ('ExceededBudget: secret', 429)}",
    "INTERNAL_SERVER_ERROR: ExceededBudget: User=secret over budget. Spend=0.0126, Budget=0.01",
)


@pytest.mark.parametrize("detail", USED_UP)
def test_budget_that_litellm_has_used_up_is_no_rate_limit(detail: str) -> None:
    error = of_error("llm_error", "An error occurred with the LLM request.", detail, of_stop("llm_api_error"))
    assert (error.status, error.code, error.should_retry) == (402, "budget_exceeded", False)
    assert "secret" not in error.message


def test_pending_approval_is_told_by_its_text_alone() -> None:
    text = "CONFLICT: Cannot send a new message: The agent is waiting for approval on a tool call."
    assert isinstance(of_error("internal_error", text, None, None), PendingApproval)
    assert isinstance(of_error("internal_error", None, text, None), PendingApproval)


def test_what_the_stop_announced_counts_where_the_error_says_nothing() -> None:
    announced: GatewayError = TurnFailed("announced", code="model_error")
    assert of_error("internal_error", None, None, announced) is announced


# The App Server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_good_stop(reason: StopReason) -> None:
    assert good_stop(reason) == reason


@pytest.mark.parametrize("reason", [*BAD_STOPS, "struck_by_lightning", "", None])
def test_stop_that_is_not_good(reason: str | None) -> None:
    assert good_stop(reason) is None


@pytest.mark.parametrize(
    ("reason", "text", "code"),
    [
        ("error", "", "agent_run_failed"),
        (None, "", "agent_run_failed"),
        ("cancelled", "", "agent_run_cancelled"),
        ("error", "something with secret", "agent_run_failed"),
        ("error", "Agent agent-1 not found", "agent_gone"),
        ("error", "Unknown bundled client tool: Teapot", "unknown_server_tool"),
        ("error", 'Unknown model "demo" for provider "lmstudio". Choose an available model.', "model_not_available"),
        ("llm_api_error", '400: {"error":"secret"}', "upstream_rejected"),
        ("error", "401: secret", "model_auth_failed"),
        ("error", "402: secret", "insufficient_quota"),
        ("error", "403: secret", "model_auth_failed"),
        ("error", "408: secret", "model_timeout"),
        ("error", "413: secret", "context_length_exceeded"),
        ("error", "422: secret", "upstream_rejected"),
        ("llm_api_error", '429: {"message":"secret"}', "upstream_rate_limited"),
        ("error", '{"error":"429: secret"}', "upstream_rate_limited"),
        ("llm_api_error", '422: {"message":"secret","type":"budget_exceeded","code":"422"}', "budget_exceeded"),
        ("llm_api_error", '429: {"message":"secret","type":"budget_exceeded","code":"429"}', "budget_exceeded"),
        *(("error", f"{status}: secret", "model_error") for status in (500, 502, 503, 504, 529)),
        ("error", "418: secret", "agent_run_failed"),
        ("error", "it took 429: secret", "agent_run_failed"),
        ("error", "1429: secret", "agent_run_failed"),
    ],
)
def test_finish_of_a_turn_that_failed(reason: str | None, text: str, code: str) -> None:
    error = of_finish(reason, text)
    assert (error.code, error.should_retry) == (code, False)
    assert "secret" not in error.message


def test_refusal_of_the_models_provider() -> None:
    assert is_refusal("Error: Provider finish_reason: content_filter")
    assert not is_refusal("finish_reason: stop")
    assert not is_refusal("")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Agent agent-1 not found", AgentGone),
        ("busy", UpstreamRejected),
        ("", UpstreamRejected),
        (None, UpstreamRejected),
    ],
)
def test_input_that_was_not_accepted(text: str | None, kind: type[GatewayError]) -> None:
    error = of_refusal(text)
    assert type(error) is kind
    assert error.should_retry is False


def test_run_that_is_in_the_way() -> None:
    assert is_abandoned_run("Conversation local-conv-3 already has an active run (local-run-7)")
    assert not is_abandoned_run("500: Conversation x already has an active run (y)")
    assert not is_abandoned_run("")
