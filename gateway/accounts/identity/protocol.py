"""What the gateway asks of whoever knows the users' passwords: itself, or Supabase Auth."""

from typing import Protocol

import msgspec


class Tokens(msgspec.Struct, frozen=True):
    """A session as its client holds it; ``expires_in`` is the access token's, in seconds."""

    access_token: str
    refresh_token: str
    expires_in: int
    user_id: str
    email: str
    """Empty where whoever keeps the users does not tell it."""

    def __repr__(self) -> str:
        """Show whose they are, and not the tokens: this may get into a traceback."""
        return f"Tokens(user_id={self.user_id!r})"


class NewUser(msgspec.Struct, frozen=True):
    """A user who has no session yet: the address is to be confirmed first; None where not even the id is told."""

    user_id: str | None
    email: str


class Verified(msgspec.Struct, frozen=True):
    """Whom an access token speaks for."""

    user_id: str
    session_id: str | None
    email: str | None
    issued_at: float = 0.0
    """When whoever keeps the users said this, in UTC seconds."""


class IdentityProvider(Protocol):
    """Whoever knows passwords and sessions; ``address`` is the client's, by which guessing is slowed down.

    E-mails come as ``profiles.canonical`` returns them. Every method may raise ``StorageUnavailable``, or
    ``UpstreamUnavailable`` where the sessions are kept elsewhere: never a 401 for what could not be asked.
    """

    async def register(self, email: str, password: str, address: str | None) -> Tokens | NewUser:
        """Make a user, or log in the one who has this e-mail and password.

        ``address`` is None where the operator makes the user: they are held up by nothing. Raises ``WeakPassword``,
        ``AccountExists``, ``TooManyAttempts`` and ``PasswordsBusy``.
        """
        ...

    async def login(self, email: str, password: str, address: str) -> Tokens:
        """Begin a session.

        Raises ``InvalidCredentials``, ``AccountBlocked``, ``TooManyAttempts`` and ``PasswordsBusy``.
        """
        ...

    async def refresh(self, refresh_token: str, address: str) -> Tokens:
        """Change a refresh token for a new pair; raises ``InvalidRefreshToken`` and ``AccountBlocked``."""
        ...

    async def logout(self, token: str, verified: Verified, *, everywhere: bool) -> None:
        """End the session of this access token, or all of its user's."""
        ...

    async def verify(self, access_token: str) -> Verified:
        """Return whose access token this is; raises ``InvalidToken``."""
        ...

    async def change_password(self, token: str, verified: Verified, current: str, new: str) -> Tokens:
        """Change the password, end all sessions and begin a new one.

        Raises ``InvalidCredentials`` for a wrong ``current`` one, ``WeakPassword``, ``TooManyAttempts`` and
        ``PasswordsBusy``.
        """
        ...

    async def set_password(self, user_id: str, new: str) -> bool:
        """Give a user a password by the operator's will, and end their sessions; False where there is no such user.

        Raises ``WeakPassword``, ``PasswordElsewhere`` and ``PasswordsBusy``.
        """
        ...

    async def delete(self, user_id: str) -> None:
        """Forget the user's password and sessions; that there is none is no error."""
        ...

    async def set_blocked(self, user_id: str, *, is_blocked: bool) -> None:
        """End the user's sessions and refuse new ones, or allow them again."""
        ...

    def jwks(self) -> bytes:
        """Return the keys by which others can check access tokens, as a JWK set (RFC 7517); elsewhere's: none."""
        ...

    async def close(self) -> None:
        """Let what is under way end."""
        ...
