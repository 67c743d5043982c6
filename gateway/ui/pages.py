"""The page's static files: read once, and served with a policy that lets nothing foreign in."""

from functools import cache
from importlib.resources import files
from typing import Final

import msgspec
from aiohttp import web

from gateway import keys
from gateway.errors import RouteNotFound

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_NO_KEY: Final = "no_key.html"


class _File(msgspec.Struct, frozen=True):
    body: bytes
    content_type: str


async def page(request: web.Request) -> web.Response:
    """Answer the page; where there is no operator key, one that says how to set it."""
    if request.app[keys.OPERATOR_SESSIONS].has_key:
        return _answer("index.html")
    return _answer(_NO_KEY, status=404)


async def file(request: web.Request) -> web.Response:
    """Answer one of the files that the page is made of."""
    name = request.match_info["file"]
    if name.endswith(".html") or name not in static_files():
        raise RouteNotFound
    return _answer(name)


@cache
def static_files() -> dict[str, _File]:
    """Return the files by their names."""
    folder = files("gateway.ui") / "static"
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name: _File(file.read_bytes(), _TYPES[_suffix(file.name)]) for file in found}


def _suffix(name: str) -> str:
    return name[name.rindex(".") :]


def _answer(name: str, *, status: int = 200) -> web.Response:
    found = static_files()[name]
    return web.Response(
        body=found.body, status=status, content_type=found.content_type, charset="utf-8", headers=HEADERS
    )
