"""``GET /api/v1/openapi.json``: the whole API, described."""

from functools import cache
from importlib.resources import files

from aiohttp import web


async def document(request: web.Request) -> web.Response:
    """Answer the description of this API (OpenAPI 3.1)."""
    _ = request
    return web.Response(
        body=described(), content_type="application/json", headers={"Cache-Control": "public, max-age=300"}
    )


@cache
def described() -> bytes:
    """Return the description that this version of the gateway brings."""
    return files("gateway").joinpath("openapi.json").read_bytes()
