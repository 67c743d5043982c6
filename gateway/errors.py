"""Every failure that a client of the gateway can see, as one tree.

::

    GatewayError
    ├── ClientError            the caller's request is at fault
    │   ├── InvalidRequest         400
    │   ├── UnsupportedParameter   400
    │   ├── AuthenticationFailed   401
    │   ├── BudgetExceeded         402
    │   ├── Forbidden              403
    │   ├── ModelNotFound          404
    │   ├── ToolCallNotFound       404
    │   ├── ResponseNotFound       404
    │   ├── MemoryNotFound         404
    │   ├── RouteNotFound          404
    │   ├── MethodNotAllowed       405
    │   ├── ConversationBusy       409
    │   ├── SettingChanged         409
    │   ├── PendingApproval        409
    │   ├── OutcomeUnknown         409
    │   ├── IdempotencyConflict    422
    │   ├── RequestTimeout         408
    │   ├── PayloadTooLarge        413
    │   ├── UnsupportedMediaType   415
    │   ├── RateLimited            429
    │   └── BudgetHeld             429
    ├── BackendError           Letta, or the way to it, is at fault
    │   ├── UpstreamUnavailable    503   refused, reset before the answer, breaker open
    │   ├── UpstreamTimeout        504   a deadline of ours ran out
    │   ├── UpstreamInvalid        502   an answer that makes no sense
    │   ├── UpstreamAuthFailed     502   Letta refused the gateway's own credential
    │   ├── UpstreamTruncated      502   the stream ended without a stop reason
    │   ├── UpstreamRateLimited    429   Letta or its model provider said 429
    │   ├── UpstreamQuotaExceeded  429   no credits left
    │   ├── UpstreamRejected       400   Letta did not accept the message
    │   ├── AgentGone              404   Letta knows no such agent (any more)
    │   │   └── ConversationGone       404
    │   ├── TurnFailed             502   the agent's run failed
    │   ├── TurnCancelled          502   the run was cancelled by somebody else
    │   ├── ResponseCancelled      502   the answer was cancelled by its owner
    │   └── InvalidStructuredOutput 502  the answer does not fit the schema that was asked for
    ├── StorageUnavailable     503   the gateway's own database is locked, full, gone or unreachable
    ├── SharedStateUnavailable 503   what replicas share is slow, gone or full
    ├── HeldElsewhere          503   another gateway has the conversation's turn: the request is forwarded
    ├── ThreadLost             503   another gateway took the conversation over, or may have
    ├── Overloaded             503   the gateway itself is full
    ├── ShuttingDown           503   the gateway is going away
    └── InternalError          500   our bug: nothing of it is shown

Messages are safe to show and tell the reader what to do next: nothing that an upstream said is part of them.
The status and codes follow OpenAI's error guide; ``x-should-retry`` is what OpenAI's SDKs obey
(openai-python ``_base_client._should_retry``): it says whether the message may already have reached the agent.
"""

import math
from typing import ClassVar, Final, TypeVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error object: ``message``, ``type``, ``param``, ``code``."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """What stands on the wire: ``{"error": {...}}``."""

    error: ErrorBody


Error = TypeVar("Error", bound=BaseException)

_ENCODER: Final = msgspec.json.Encoder()


class GatewayError(Exception):
    """A failure with everything needed to answer it: status, OpenAI type and code, a message safe to show.

    ``param`` names the request's field at fault; ``retry_after`` is in seconds; ``should_retry`` is True when the
    message surely did not reach the agent, False when it may have, None where retrying is the client's own affair.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    default_message: ClassVar[str] = "The gateway failed. Try again; if it goes on, tell the operator the request id."

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        self.message = message or self.default_message
        self.param = param
        self.code = code or self.default_code
        self.retry_after = retry_after
        self.should_retry = should_retry
        super().__init__(self.message)

    def envelope(self) -> ErrorEnvelope:
        """Return the error in OpenAI's shape."""
        return ErrorEnvelope(ErrorBody(self.message, self.type, self.param, self.code))

    def body(self) -> bytes:
        """Return the error as JSON bytes."""
        return _ENCODER.encode(self.envelope())

    def headers(self) -> dict[str, str]:
        """Return the headers that go with the error when it is answered as an HTTP status."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


def dealt_with(error: Error) -> Error:
    """Return an error that is not to be raised further without the frames it came through, nor those of its causes.

    They hold whatever was at work, bodies and connections, and mostly the error itself: a ring that would stay until
    the garbage collector comes by.
    """
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and link.__traceback__ is not None:
            link.__traceback__ = None
            chain += (link.__cause__, link.__context__)
    return error


class ClientError(GatewayError):
    """The caller's request is at fault: it fails the same way until it is changed."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(ClientError):
    """The request is not what the API describes."""

    default_code = "invalid_value"
    default_message = "The request is invalid. Compare it with the API reference, then change it."


