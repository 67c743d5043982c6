"""What goes wrong on the way to Letta over HTTP -> our errors: one table for exceptions, one for statuses.

Nothing that an upstream says is shown; whether the message may have been delivered decides ``x-should-retry``.
"""

import asyncio
import email.utils
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
import httpx
import letta_client
import msgspec

from gateway.errors import (
    AgentGone,
    BackendError,
    ConversationBusy,
    GatewayError,
    PendingApproval,
    UpstreamAuthFailed,
    UpstreamInvalid,
    UpstreamQuotaExceeded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta import failures

DEFAULT_RETRY_AFTER: Final = 2.0
MIN_RETRY_AFTER: Final = 1.0
MAX_RETRY_AFTER: Final = 60.0
"""What an upstream asks for is believed within these."""


def _refused() -> BackendError:
    return UpstreamUnavailable(retry_after=DEFAULT_RETRY_AFTER, should_retry=True)


def _reset() -> BackendError:
    return UpstreamUnavailable(
        "The Letta server closed the connection before it answered. The message may have been delivered.",
        retry_after=DEFAULT_RETRY_AFTER,
        should_retry=False,
    )


def _name_unknown() -> BackendError:
    return UpstreamInvalid(
        "The Letta server's host name cannot be resolved. The operator should check LETTA_BASE_URL.",
        code="upstream_name_not_resolved",
        retry_after=DEFAULT_RETRY_AFTER,
        should_retry=True,
    )


def _bad_certificate() -> BackendError:
    return UpstreamInvalid(
        "The Letta server's TLS certificate is not valid for it. The operator should check LETTA_BASE_URL.",
        code="upstream_tls_failed",
        should_retry=False,
    )


def _too_slow_to_connect() -> BackendError:
    return UpstreamTimeout(
        "The Letta server did not accept a connection in time.", retry_after=DEFAULT_RETRY_AFTER, should_retry=True
    )


def _invalid() -> BackendError:
    return UpstreamInvalid(should_retry=False)


# The most specific first: the first class that fits decides.
_BEFORE_THE_ANSWER: Final[tuple[tuple[type[BaseException], Callable[[], BackendError]], ...]] = (
    (aiohttp.ClientConnectorDNSError, _name_unknown),
    (aiohttp.ClientConnectorCertificateError, _bad_certificate),
    (aiohttp.ClientSSLError, _bad_certificate),
    (aiohttp.ClientConnectorError, _refused),
    (aiohttp.ConnectionTimeoutError, _too_slow_to_connect),
    (aiohttp.ServerDisconnectedError, _reset),
    (aiohttp.ClientOSError, _reset),
    (aiohttp.ClientConnectionError, _reset),
    (aiohttp.ClientResponseError, _invalid),
    (aiohttp.ClientPayloadError, _invalid),
    (asyncio.TimeoutError, _too_slow_to_connect),
)

_NOT_REACHED: Final = _BEFORE_THE_ANSWER[:3]

PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which a question may be asked again."""

NOT_DELIVERED: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""Failures after which the request surely never left: only these are ever retried."""

FOREIGN: Final = (aiohttp.ClientError, TimeoutError, OSError)
"""Everything that aiohttp raises for a request."""


def worth_another_try(error: BaseException) -> bool:
    """Tell whether connecting again at once makes sense: after a refusal, not after a wait or a wrong certificate."""
    return isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError)


def before_answer(error: BaseException) -> BackendError:
    """Return our error for an exception of aiohttp's before the response's headers."""
    for kind, ours in _BEFORE_THE_ANSWER:
        if isinstance(error, kind):
            return ours()
    return _reset()


def truncated() -> BackendError:
    """Return our error for a connection that broke while the body was read."""
    return UpstreamTruncated(should_retry=False)


# Statuses ------------------------------------------------------------------------------------------------------------


class _Detail(msgspec.Struct):
    code: str = ""


class _ConflictBody(msgspec.Struct):
    detail: _Detail | str = ""


_decode_conflict: Final = msgspec.json.Decoder(_ConflictBody).decode

