"""Lets in who may: API keys for the API, access tokens for the platform, the operator for operations.

Personal keys of users are told from the operator's own by their beginning. With no key configured the gateway listens
on loopback only, and a web page open on the same machine must not drive the agent: foreign ``Host`` headers (DNS
rebinding) and foreign ``Origin`` headers are refused.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from aiohttp import web

from gateway import keys
from gateway.errors import AuthenticationFailed, Forbidden
from gateway.settings import Settings, is_loopback, key_owner
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config
    doors: dict[keys.Access, Door] = {
        "api": api_door(settings.api_keys),
        "user": user_door,
        "operator": operator_door,
        "admin": admin_door,
        "page": page_door,
    }
    origins = frozenset(settings.cors_origins)

    @web.middleware
    async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
        access = request.app[keys.ACCESS](request)
        caller = await doors[access](request) if access in doors else None
        if caller is not None:
            request[keys.CALLER] = caller
            request[keys.NOTES].owner = caller.owner
        elif not settings.api_keys:
            _refuse_foreign(request, origins)
            _refuse_forwarded(request)
        return await handler(request)

    return auth


Door: TypeAlias = Callable[[web.Request], Awaitable[keys.Caller | None]]
"""Returns whose credential a request carries, or None where it needs none; raises a 401 or 403 of the tree."""


def api_door(api_keys: tuple[str, ...]) -> Door:
    """Return the door of the OpenAI surface: the operator's keys, and users' own; without keys everybody here."""
    known = KeyRing(api_keys)

    async def door(request: web.Request) -> keys.Caller | None:
        given = credential(request)
        if given is not None and given.startswith(keys.PERSONAL_KEY):
            caller = await request.app[keys.CREDENTIALS].caller_of_key(given)
            if caller is None:
                raise AuthenticationFailed
            return caller
        return keys.Caller(known.owner(given)) if api_keys else None

    return door


async def user_door(request: web.Request) -> keys.Caller | None:
    """Let users in by their access tokens."""
    given = credential(request)
    if given is None:
        raise AuthenticationFailed(
            "You didn't provide an access token. POST /api/v1/auth/login gives one: send it as 'Authorization: Bearer "
            "<token>'."
        )
    caller = await request.app[keys.CREDENTIALS].caller_of_token(given)
    request[keys.ACCESS_TOKEN] = given
    return caller


async def operator_door(request: web.Request) -> keys.Caller | None:
    """Let the operator in, and trusted networks."""
    if not await request.app[keys.IS_OPERATOR](request):
        raise Forbidden("This is for the operator: send the operator key, or ask from a trusted network.")
    return None


async def admin_door(request: web.Request) -> keys.Caller | None:
    """Let in who holds the operator key, from wherever it comes."""
    held, given = request.app[keys.OPERATOR_KEY], credential(request)
    if not held.is_set:
        raise Forbidden("Administration is closed: set LETTA_GATEWAY_OPERATOR_KEY, then send that key.")
    if given is None:
        raise AuthenticationFailed("This is for the operator: send the operator key as 'Authorization: Bearer <key>'.")
    if not await held.is_held(given, request[keys.NOTES].client or ""):
        raise Forbidden("This is for the operator: send the operator key.")
    return OPERATOR


async def page_door(request: web.Request) -> keys.Caller | None:
    """Let the operator's page in by its session; what changes anything carries the session's CSRF token too."""
    sessions = request.app[keys.OPERATOR_SESSIONS]
    session = sessions.find(request.cookies.get(keys.OPERATOR_COOKIE))
    if session is None:
        raise AuthenticationFailed("You are not signed in. Sign in at /ui with the operator key.")
    if request.method not in _SAFE and not sessions.is_token_of(session, request.headers.get("X-CSRF-Token", "")):
        raise Forbidden("This did not come from the operator's page. Open /ui, and try again there.")
    request[keys.OPERATOR_SESSION] = session
    return OPERATOR


_SAFE: Final = frozenset({"GET", "HEAD"})
OPERATOR: Final = keys.Caller("operator")


class KeyRing:
    """The API keys, compared in constant time."""

    def __init__(self, api_keys: tuple[str, ...]) -> None:
        self._keys = [(key.encode(), key_owner(key)) for key in api_keys]

    def owner(self, given: str | None) -> str:
        """Return who holds this key; raises ``AuthenticationFailed``."""
        if given is None:
            raise AuthenticationFailed(
                "You didn't provide an API key. Send one as 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'."
            )
        offered = given.encode("utf-8", "surrogateescape")
        found = None
        for key, owner in self._keys:
            if hmac.compare_digest(key, offered):
                found = owner
        if found is None:
            raise AuthenticationFailed
        return found


def credential(request: web.Request) -> str | None:
    """Return the key that a request carries, by either header."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("X-Api-Key") or None


def _refuse_foreign(request: web.Request, origins: frozenset[str]) -> None:
    if not is_loopback(host_name(f"//{request.headers.get('Host', '')}")):
        raise Forbidden(
            "Without API keys the gateway answers to this machine's own name only. Call it as localhost, or set "
            "LETTA_GATEWAY_API_KEYS."
        )
    origin = request.headers.get("Origin")
    if origin is not None and origin not in origins and not is_loopback(host_name(origin)):
        raise Forbidden(
            "Without API keys the gateway answers no web page. Set LETTA_GATEWAY_API_KEYS, or name the page's origin "
            "in LETTA_GATEWAY_CORS_ORIGINS."
        )


def _refuse_forwarded(request: web.Request) -> None:
    """Refuse what a proxy on this machine hands on for somebody else, whatever Host it puts there."""
    if not is_loopback(request[keys.NOTES].client or ""):
        raise Forbidden(
            "Without API keys the gateway serves this machine alone, not through a proxy. Set LETTA_GATEWAY_API_KEYS."
        )


def host_name(url: str) -> str:
    """Return the host of a URL, or of a Host header behind ``//``; empty where it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


middleware = Middleware("auth", NoConfig, build)
