import json
from typing import Any

import pytest

from gateway.accounts.errors import (
    AccountBlocked,
    AccountExists,
    EmailNotConfirmed,
    InvalidCredentials,
    InvalidRefreshToken,
    InvalidToken,
    PasswordRefused,
    RegistrationClosed,
    SamePassword,
    TooManyAttempts,
)
from gateway.accounts.identity.supabase_failures import Asked, code_of, refusal
from gateway.accounts.remote import Reply
from gateway.errors import Forbidden, GatewayError, InvalidRequest, UpstreamAuthFailed, UpstreamInvalid


def reply(status: int, body: Any, **headers: str) -> Reply:
    return Reply(status, headers, body if isinstance(body, bytes) else json.dumps(body).encode())


def legacy(code: str, status: int = 400) -> Reply:
    return reply(status, {"code": status, "error_code": code, "msg": "secret text of theirs"})


def versioned(code: str, status: int = 400) -> Reply:
    return reply(status, {"code": code, "message": "secret text of theirs"})


def oauth(code: str, status: int = 400) -> Reply:
    return reply(status, {"error": code, "error_description": "secret text of theirs"})


@pytest.mark.parametrize("shape", [legacy, versioned, oauth])
def test_code_in_each_shape(shape: Any) -> None:
    assert code_of(shape("weak_password")) == "weak_password"


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", {"code": 400}, {"code": "400"}, {"message": "no Route matched"}, b'{"code":null}']
)
def test_answer_without_a_code(body: Any) -> None:
    assert not code_of(reply(400, body))


def test_code_that_stands_in_a_header() -> None:
    assert code_of(Reply(400, {"x-sb-error-code": "user_banned"}, b"not JSON")) == "user_banned"


@pytest.mark.parametrize("shape", [legacy, versioned])
@pytest.mark.parametrize(
    ("asked", "code", "kind", "status"),
    [
        ("register", "user_already_exists", AccountExists, 409),
        ("register", "email_exists", AccountExists, 409),
        ("register", "weak_password", PasswordRefused, 400),
        ("register", "signup_disabled", RegistrationClosed, 403),
        ("register", "email_provider_disabled", RegistrationClosed, 403),
        ("register", "validation_failed", InvalidRequest, 400),
        ("register", "email_address_invalid", InvalidRequest, 400),
        ("register", "captcha_failed", UpstreamInvalid, 502),
        ("login", "invalid_credentials", InvalidCredentials, 401),
        ("login", "validation_failed", InvalidCredentials, 401),
        ("login", "email_not_confirmed", EmailNotConfirmed, 403),
        ("login", "user_banned", AccountBlocked, 403),
        ("refresh", "refresh_token_not_found", InvalidRefreshToken, 401),
        ("refresh", "refresh_token_already_used", InvalidRefreshToken, 401),
        ("refresh", "session_not_found", InvalidRefreshToken, 401),
        ("refresh", "session_expired", InvalidRefreshToken, 401),
        ("refresh", "validation_failed", InvalidRefreshToken, 401),
        ("refresh", "user_banned", AccountBlocked, 403),
        ("session", "bad_jwt", InvalidToken, 401),
        ("session", "session_not_found", InvalidToken, 401),
        ("session", "same_password", SamePassword, 400),
        ("session", "weak_password", PasswordRefused, 400),
        ("session", "insufficient_aal", Forbidden, 403),
        ("session", "user_sso_managed", Forbidden, 403),
        ("admin", "not_admin", UpstreamInvalid, 502),
        ("admin", "email_exists", AccountExists, 409),
        ("admin", "weak_password", PasswordRefused, 400),
        ("login", "something_new", UpstreamInvalid, 502),
    ],
)
def test_refusal_by_its_code(shape: Any, asked: Asked, code: str, kind: type[GatewayError], status: int) -> None:
    error = refusal(asked, shape(code))
    assert (type(error), error.status) == (kind, status)
    assert "secret text" not in error.message


def test_weak_password_names_its_field() -> None:
    assert refusal("register", legacy("weak_password")).param == "password"
    assert refusal("session", legacy("weak_password")).param == "new_password"


def test_refused_refresh_in_the_shape_of_oauth() -> None:
    assert isinstance(refusal("refresh", oauth("invalid_request")), InvalidRefreshToken)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("asked", ["register", "login", "refresh", "admin"])
def test_refused_key_of_the_gateway_is_the_operators_matter(asked: Asked, status: int) -> None:
    error = refusal(asked, reply(status, {"message": "Invalid API key", "hint": "Double check your key."}))
    assert (type(error), error.status, error.code) == (UpstreamAuthFailed, 502, "identity_auth_failed")


@pytest.mark.parametrize("code", ["bad_jwt", "no_authorization", "not_admin"])
def test_refused_service_key_is_never_the_users_401(code: str) -> None:
    assert isinstance(refusal("admin", legacy(code, 403)), UpstreamAuthFailed)


@pytest.mark.parametrize(("given", "seconds"), [({}, 60.0), ({"Retry-After": "9"}, 9.0)])
def test_limit_of_requests(given: dict[str, str], seconds: float) -> None:
    error = refusal("login", reply(429, {"code": "over_request_rate_limit"}, **given))
    assert (type(error), error.retry_after) == (TooManyAttempts, seconds)


def test_refreshes_at_once() -> None:
    error = refusal("refresh", versioned("conflict", 409))
    assert (type(error), error.retry_after) == (TooManyAttempts, 1.0)
