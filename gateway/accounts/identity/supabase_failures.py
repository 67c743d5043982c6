"""What Supabase Auth refuses -> our errors: one table by its error codes, and what some requests mean differently.

From supabase/auth, ``internal/api/apierrors`` (August 2026). Its texts are never shown.
"""

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import msgspec

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
from gateway.accounts.remote import Reply
from gateway.errors import Forbidden, GatewayError, InvalidRequest, UpstreamAuthFailed, UpstreamInvalid

Asked: TypeAlias = Literal["register", "login", "refresh", "session", "admin"]
"""What was asked for: ``session`` with the user's own access token, ``admin`` with the project's service key."""

WAIT: Final = 60.0
"""Seconds to wait where Supabase Auth does not say: its buckets fill up in minutes."""
TOO_MANY: Final = 429
CONFLICT: Final = 409


class _Failure(msgspec.Struct):
    """A refusal in any of three shapes: since API version 2024-01-01, before it, and OAuth's (RFC 6749, 5.2)."""

    code: str | int = ""
    error_code: str = ""
    error: str = ""


_decode: Final = msgspec.json.Decoder(_Failure, strict=False).decode


def _wrong_email() -> GatewayError:
    return InvalidRequest("This e-mail address is not accepted. Send another one.", param="email")


def _wrong_fields() -> GatewayError:
    return InvalidRequest("E-mail or password is not accepted in this form. Change them, then try again.")


def _second_factor() -> GatewayError:
    return Forbidden(
        "This account needs its second factor for that, which this API does not take.", code="second_factor_needed"
    )


def _elsewhere() -> GatewayError:
    return Forbidden("This account has no password here: its single sign-on keeps it.", code="password_kept_elsewhere")


def _captcha() -> GatewayError:
    return UpstreamInvalid(
        "Supabase Auth asks for a CAPTCHA, which this API cannot show. The operator should turn it off.",
        code="identity_captcha_required",
        should_retry=False,
    )


_CODES: Final[dict[str, Callable[[], GatewayError]]] = {
    "bad_json": _wrong_fields,
    "bad_jwt": InvalidToken,
    "captcha_failed": _captcha,
    "current_password_invalid": InvalidCredentials,
    "current_password_required": InvalidCredentials,
    "email_address_invalid": _wrong_email,
    "email_address_not_authorized": _wrong_email,
    "email_exists": AccountExists,
    "email_not_confirmed": EmailNotConfirmed,
    "email_provider_disabled": RegistrationClosed,
    "insufficient_aal": _second_factor,
    "invalid_credentials": InvalidCredentials,
    "no_authorization": InvalidToken,
    "reauthentication_needed": InvalidToken,
    "refresh_token_already_used": InvalidRefreshToken,
    "refresh_token_not_found": InvalidRefreshToken,
    "same_password": SamePassword,
    "session_expired": InvalidToken,
    "session_not_found": InvalidToken,
    "signup_disabled": RegistrationClosed,
    "user_already_exists": AccountExists,
    "user_banned": AccountBlocked,
    "user_not_found": InvalidToken,
    "user_sso_managed": _elsewhere,
    "validation_failed": _wrong_fields,
    "weak_password": PasswordRefused,
}

_MEANT: Final[dict[tuple[Asked, str], Callable[[], GatewayError]]] = {
    ("admin", "email_address_invalid"): _wrong_email,
    ("admin", "email_exists"): AccountExists,
    ("admin", "user_already_exists"): AccountExists,
    ("admin", "validation_failed"): _wrong_fields,
    ("admin", "weak_password"): PasswordRefused,
    ("login", "email_provider_disabled"): InvalidCredentials,
    ("login", "validation_failed"): InvalidCredentials,
    ("refresh", "bad_json"): InvalidRefreshToken,
    ("refresh", "invalid_grant"): InvalidRefreshToken,
    ("refresh", "invalid_request"): InvalidRefreshToken,
    ("refresh", "session_expired"): InvalidRefreshToken,
    ("refresh", "session_not_found"): InvalidRefreshToken,
    ("refresh", "user_not_found"): InvalidRefreshToken,
    ("refresh", "validation_failed"): InvalidRefreshToken,
    ("session", "weak_password"): lambda: PasswordRefused(param="new_password"),
}


def code_of(reply: Reply) -> str:
    """Return the code of a refusal; empty where it has none."""
    named = reply.headers.get("x-sb-error-code")
    if named:
        return named
    try:
        failure = _decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    code = failure.code if isinstance(failure.code, str) and not failure.code.isdigit() else ""
    return failure.error_code or code or failure.error


def refusal(asked: Asked, reply: Reply) -> GatewayError:
    """Return our error for an answer that is no success and below 500."""
    if reply.status == TOO_MANY:
        return TooManyAttempts(reply.retry_after or WAIT)
    if reply.status == CONFLICT:
        return TooManyAttempts(1.0)  # several refreshes of one session at once: one of them has got through
    code = code_of(reply)
    known = _CODES.get(code) if asked != "admin" else None
    known = _MEANT.get((asked, code), known)
    if known is not None:
        return known()
    if reply.status in (401, 403):
        return UpstreamAuthFailed(
            "Supabase Auth refused the gateway's credentials. The operator should check SUPABASE_ANON_KEY and "
            "SUPABASE_SERVICE_KEY.",
            code="identity_auth_failed",
            should_retry=False,
        )
    return UpstreamInvalid(
        "Supabase Auth answered something that this gateway does not know. The operator should check SUPABASE_URL.",
        code="identity_invalid_response",
        should_retry=False,
    )
