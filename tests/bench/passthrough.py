"""The denominator of every ratio: aiohttp's own byte pass-through, as short as it can be written.

It knows no JSON, checks no key and keeps no count: what a proxy of aiohttp parts costs before it does anything.
"""

import argparse
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

UPSTREAM = web.AppKey("UPSTREAM", str)
SESSION = web.AppKey("SESSION", ClientSession)


async def relay(request: web.Request) -> web.StreamResponse:
    """Hand the request on, and the answer back as its bytes come."""
    url = request.app[UPSTREAM] + request.path_qs
    headers = {"Content-Type": request.content_type}
    body = await request.read()
    async with request.app[SESSION].request(request.method, url, data=body, headers=headers) as upstream:
        response = web.StreamResponse(status=upstream.status, headers={"Content-Type": upstream.content_type})
        await response.prepare(request)
        async for data in upstream.content.iter_any():
            await response.write(data)
        await response.write_eof()
    return response


async def health(request: web.Request) -> web.Response:
    """Say that the process is up."""
    return web.Response()


async def session(app: web.Application) -> AsyncIterator[None]:
    """Hold one client session with neither a limit of connections nor a deadline."""
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as app[SESSION]:
        yield


def main() -> None:
    """Serve until the end of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    options = parser.parse_args()
    app = web.Application()
    app[UPSTREAM] = options.upstream
    app.cleanup_ctx.append(session)
    app.router.add_get("/health", health)
    app.router.add_route("*", "/{path:.*}", relay)
    loop = uvloop.new_event_loop()
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None, backlog=4096, loop=loop)


if __name__ == "__main__":
    main()
