"""What only accounts refuse, as leaves of the tree in ``gateway.errors``.

::

    ClientError
    ├── WeakPassword               400
    │   └── PasswordRefused            400   by the identity service's own rules
    ├── SamePassword               400
    ├── InvalidCredentials         401
    ├── InvalidToken               401   no access token, or one that does not hold (any more)
    ├── InvalidRefreshToken        401
    ├── AccountBlocked             403
    ├── EmailNotConfirmed          403
    ├── RegistrationClosed         403
    ├── AgentMissing               404
    ├── UserKeyNotFound            404
    ├── UserNotFound               404
    ├── MessageNotFound            404
    ├── AccountExists              409
    ├── PasswordElsewhere          409
    └── TooManyAttempts            429   passwords are being guessed
    GatewayError
    ├── PasswordsBusy              503   more passwords to check than the gateway can
    ├── ProvidersUnsupported       502
    └── DeletionUnfinished         503   what a deleted user leaves is not all gone yet

A refused credential gets the same answer whatever was wrong with it: who is registered here is nobody's to find out.
"""

from gateway.errors import AuthenticationFailed, ClientError, GatewayError


class WeakPassword(ClientError):
    """The password is too short, too long, the address itself, or one that everybody tries."""

    default_code = "weak_password"
    default_message = (
        "This password is too easy to guess. Send one of 8 to 1024 characters that is not the e-mail, not a common one "
        "and not one character alone."
    )

    def __init__(self, *, param: str = "password") -> None:
        super().__init__(param=param)


class SamePassword(ClientError):
    """The new password is the old one."""

    default_code = "same_password"
    default_message = "The new password is the old one. Send another one."

    def __init__(self) -> None:
        super().__init__(param="new_password")


class InvalidCredentials(AuthenticationFailed):
    """The address is not known, or the password is not its own: the same answer for both."""

    default_code = "invalid_credentials"
    default_message = "E-mail or password is wrong. Check both, then try again."


class InvalidToken(AuthenticationFailed):
    """The access token is none of ours, or expired, or its session has ended."""

    default_code = "invalid_token"
    default_message = (
        "The access token is not valid, or not any more. POST /api/v1/auth/refresh or /api/v1/auth/login gives a new "
        "one: send it as 'Authorization: Bearer <token>'."
    )


class InvalidRefreshToken(AuthenticationFailed):
    """The refresh token is unknown, used, or of a session that has ended."""

    default_code = "invalid_refresh_token"
    default_message = "The refresh token is not valid any more. Send e-mail and password to POST /api/v1/auth/login."


class AccountBlocked(ClientError):
    """The operator has blocked the account."""

    status = 403
    type = "permission_error"
    default_code = "account_blocked"
    default_message = "This account is blocked. Ask the operator to unblock it."


class RegistrationClosed(ClientError):
    """Users are made by the operator alone."""

    status = 403
    type = "permission_error"
    default_code = "registration_closed"
    default_message = "Registration is closed here. Ask the operator for an account."


class AccountExists(ClientError):
    """The address cannot be registered: it has an account."""

    status = 409
    type = "conflict_error"
    default_code = "account_exists"
    default_message = "This e-mail cannot be registered. If it is yours, send it to POST /api/v1/auth/login."

    def __init__(self) -> None:
        super().__init__(param="email")


class PasswordElsewhere(ClientError):
    """The identity service keeps the passwords, and lets this gateway set none."""

    status = 409
    type = "conflict_error"
    default_code = "password_elsewhere"
    default_message = (
        "The identity service keeps the users' passwords: change it there. For the gateway to do that the operator "
        "should set SUPABASE_SERVICE_KEY."
    )


class TooManyAttempts(ClientError):
    """Too many wrong passwords, for this account, from this address or altogether."""

    status = 429
    type = "rate_limit_error"
    default_code = "too_many_attempts"
    default_message = "Too many attempts. Wait as long as Retry-After says, then try again."

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after=retry_after)


class PasswordsBusy(GatewayError):
    """More passwords wait to be checked than can be in reasonable time."""

    status = 503
    default_code = "passwords_busy"
    default_message = "Too many people are logging in at once. Try again in a moment."

    def __init__(self) -> None:
        super().__init__(retry_after=2.0, should_retry=True)


class AgentMissing(ClientError):
    """The user's agent is not on Letta any more."""

    status = 404
    default_code = "agent_missing"
    default_message = "Your agent is not there any more. POST /api/v1/agent/reset gives you a fresh one."

    def __init__(self) -> None:
        super().__init__(should_retry=False)


class UserKeyNotFound(ClientError):
    """No key of that id: the same answer for "does not exist" and "is not yours"."""

    status = 404
    default_code = "key_not_found"
    default_message = "No key of yours has this id. GET /api/v1/user/keys lists them."


class UserNotFound(ClientError):
    """No user of that id: the operator's own answer."""

    status = 404
    default_code = "user_not_found"
    default_message = "No user has this id. GET /api/v1/admin/users lists them."


class ProvidersUnsupported(GatewayError):
    """Users are billed by LiteLLM, and this Letta server's agents cannot have a provider of their own."""

    status = 502
    default_code = "billing_unsupported"
    default_message = (
        "Users' agents cannot be made: this Letta server cannot bill by LiteLLM. The operator should set "
        "LETTA_GATEWAY_BILLING to local, or LETTA_BASE_URL to a V1 server."
    )

    def __init__(self) -> None:
        super().__init__(should_retry=False)


class DeletionUnfinished(GatewayError):
    """The account is closed, and not all of it is deleted yet."""

    status = 503
    default_code = "deletion_unfinished"
    default_message = (
        "The account is closed, and the rest of it is deleted as soon as all servers that keep some of it answer. "
        "There is nothing more to do."
    )

    def __init__(self) -> None:
        super().__init__(retry_after=60.0, should_retry=False)


class PasswordRefused(WeakPassword):
    """The identity service finds the password too weak, by rules of its own."""

    default_message = (
        "This password is too easy to guess: too short, of too few kinds of characters, or known from a leak. Send "
        "another one."
    )


class EmailNotConfirmed(ClientError):
    """The address was registered and not confirmed yet."""

    status = 403
    type = "permission_error"
    default_code = "email_not_confirmed"
    default_message = "This e-mail is not confirmed yet. Open the link that was sent to it, then log in."


class MessageNotFound(ClientError):
    """No message of that id: the same answer for "does not exist" and "is not yours"."""

    status = 404
    default_code = "message_not_found"
    default_message = "No message of this id is in your history. Ask again without a cursor to begin with the newest."

    def __init__(self) -> None:
        super().__init__(param="cursor")
