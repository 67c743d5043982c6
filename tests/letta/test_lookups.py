"""Questions by aiohttp: what goes out, and each way in which no answer comes."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from gateway.errors import AgentGone, GatewayError, UpstreamInvalid, UpstreamTimeout, UpstreamUnavailable
from gateway.letta import lookups
from gateway.letta.lookups import Lookups
from gateway.letta.upstream_errors import status_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUERY = (("include", "agent.tags"), ("name", "a b&c/\u00e9"))


class Letta:
    """A server that answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Handler = self._nothing
        self.asked: list[tuple[str, dict[str, str], list[tuple[str, str]]]] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.raw_path.partition("?")[0], dict(request.headers), list(request.query.items())))
        return await self.answer(request)

    async def _nothing(self, _: web.Request) -> web.StreamResponse:
        return web.json_response([])


@pytest.fixture
async def letta() -> Letta:
    return Letta()


@pytest.fixture
async def ask(letta: Letta) -> AsyncIterator[Lookups]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", letta.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    headers = {"Authorization": "Bearer k", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    async with aiohttp.ClientSession(url, headers=headers, auto_decompress=False) as session:
        yield Lookups(session)
    await runner.cleanup()


async def why_not(asking: Awaitable[bytes]) -> GatewayError:
    with pytest.raises(GatewayError) as raised:
        await asking
    return raised.value


async def test_what_goes_out(letta: Letta, ask: Lookups) -> None:
    assert await ask.agents(QUERY, 5) == b"[]"
    await ask.agent("agent-1/..", (), 5)
    (listing, headers, query), (one, _, _) = letta.asked
    assert (listing, one) == ("/v1/agents/", "/v1/agents/agent-1%2F..")
    assert query == list(QUERY)
    assert headers["Accept"] == "application/json"
    assert headers["Authorization"] == "Bearer k"
    assert headers["X-Stainless-Package-Version"], "by which Letta leaves out what is large"


@pytest.mark.parametrize(
    ("status", "kind", "retried"),
    [
        (404, AgentGone, None),
        (500, UpstreamInvalid, True),
        (503, UpstreamUnavailable, True),
        (302, UpstreamInvalid, False),
    ],
)
async def test_answer_that_is_none(
    letta: Letta,
    ask: Lookups,
    status: int,
    kind: type[GatewayError],
    retried: bool | None,  # noqa: FBT001
) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="secret", headers={"Location": "/elsewhere"})

    letta.answer = refuse
    error = await why_not(ask.agents((), 5))
    assert isinstance(error, kind)
    assert "secret" not in str(error)
    assert status_of(error) == status
    assert len(letta.asked) == 1, "nothing is followed, nothing is asked twice"
    if retried is not None:
        assert error.should_retry is retried


async def test_silence(letta: Letta, ask: Lookups) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError

    letta.answer = hang
    error = await why_not(ask.agents((), 0.2))
    assert (type(error), error.should_retry, status_of(error)) == (UpstreamTimeout, True, None)


async def test_answer_without_end(letta: Letta, ask: Lookups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "_LONGEST", 100_000)

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(10_000))

    letta.answer = flood
    assert isinstance(await why_not(ask.agents((), 5)), UpstreamInvalid)


async def test_answer_that_is_cut(letta: Letta, ask: Lookups) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"[")
        assert request.transport is not None
        request.transport.abort()
        return response

    letta.answer = cut
    error = await why_not(ask.agents((), 5))
    assert isinstance(error, (UpstreamInvalid, UpstreamUnavailable))
    assert status_of(error) is None


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/") as session:
        error = await why_not(Lookups(session).agents((), 5))
    assert (type(error), error.should_retry, status_of(error)) == (UpstreamUnavailable, True, None)
