"""Local identities for tests: passwords at the least cost, clocks of the test's own."""

from typing import Final

from gateway.accounts.brute_force import LoginGuard
from gateway.accounts.identity.local import LocalIdentity
from gateway.accounts.passwords import PasswordPolicy, Passwords
from gateway.accounts.secrets import Secrets
from gateway.storage.engine import Database

SECRET_KEY: Final = "a secret of the tests, and of nobody else"
CHEAP: Final = PasswordPolicy(memory_kib=8, passes=1)

EMAIL: Final = "ada@example.com"
PASSWORD: Final = "correct horse battery staple"
HOME: Final = "203.0.113.7"
"""An address from which a user logs in."""


class Clock:
    """A time that moves when it is told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def local_identity(
    database: Database, *, guard: LoginGuard | None = None, policy: PasswordPolicy = CHEAP, secret_key: str = SECRET_KEY
) -> LocalIdentity:
    """Return one; those of the same database and secret are replicas of each other."""
    return LocalIdentity(database, Secrets.from_key(secret_key), hashes=Passwords(policy), guard=guard or LoginGuard())
