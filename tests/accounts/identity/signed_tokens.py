"""Access tokens as Supabase Auth signs them, for tests: with keys that are made for the session."""

import time
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

USER: Final = "7c2f7c5e-5c0f-4f0e-9d5e-0d7c4d4f5a11"
SESSION: Final = "0b7c0c2e-7a57-4ad5-8d0b-3f1f5a2f9e22"
SECRET: Final = "super-secret-jwt-token-with-at-least-32-characters"

P256: Final = ec.generate_private_key(ec.SECP256R1())
RSA: Final = rsa.generate_private_key(65_537, 2_048)
ED25519: Final = ed25519.Ed25519PrivateKey.generate()


def claims(**changed: Any) -> dict[str, Any]:
    """Return what a token says; None takes a claim out."""
    now = int(time.time())
    said = {
        "sub": USER,
        "aud": "authenticated",
        "iss": "https://project.supabase.co/auth/v1",
        "iat": now,
        "exp": now + 3_600,
        "email": "ann@example.com",
        "phone": "",
        "app_metadata": {"provider": "email", "providers": ["email"]},
        "user_metadata": {},
        "role": "authenticated",
        "aal": "aal1",
        "amr": [{"method": "password", "timestamp": now}],
        "session_id": SESSION,
        "is_anonymous": False,
    }
    return {name: value for name, value in {**said, **changed}.items() if value is not None}


def by_secret(secret: str = SECRET, **changed: Any) -> str:
    """Return a token of a project with a shared secret."""
    return jwt.encode(claims(**changed), secret, "HS256")


def by_key(key: Any = P256, algorithm: str = "ES256", key_id: str | None = "p256", **changed: Any) -> str:
    """Return a token of a project with keys."""
    return jwt.encode(claims(**changed), key, algorithm, headers={} if key_id is None else {"kid": key_id})


def published(key: Any = P256, algorithm: str = "ES256", key_id: str | None = "p256") -> dict[str, Any]:
    """Return a key as a project shows it."""
    kind: type[Any] = {"ES256": jwt.algorithms.ECAlgorithm, "RS256": jwt.algorithms.RSAAlgorithm}.get(
        algorithm, jwt.algorithms.OKPAlgorithm
    )
    shown: dict[str, Any] = kind.to_jwk(key.public_key(), as_dict=True)
    return {**shown, "use": "sig", "key_ops": ["verify"], "alg": algorithm, **({"kid": key_id} if key_id else {})}