class UnsupportedParameter(ClientError):
    """The request asks for something that a Letta agent cannot do."""

    default_code = "unsupported_parameter"
    default_message = "The request asks for something that a Letta agent cannot do. Leave it out."


class AuthenticationFailed(ClientError):
    """No API key, or one that is not known."""

    status = 401
    default_code = "invalid_api_key"
    default_message = (
        "Incorrect API key provided. Send one of the gateway's keys as 'Authorization: Bearer <key>' or 'X-Api-Key'."
    )

    def headers(self) -> dict[str, str]:
        """Add the challenge that RFC 9110 (11.6.1) asks of every 401."""
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


class BudgetExceeded(ClientError):
    """The caller's budget is used up: unlike a rate limit, waiting some seconds does not help."""

    status = 402
    type = "insufficient_quota"
    default_code = "budget_exceeded"
    default_message = "Your budget is used up for now. Wait for its next period, or ask the operator for a larger one."

    def __init__(self) -> None:
        super().__init__(should_retry=False)


class BudgetHeld(ClientError):
    """What is left of the caller's budget is held by turns that run: it may be enough once these have ended."""

    status = 429
    type = "rate_limit_error"
    default_code = "budget_held"
    default_message = (
        "Other turns of yours hold what is left of your budget until it is known what they cost. Try again once one of "
        "them has ended."
    )

    def __init__(self) -> None:
        super().__init__(retry_after=2.0, should_retry=True)


class Forbidden(ClientError):
    """The caller is known, or anonymous, and may not do this."""

    status = 403
    type = "permission_error"
    default_code = "forbidden"
    default_message = "This is not allowed here. Send one of the gateway's API keys, or ask the operator for access."


class ModelNotFound(ClientError):
    """No agent of that name or id: the same answer for "does not exist" and "is not yours"."""

    status = 404
    default_code = "model_not_found"

    def __init__(self, model: str) -> None:
        shown = model if len(model) <= 100 else model[:100] + "..."  # noqa: PLR2004 - a bound for what is echoed
        super().__init__(
            f"The model '{shown}' does not exist. GET /v1/models lists the agents that answer here; names are exact, "
            "and agents that share a name answer to their ids.",
            param="model",
        )


class ToolCallNotFound(ClientError):
    """No call of that id waits for this caller: the same answer for "does not exist" and "is not yours"."""

    status = 404
    default_code = "tool_call_not_found"
    default_message = (
        "No tool call of this id waits for a result from you. Send results for the calls of the last answer, with the "
        "API key that it was asked with."
    )


class ResponseNotFound(ClientError):
    """No stored response of that id: the same answer for "does not exist" and "is not yours"."""

    status = 404
    default_code = "response_not_found"

    def __init__(self, response_id: str, *, param: str | None = None) -> None:
        super().__init__(
            f"Response with id '{response_id[:100]}' not found. Check the id and the API key: a response is kept for "
            "thirty days, unless it was asked for with 'store' false.",
            param=param,
        )


class MemoryNotFound(ClientError):
    """The agent has no memory block of that label."""

    status = 404
    default_code = "memory_not_found"
    default_message = "The agent has no memory block of this label. GET /api/v1/agent/memory lists those it has."


class RouteNotFound(ClientError):
    """No such path."""

    status = 404
    default_code = "unknown_url"
    default_message = "Unknown URL. The API is served below /v1; check the client's base URL."


class MethodNotAllowed(ClientError):
    """The path exists, for other methods."""

    status = 405
    default_code = "method_not_allowed"

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"This URL does not take that method. It takes: {self.allowed}.")

    def headers(self) -> dict[str, str]:
        """Name the methods that the path takes."""
        return {**super().headers(), "Allow": self.allowed}


