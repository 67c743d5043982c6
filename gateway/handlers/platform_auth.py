"""``/api/v1/auth``: users register, log in and out; ``/.well-known/jwks.json``: how others check their tokens."""

import time
from typing import Final

import msgspec
from aiohttp import web

from gateway import keys
from gateway.accounts.answers import ConfirmationAnswer, session_answer
from gateway.accounts.errors import AccountBlocked, InvalidToken
from gateway.accounts.identity.protocol import Tokens, Verified
from gateway.accounts.profiles import Profile
from gateway.handlers.json_answers import json_answer
from gateway.handlers.platform_agent import profile_of, user_of
from gateway.translation.field_errors import decoded

JWKS_AGE: Final = 600
"""Seconds that others may keep the keys."""


class NewAccount(msgspec.Struct, frozen=True):
    """Who wants to register; a password has 8 to 1,024 characters."""

    email: str
    password: str
    name: str | None = None


class Login(msgspec.Struct, frozen=True):
    """Who logs in."""

    email: str
    password: str


class Refresh(msgspec.Struct, frozen=True):
    """By what a session goes on; a used refresh token holds for ten more seconds, then its use ends the session."""

    refresh_token: str


class Logout(msgspec.Struct, frozen=True):
    """Whether all sessions of the user end, or this one alone."""

    everywhere: bool = False


class PasswordChange(msgspec.Struct, frozen=True):
    """The password that is, and the one that is to be."""

    current_password: str
    new_password: str


_NEW_ACCOUNTS: Final = msgspec.json.Decoder(NewAccount)
_LOGINS: Final = msgspec.json.Decoder(Login)
_REFRESHES: Final = msgspec.json.Decoder(Refresh)
_LOGOUTS: Final = msgspec.json.Decoder(Logout)
_PASSWORD_CHANGES: Final = msgspec.json.Decoder(PasswordChange)


async def register(request: web.Request) -> web.Response:
    """Make an account and begin its first session; the same e-mail and password once more is a login."""
    asked = decoded(_NEW_ACCOUNTS, await request[keys.BODY].read())
    registration = request.app[keys.REGISTRATION]
    profile, tokens = await registration.register(asked.email, asked.password, asked.name, _client_of(request))
    if profile is None or tokens is None:
        message = "Open the link in the e-mail that was sent to you, then log in."
        return json_answer(ConfirmationAnswer(message), status=202)
    return await _session(request, profile, tokens, status=201)


async def login(request: web.Request) -> web.Response:
    """Begin a session."""
    asked = decoded(_LOGINS, await request[keys.BODY].read())
    profile, tokens = await request.app[keys.REGISTRATION].login(asked.email, asked.password, _client_of(request))
    return await _session(request, profile, tokens)


async def refresh(request: web.Request) -> web.Response:
    """Go on with a session: the tokens of before are used up."""
    asked = decoded(_REFRESHES, await request[keys.BODY].read())
    tokens = await request.app[keys.IDENTITY].refresh(asked.refresh_token, _client_of(request))
    verified = Verified(tokens.user_id, None, tokens.email, issued_at=time.time())
    profile = await request.app[keys.REGISTRATION].complete(verified)
    return await _session(request, profile, tokens)


async def logout(request: web.Request) -> web.Response:
    """End this session, or all of the user's."""
    body = await request[keys.BODY].read() if request.body_exists else b"{}"
    asked = decoded(_LOGOUTS, body)
    token, verified = _verified(request)
    await request.app[keys.IDENTITY].logout(token, verified, everywhere=asked.everywhere)
    return web.Response(status=204)


async def change_password(request: web.Request) -> web.Response:
    """Change the password; all sessions end, and a new one begins."""
    asked = decoded(_PASSWORD_CHANGES, await request[keys.BODY].read())
    token, verified = _verified(request)
    profile = await profile_of(request)
    identity = request.app[keys.IDENTITY]
    tokens = await identity.change_password(token, verified, asked.current_password, asked.new_password)
    return await _session(request, profile, tokens)


async def me(request: web.Request) -> web.Response:
    """Answer who the access token is for."""
    return json_answer(await user_of(request, await profile_of(request)))


async def jwks(request: web.Request) -> web.Response:
    """Answer the public keys of access tokens, as a JWK set (RFC 7517)."""
    headers = {"Cache-Control": f"public, max-age={JWKS_AGE}"}
    return web.Response(body=request.app[keys.IDENTITY].jwks(), content_type="application/json", headers=headers)


def _client_of(request: web.Request) -> str:
    return request[keys.NOTES].client or ""


def _verified(request: web.Request) -> tuple[str, Verified]:
    """Return the access token that a user came in by, and for whom it speaks."""
    caller = request[keys.CALLER]
    if caller.user_id is None:
        raise InvalidToken
    return request[keys.ACCESS_TOKEN], Verified(caller.user_id, caller.session_id, None)


async def _session(request: web.Request, profile: Profile, tokens: Tokens, *, status: int = 200) -> web.Response:
    """Answer a session; raises ``AccountBlocked`` where the identity service does not know that the user is blocked."""
    if profile.is_blocked:
        raise AccountBlocked
    request[keys.NOTES].owner = profile.id
    return json_answer(session_answer(await user_of(request, profile), tokens), status=status)
