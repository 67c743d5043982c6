"""What surrounds every request, whatever the chain: its notes, and the headers of its answer."""

import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from gateway import keys
from gateway.accounts.operator_key import OperatorKey
from gateway.handlers.forwarding import MISDIRECTED, Forwarder
from gateway.metrics import METHODS
from gateway.server import cors
from gateway.server.client_address import TrustedNetworks
from gateway.settings import is_loopback
from gateway.ui.recent_errors import RecentError, RecentErrors
from middleware.auth import credential, host_name
from middleware.contract import AiohttpMiddleware
from middleware.routes import route_of

ANYBODY: Final = keys.Caller("local")
"""Who asks where there are no API keys: whoever is on this machine."""


def first_middleware(
    trusted: TrustedNetworks, forwarder: Forwarder | None = None, errors: RecentErrors | None = None
) -> AiohttpMiddleware:
    """Return what stands before the chain: it makes the places in which the chain and handlers leave word.

    ``errors`` keeps those that were answered lately.
    """

    @web.middleware
    async def first(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.version > HttpVersion11:
            raise web.HTTPBadRequest  # aiohttp would answer HTTP/2.0 in the words of HTTP/1.1, by that name
        mark = forwarder.read(request) if forwarder is not None else None
        if mark is None:
            request[keys.NOTES] = keys.RequestNotes(client=trusted.client_of(request))
        elif forwarder is not None and mark.instance != forwarder.instance:
            return web.Response(status=MISDIRECTED)  # for a gateway that was here before
        else:
            request[keys.NOTES] = keys.RequestNotes(client=mark.client, is_forwarded=True)
        request[keys.CALLER] = ANYBODY
        request[keys.RESPONSE_HEADERS] = {}
        if request.app[keys.ACCESS](request) not in ("api", "user"):
            response = await handler(request)
        else:
            with request.app[keys.DRAIN].request():
                response = await handler(request)
        if errors is not None:
            _note_error(request, response, errors)
        return response

    return first


def _note_error(request: web.Request, response: web.StreamResponse, errors: RecentErrors) -> None:
    notes = request[keys.NOTES]
    if notes.error_code is not None:
        errors.add(
            RecentError(
                at=time.time(),
                code=notes.error_code,
                status=response.status,
                method=request.method if request.method in METHODS else "other",
                route=route_of(request),
                request_id=request.get(keys.REQUEST_ID),
                owner=notes.owner,
            )
        )


def operator_rule(held: OperatorKey, trusted: TrustedNetworks) -> Callable[[web.Request], Awaitable[bool]]:
    """Return the rule of who is the operator: who asks from a trusted network, or holds the key.

    It raises ``TooManyAttempts`` where a key is being guessed.
    """

    async def is_operator(request: web.Request) -> bool:
        client = request[keys.NOTES].client or ""
        if trusted.trusts(client) and not _is_rebound(request, client):
            return True
        given = credential(request)
        return given is not None and await held.is_held(given, client)

    return is_operator


def _is_rebound(request: web.Request, client: str) -> bool:
    """Tell whether a web page on this machine may be asking that gave its own name our address."""
    return is_loopback(client) and not is_loopback(host_name(f"//{request.headers.get('Host', '')}"))


def response_headers(
    origins: frozenset[str],
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Return the signal that completes every answer's headers, a stream's included."""

    async def complete(request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers.popall("Server", None)  # no banner: it names versions
        headers["X-Content-Type-Options"] = "nosniff"
        headers.setdefault("Cache-Control", "no-store")
        request_id = request.get(keys.REQUEST_ID)
        if request_id is not None:
            headers["X-Request-Id"] = request_id
        headers.update(request.get(keys.RESPONSE_HEADERS, {}))
        if request.app[keys.DRAIN].draining:
            response.force_close()
            headers["Connection"] = "close"
        if origins:
            cors.allow(request, response, origins)

    return complete