class OutcomeUnknown(ClientError):
    """A repeated request whose first one was begun, and whose answer is not to be had any more."""

    status = 409
    type = "conflict_error"
    default_code = "outcome_unknown"
    default_message = (
        "This request was sent before and may have reached the agent, but its answer is not to be had any more. Check "
        "the conversation; to say the message once more, send it as a new request."
    )

    def __init__(self) -> None:
        super().__init__(should_retry=False)


class IdempotencyConflict(ClientError):
    """An idempotency key that stands for another request."""

    status = 422
    default_code = "idempotency_key_reused"
    default_message = "This Idempotency-Key was used for another request. Send a new key with a new request."


class RequestTimeout(ClientError):
    """The request's body did not arrive in time."""

    status = 408
    default_code = "request_timeout"
    default_message = "The request's body did not arrive in time. Send it again."


class ConversationBusy(ClientError):
    """Other turns on this agent's thread are waiting already."""

    status = 409
    type = "conflict_error"
    default_code = "conversation_busy"
    default_message = "The agent is busy with other messages. Wait a moment, then send this one again."

    def __init__(self, message: str | None = None, *, retry_after: float = 2.0) -> None:
        super().__init__(message, retry_after=retry_after, should_retry=True)


class SettingChanged(ClientError):
    """Somebody else changed the setting since the operator's page showed it."""

    status = 409
    type = "conflict_error"
    default_code = "setting_changed"
    default_message = "This setting was changed meanwhile: look at what it is now. Send yours again if it is to hold."


class PendingApproval(ClientError):
    """The agent waits for somebody's answer to a tool call and takes no message until then."""

    status = 409
    type = "conflict_error"
    default_code = "pending_approval"
    default_message = (
        "The agent is waiting for a decision on one of its tool calls. Approve or deny it where it was asked, "
        "then send the message again."
    )

    def __init__(self) -> None:
        super().__init__(should_retry=False)


class PayloadTooLarge(ClientError):
    """The body is over the limit."""

    status = 413
    default_code = "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request's body is over the limit of {limit} bytes. Send less, or smaller images.")


class UnsupportedMediaType(ClientError):
    """The body is not plain JSON."""

    status = 415
    default_code = "unsupported_media_type"
    default_message = "Send the request's body as plain JSON, with 'Content-Type: application/json'."


class RateLimited(ClientError):
    """The caller's own limit is used up."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(self, limit: str, retry_after: float) -> None:
        super().__init__(
            f"Rate limit reached: {limit}. Send less often; the x-ratelimit headers say how much is left.",
            retry_after=retry_after,
            should_retry=True,
        )


class BackendError(GatewayError):
    """Letta, or the way to it, is at fault."""

    status = 502


class UpstreamUnavailable(BackendError):
    """Letta cannot be reached: refused, reset before the answer, or known to be down."""

    status = 503
    default_code = "upstream_unavailable"
    default_message = "The Letta server cannot be reached right now. Try again in a moment."


class UpstreamTimeout(BackendError):
    """A deadline of the gateway ran out before Letta was done."""

    status = 504
    default_code = "upstream_timeout"
    default_message = "The agent did not answer in time. It may have the message all the same: try again later."


class UpstreamInvalid(BackendError):
    """Letta answered something that makes no sense."""

    default_code = "upstream_invalid_response"
    default_message = (
        "The Letta server answered something that is not its protocol. The operator should check LETTA_BASE_URL."
    )


class UpstreamAuthFailed(BackendError):
    """Letta refused the gateway's own credential: a matter for the operator."""

    default_code = "upstream_auth_failed"
    default_message = "The Letta server refused the gateway's credentials. The operator should check LETTA_API_KEY."


class UpstreamTruncated(BackendError):
    """The stream ended without a stop reason: what was said so far is not the whole answer."""

    default_code = "upstream_stream_truncated"
    default_message = (
        "The answer was cut off: the connection to the Letta server ended early. The message was delivered: ask the "
        "agent to go on."
    )


class UpstreamRateLimited(BackendError):
    """Letta, or the model provider behind it, asked to slow down."""

    status = 429
    type = "rate_limit_error"
    default_code = "upstream_rate_limited"
    default_message = "The agent's model provider is rate limited. Wait a moment, then try again."


class UpstreamQuotaExceeded(BackendError):
    """The Letta account has no credits left."""

    status = 429
    type = "insufficient_quota"
    default_code = "insufficient_quota"
    default_message = "The account behind this agent has no credits left. The operator should check its billing."


