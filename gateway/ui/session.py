"""``/ui/api/sign-in`` and ``/ui/api/session``: the operator comes in by the operator key, and goes."""

import time
from typing import Final

import msgspec
from aiohttp import web

from gateway import keys
from gateway.accounts.operator_sessions import COOKIE, LIFETIME, OperatorSession
from gateway.errors import Forbidden
from gateway.handlers.json_answers import json_answer
from gateway.translation.field_errors import decoded

PATH: Final = "/ui"
"""Where the cookie is sent: nothing else of the gateway knows it."""


class SignIn(msgspec.Struct, frozen=True):
    """Who wants to come in."""

    key: str


class SessionAnswer(msgspec.Struct, frozen=True):
    """A session, to its page; ``csrf_token`` goes with everything that changes anything, as ``X-CSRF-Token``."""

    csrf_token: str
    expires_in: int


_SIGN_INS: Final = msgspec.json.Decoder(SignIn)


async def sign_in(request: web.Request) -> web.Response:
    """Begin a session."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("This did not come from the operator's page. Open /ui, and sign in there.")
    asked = decoded(_SIGN_INS, await request[keys.BODY].read())
    sessions = request.app[keys.OPERATOR_SESSIONS]
    session, cookie = await sessions.begin(asked.key, request[keys.NOTES].client or "")
    response = _answer(session)
    response.set_cookie(
        COOKIE, cookie, max_age=int(LIFETIME), path=PATH, httponly=True, samesite="Strict", secure=_is_by_tls(request)
    )
    return response


async def session(request: web.Request) -> web.Response:
    """Answer the session that the page has."""
    return _answer(request[keys.OPERATOR_SESSION])


async def sign_out(request: web.Request) -> web.Response:
    """End the session, on all gateways."""
    await request.app[keys.OPERATOR_SESSIONS].end(request[keys.OPERATOR_SESSION], request[keys.NOTES].client or "")
    response = web.Response(status=204)
    response.del_cookie(COOKIE, path=PATH, httponly=True, samesite="Strict", secure=_is_by_tls(request))
    return response


def _answer(session: OperatorSession) -> web.Response:
    return json_answer(SessionAnswer(session.csrf_token, max(0, int(session.expires_at - time.time()))))


def _is_by_tls(request: web.Request) -> bool:
    """Tell whether the browser came by TLS; who claims it falsely hides their own cookie from themselves."""
    return request.secure or request.headers.get("X-Forwarded-Proto", "").strip().lower() == "https"
