import email.utils
import json
import ssl
import time
from typing import Any

import aiohttp
import httpx
import letta_client
import pytest
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from gateway.errors import (
    AgentGone,
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
from gateway.letta.upstream_errors import (
    DEFAULT_RETRY_AFTER,
    FOREIGN,
    NOT_DELIVERED,
    before_answer,
    control_plane,
    for_status,
    retry_after,
    truncated,
)

KEY = ConnectionKey("letta.internal", 8283, is_ssl=True, ssl=True, proxy=None, proxy_auth=None, proxy_headers_hash=None)
REQUEST = httpx.Request("GET", "http://letta.internal:8283/v1/agents/")
SECRET = "sk-let-secret at http://letta.internal:8283"


def os_error() -> OSError:
    return OSError(111, SECRET)


# On the way to the answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("foreign", "ours", "code", "should_retry"),
    [
        (aiohttp.ClientConnectorError(KEY, os_error()), UpstreamUnavailable, "upstream_unavailable", True),
        (aiohttp.ClientConnectorDNSError(KEY, os_error()), UpstreamInvalid, "upstream_name_not_resolved", True),
        (
            aiohttp.ClientConnectorCertificateError(KEY, ssl.CertificateError(SECRET)),
            UpstreamInvalid,
            "upstream_tls_failed",
            False,
        ),
        (aiohttp.ClientConnectorSSLError(KEY, os_error()), UpstreamInvalid, "upstream_tls_failed", False),
        (aiohttp.ConnectionTimeoutError(SECRET), UpstreamTimeout, "upstream_timeout", True),
        (aiohttp.ServerDisconnectedError(SECRET), UpstreamUnavailable, "upstream_unavailable", False),
        (aiohttp.ClientOSError(104, SECRET), UpstreamUnavailable, "upstream_unavailable", False),
        (aiohttp.ClientConnectionResetError(SECRET), UpstreamUnavailable, "upstream_unavailable", False),
        (aiohttp.ClientConnectionError(SECRET), UpstreamUnavailable, "upstream_unavailable", False),
        (aiohttp.SocketTimeoutError(SECRET), UpstreamUnavailable, "upstream_unavailable", False),
        (
            aiohttp.ClientResponseError(
                aiohttp.RequestInfo(URL("http://letta.internal"), "POST", headers={}, real_url=URL()),  # type: ignore[arg-type]
                (),
                message=SECRET,
            ),
            UpstreamInvalid,
            "upstream_invalid_response",
            False,
        ),
        (aiohttp.ClientPayloadError(SECRET), UpstreamInvalid, "upstream_invalid_response", False),
        (TimeoutError(SECRET), UpstreamTimeout, "upstream_timeout", True),
        (ConnectionResetError(SECRET), UpstreamUnavailable, "upstream_unavailable", False),
        (os_error(), UpstreamUnavailable, "upstream_unavailable", False),
    ],
)
def test_failure_before_the_answer(
    *, foreign: Exception, ours: type[GatewayError], code: str, should_retry: bool
) -> None:
    error = before_answer(foreign)
    assert type(error) is ours
    assert (error.code, error.should_retry) == (code, should_retry)
    assert SECRET not in error.body().decode()
    assert "letta.internal" not in error.body().decode()
    assert isinstance(foreign, FOREIGN)
    if should_retry:
        assert error.retry_after == DEFAULT_RETRY_AFTER


@pytest.mark.parametrize(
    ("foreign", "delivered"),
    [
        (aiohttp.ClientConnectorError(KEY, os_error()), False),
        (aiohttp.ClientConnectorDNSError(KEY, os_error()), False),
        (aiohttp.ConnectionTimeoutError(), False),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientOSError(104, "reset"), True),
        (aiohttp.SocketTimeoutError(), True),
        (TimeoutError(), True),
    ],
)
def test_only_what_never_left_is_tried_again(*, foreign: Exception, delivered: bool) -> None:
    assert isinstance(foreign, NOT_DELIVERED) is not delivered


def test_failure_in_the_stream_is_a_truncated_answer() -> None:
    error = truncated()
    assert type(error) is UpstreamTruncated
    assert error.should_retry is False