_STATUSES: Final[dict[int, Callable[[float | None], GatewayError]]] = {
    400: lambda _: UpstreamRejected(should_retry=False),
    401: lambda _: UpstreamAuthFailed(should_retry=False),
    402: lambda _: UpstreamQuotaExceeded(should_retry=False),
    403: lambda _: UpstreamAuthFailed(should_retry=False),
    408: lambda _: UpstreamTimeout(should_retry=False),
    413: lambda _: UpstreamRejected(should_retry=False),
    422: lambda _: UpstreamRejected(should_retry=False),
    429: lambda wait: UpstreamRateLimited(retry_after=wait or DEFAULT_RETRY_AFTER, should_retry=True),
    503: lambda wait: UpstreamUnavailable(retry_after=wait or DEFAULT_RETRY_AFTER, should_retry=False),
    504: lambda _: UpstreamTimeout(should_retry=False),
}

STRUGGLING: Final = frozenset({502, 503, 504})
"""Statuses that count as a failure of the way to Letta rather than of one request."""


def for_status(status: int, headers: Mapping[str, str], body: bytes) -> GatewayError:
    """Return our error for an answer that is not 200."""
    if status == 404:  # noqa: PLR2004 - HTTP's own number
        return AgentGone()
    if status == 409:  # noqa: PLR2004
        return _conflict(body)
    if status == 400 and failures.refuses_returns(body.decode("utf-8", "replace")):  # noqa: PLR2004
        return failures.ReturnsRefused(should_retry=False)
    known = _STATUSES.get(status)
    if known is not None:
        return known(retry_after(headers.get("Retry-After")))
    return UpstreamInvalid("The Letta server failed to answer this request.", code="upstream_error", should_retry=False)


def _conflict(body: bytes) -> GatewayError:
    try:
        detail = _decode_conflict(body).detail
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ConversationBusy()
    if isinstance(detail, _Detail) and detail.code == "PENDING_APPROVAL":
        return PendingApproval()
    return ConversationBusy()


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a ``Retry-After`` header, in either of its forms; None where it makes no sense."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER) if 0 < seconds < float("inf") else None


# The control plane ---------------------------------------------------------------------------------------------------


def too_slow() -> BackendError:
    """Return the error of a question that was not answered in time."""
    return UpstreamTimeout(
        "The Letta server did not answer in time. Try again in a moment.",
        retry_after=DEFAULT_RETRY_AFTER,
        should_retry=True,
    )


def control_plane(error: letta_client.LettaError) -> GatewayError:
    """Return our error for an exception of letta-client's: what it asks for changes nothing, so it may be retried."""
    match error:
        case letta_client.APITimeoutError():
            return too_slow()
        case letta_client.APIConnectionError():
            return _connection(error)
        case letta_client.APIStatusError(response=response):
            return answered(response.status_code, response.headers, response.content)
        case _:
            return _invalid()


class Answered(Exception):
    """An answer that was none to the question."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def answered(status: int, headers: Mapping[str, str], body: bytes) -> GatewayError:
    """Return our error for a question to the control plane that was not answered by 200."""
    ours = for_status(status, headers, body)
    if status in PASSING:
        ours.should_retry = True  # nothing was said to an agent yet
    return ours


def unanswered(error: BaseException) -> BackendError:
    """Return our error for an exception of aiohttp's after a question to the control plane."""
    if isinstance(error, TimeoutError):
        return too_slow()
    if isinstance(error, aiohttp.ClientPayloadError):
        return _invalid()
    return next((ours() for kind, ours in _NOT_REACHED if isinstance(error, kind)), _refused())


def status_of(error: GatewayError) -> int | None:
    """Return the status that the control plane answered with before it became our error; None for no answer."""
    match error.__cause__:
        case letta_client.APIStatusError(status_code=status):
            return status
        case Answered(status=status):
            return status
        case letta_client.APIConnectionError() | aiohttp.ClientError() | OSError():
            return None
        case _:
            return error.status


def _connection(error: BaseException) -> BackendError:
    """Tell why there is no answer: letta-client wraps httpx, which wraps httpcore, which wraps the reason."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, socket.gaierror):
            return _name_unknown()
        if isinstance(reason, ssl.SSLError):
            return _bad_certificate()
        if isinstance(reason, httpx.DecodingError):
            return _invalid()
        reason = reason.__cause__ or reason.__context__
    return _refused()