class UpstreamRejected(BackendError):
    """Letta did not accept the message: sending it again changes nothing."""

    status = 400
    type = "invalid_request_error"
    default_code = "upstream_rejected"
    default_message = "The Letta server did not accept this message. Check its images and size, then change it."


class AgentGone(BackendError):
    """Letta knows no such agent; whoever knows the name that was asked for answers ``ModelNotFound`` instead."""

    status = 404
    type = "invalid_request_error"
    default_code = "agent_gone"
    default_message = "The Letta server knows no such agent. GET /v1/models lists the agents that answer here."


class ConversationGone(AgentGone):
    """Letta knows no such conversation (any more); the chat that had it gets another one."""

    default_code = "conversation_gone"
    default_message = "The Letta server knows this conversation no more. Send the message again to begin a new one."


class TurnFailed(BackendError):
    """The agent's run failed on the Letta server."""

    default_code = "agent_run_failed"
    default_message = (
        "The agent's run failed on the Letta server. The message was delivered; the operator should check Letta's log."
    )


class TurnCancelled(BackendError):
    """The run was cancelled, and not by this request."""

    default_code = "agent_run_cancelled"
    default_message = (
        "The agent's run was cancelled before it was done. The message was delivered: ask the agent to go on."
    )


class StorageUnavailable(GatewayError):
    """The gateway's own database cannot be used right now; ``reason`` is for the log.

    Who raises it cannot know whether the message reached the agent: who catches it sets ``should_retry``.
    """

    status = 503
    default_code = "storage_unavailable"
    default_message = (
        "The gateway's database cannot be used right now. Try again in a moment; if it goes on, tell the operator."
    )

    def __init__(self, reason: str = "unreachable") -> None:
        self.reason = reason
        super().__init__(retry_after=2.0)


class SharedStateUnavailable(GatewayError):
    """What the replicas share cannot be asked right now; ``reason`` is for the log."""

    status = 503
    default_code = "shared_state_unavailable"
    default_message = (
        "What this gateway shares with its replicas cannot be used right now. Try again in a moment; if it goes on, "
        "tell the operator."
    )

    def __init__(self, reason: str = "unreachable") -> None:
        self.reason = reason
        super().__init__(retry_after=1.0, should_retry=True)


class HeldElsewhere(GatewayError):
    """What the request is about is in another gateway's hands, at ``address``; ``place`` is how that is written down.

    The gateway forwards such a request. Its client sees this where the other one cannot be reached either.
    """

    status = 503
    default_code = "held_elsewhere"
    default_message = "Another gateway is at work on this conversation and cannot be reached. Try again in a moment."

    def __init__(self, name: str = "", place: str = "") -> None:
        self.name = name
        self.place = place
        super().__init__(retry_after=1.0, should_retry=True)


class ThreadLost(GatewayError):
    """Another gateway has taken over the conversation of a turn, or may have, as this one cannot hold it any longer."""

    status = 503
    default_code = "conversation_lost"
    default_message = (
        "This answer was ended, as its conversation went on in another gateway, or may have. Send the message again to "
        "go on."
    )

    def __init__(self, *, should_retry: bool = False) -> None:
        super().__init__(should_retry=should_retry)


class ResponseCancelled(BackendError):
    """The answer was cancelled by whoever asked for it, in another request."""

    default_code = "response_cancelled"
    default_message = "This response was cancelled by another request. Send a new one to ask again."


class InvalidStructuredOutput(BackendError):
    """The agent's answer is not the JSON that was asked for."""

    status = 502
    default_code = "invalid_structured_output"
    default_message = (
        "The agent's answer does not fit the format that was asked for. The message was delivered: ask it to answer "
        "again, or loosen the schema."
    )


class Overloaded(GatewayError):
    """The gateway holds as many streams as it can."""

    status = 503
    default_code = "overloaded"
    default_message = "The gateway holds as many streams as it can. Try again in a moment."

    def __init__(self) -> None:
        super().__init__(retry_after=2.0, should_retry=True)


class ShuttingDown(GatewayError):
    """The gateway is being stopped."""

    status = 503
    default_code = "shutting_down"
    default_message = "The gateway is being restarted. Try again in a moment."


class InternalError(GatewayError):
    """A bug of ours: nothing of it is shown."""

    default_code = "internal_error"