# Statuses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "ours", "answered", "should_retry"),
    [
        (301, UpstreamInvalid, 502, False),
        (307, UpstreamInvalid, 502, False),
        (400, UpstreamRejected, 400, False),
        (401, UpstreamAuthFailed, 502, False),
        (402, UpstreamQuotaExceeded, 429, False),
        (403, UpstreamAuthFailed, 502, False),
        (404, AgentGone, 404, None),
        (408, UpstreamTimeout, 504, False),
        (409, ConversationBusy, 409, True),
        (410, UpstreamInvalid, 502, False),
        (413, UpstreamRejected, 400, False),
        (418, UpstreamInvalid, 502, False),
        (422, UpstreamRejected, 400, False),
        (429, UpstreamRateLimited, 429, True),
        (500, UpstreamInvalid, 502, False),
        (502, UpstreamInvalid, 502, False),
        (503, UpstreamUnavailable, 503, False),
        (504, UpstreamTimeout, 504, False),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>sk-let</html>", b'{"detail":"sk-let"}', b"\xff", b"[" * 100_000])
def test_status(
    *, status: int, ours: type[GatewayError], answered: int, should_retry: bool | None, body: bytes
) -> None:
    error = for_status(status, {}, body)
    assert type(error) is ours
    assert (error.status, error.should_retry) == (answered, should_retry)
    assert b"sk-let" not in error.body()


@pytest.mark.parametrize(
    ("body", "ours"),
    [
        ({"detail": {"code": "PENDING_APPROVAL", "pending_request_id": "x"}}, PendingApproval),
        ({"detail": {"code": "CONVERSATION_BUSY"}}, ConversationBusy),
        ({"detail": {}}, ConversationBusy),
        ({"detail": "The agent is busy"}, ConversationBusy),
        ({"detail": ["?"]}, ConversationBusy),
        ({"detail": {"code": 7}}, ConversationBusy),
        ({}, ConversationBusy),
        ([], ConversationBusy),
    ],
)
def test_conflict(body: Any, ours: type[GatewayError]) -> None:
    assert type(for_status(409, {}, json.dumps(body).encode())) is ours


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("value", "wait"), [("7", 7.0), ("soon", DEFAULT_RETRY_AFTER), ("-1", DEFAULT_RETRY_AFTER)])
def test_wait_that_letta_asks_for(status: int, value: str, wait: float) -> None:
    assert for_status(status, {"Retry-After": value}, b"").retry_after == wait
    assert for_status(status, httpx.Headers({"retry-after": value}), b"").retry_after == wait


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("3", 3.0),
        (" 3 ", 3.0),
        ("0.5", 1.0),
        ("0", None),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("1e400", None),
        ("1e9", 60.0),
        ("soon", None),
        ("Wed, 99 Nov 2026 99:99:99 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None),
        ("Fri, 01 Jan 99999 00:00:00 GMT", None),
        ("\x00", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    wait = retry_after(email.utils.formatdate(time.time() + 30, usegmt=True))
    assert wait is not None
    assert 28 < wait < 31


def test_absurd_wait_is_clamped_where_it_goes_out() -> None:
    assert for_status(429, {"Retry-After": "1e9"}, b"").headers()["Retry-After"] == "60"


# The control plane ---------------------------------------------------------------------------------------------------


def status_error(status: int, **headers: str) -> letta_client.APIStatusError:
    response = httpx.Response(status, headers=headers, content=SECRET.encode(), request=REQUEST)
    return letta_client.APIStatusError(SECRET, response=response, body=None)


@pytest.mark.parametrize(
    ("foreign", "ours", "should_retry"),
    [
        (letta_client.APITimeoutError(REQUEST), UpstreamTimeout, True),
        (letta_client.APIConnectionError(message=SECRET, request=REQUEST), UpstreamUnavailable, True),
        (status_error(401), UpstreamAuthFailed, False),
        (status_error(404), AgentGone, None),
        (status_error(500), UpstreamInvalid, True),
        (status_error(503), UpstreamUnavailable, True),
        (letta_client.LettaError(SECRET), UpstreamInvalid, False),
    ],
)
def test_failure_of_the_control_plane(
    *, foreign: letta_client.LettaError, ours: type[GatewayError], should_retry: bool | None
) -> None:
    error = control_plane(foreign)
    assert type(error) is ours
    assert error.should_retry is should_retry
    assert SECRET not in error.body().decode()
    assert isinstance(foreign, letta_client.LettaError)


def test_control_plane_passes_on_the_wait() -> None:
    assert control_plane(status_error(429, **{"Retry-After": "9"})).retry_after == 9
