"""The keys of accounts, each derived from one secret for its own purpose: HKDF with SHA-256 (RFC 5869).

The secret is ``SECRET_KEY``, which replicas share, or a file that is made at the first start.
"""

import base64
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final, Self

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

FILE: Final = "secret.key"
SHORTEST: Final = 32
"""Characters of a secret."""
CHECK: Final = 8
"""Characters of a check part: 48 bits, by which what was made up is told from what was given out."""


class SecretFailed(Exception):
    """The secret cannot be had; the message says why in one line, for the operator."""


def secrets_of(secret_key: str, home: Path, *, is_shared: bool) -> "Secrets":
    """Return the secrets of a gateway; raises ``SecretFailed``.

    ``is_shared`` tells that other gateways use the same database: what one gives out the others must accept.
    """
    if secret_key:
        return Secrets.from_key(secret_key)
    if is_shared:
        raise SecretFailed(
            "SECRET_KEY is needed with LETTA_GATEWAY_DATABASE_URL, as gateways on one database share their keys: set "
            f"it to {SHORTEST} random characters or more, the same for all of them."
        )
    return Secrets.load_or_make(home)


class Secrets:
    """What is derived from the secret: nothing else of it is kept."""

    def __init__(self, secret: bytes) -> None:
        self.signing_key: Final = Ed25519PrivateKey.from_private_bytes(_derived(secret, "access tokens"))
        self.forwarding_key: Final = _derived(secret, "forwarded requests")
        self.operator_key: Final = _derived(secret, "operator sessions")
        self._check_key: Final = _derived(secret, "check parts")
        self._fernet: Final = Fernet(base64.urlsafe_b64encode(_derived(secret, "stored secrets")))

    @classmethod
    def from_key(cls, secret_key: str) -> Self:
        """Derive from ``SECRET_KEY``; raises ``SecretFailed`` for one that is too short."""
        if len(secret_key) < SHORTEST:
            raise SecretFailed(f"SECRET_KEY is wrong: give it {SHORTEST} characters at least, made at random.")
        return cls(secret_key.encode("utf-8", "surrogateescape"))

    @classmethod
    def load_or_make(cls, home: Path) -> Self:
        """Derive from the file in the gateway's folder, which is made where it is missing; raises ``SecretFailed``."""
        path = home.expanduser() / FILE
        try:
            if not path.exists():
                _make(path)
            return cls(_read(path).encode())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SecretFailed(f"{path} cannot be used ({reason}): change its owner, or set SECRET_KEY.") from None

    def encrypt(self, text: str) -> str:
        """Encrypt a secret that is to be stored."""
        return self._fernet.encrypt(text.encode()).decode()

    def decrypt(self, stored: str) -> str | None:
        """Return a stored secret; None where it was encrypted under another ``SECRET_KEY``, or damaged."""
        try:
            return self._fernet.decrypt(stored.encode()).decode()
        except InvalidToken:
            return None

    def with_check(self, text: str) -> str:
        """Return the text with its check part behind it."""
        return text + self._check_of(text)

    def is_ours(self, checked: str) -> bool:
        """Tell whether a text ends with its own check part: it was given out here, or by a replica."""
        text, check = checked[:-CHECK], checked[-CHECK:]
        return hmac.compare_digest(self._check_of(text).encode(), check.encode("utf-8", "surrogatepass"))

    def _check_of(self, text: str) -> str:
        digest = hmac.digest(self._check_key, text.encode("utf-8", "surrogatepass"), hashlib.sha256)
        return base64.urlsafe_b64encode(digest)[:CHECK].decode()


def _derived(secret: bytes, purpose: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"letta-gateway: {purpose}".encode()).derive(secret)


def _make(path: Path) -> None:
    """Make the file, whole or not at all; who comes second takes the one that is there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            return
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Write down that the folder has the new name: a secret that is lost takes everything encrypted with it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> str:
    # The group may read it: Kubernetes gives a volume's files to the pod's group (fsGroup).
    if path.stat().st_mode & stat.S_IRWXO:
        raise SecretFailed(f"{path} can be read or changed by everybody: take it to be known, or 'chmod o= {path}'.")
    secret = path.read_text("utf-8").strip()
    if len(secret) < SHORTEST:
        raise SecretFailed(f"{path} is too short: restore it, or remove it to have a new one made.")
    return secret
