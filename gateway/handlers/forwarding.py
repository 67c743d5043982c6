"""A request whose turn is in another gateway's hands -> that gateway, and its answer -> the client.

A turn that waits for the client's tools (App Server), and an answer that is repeated or cancelled, are where they
began; a balancer sends their next request anywhere. What is handed on carries a signed mark: who asks by address, and
for which process it is meant, so that it is counted once, goes no further, and is not taken for another's.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from functools import wraps
from typing import Final, Literal, Protocol, TypeAlias

import aiohttp
import msgspec
import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from gateway import keys, sockets
from gateway.errors import GatewayError, HeldElsewhere, OutcomeUnknown, ShuttingDown, ThreadLost
from gateway.handlers.sse import HIGH_WATER
from gateway.shared_state.places import Place, Places

HEADER: Final = "X-Letta-Gateway-Forwarded"
VALID: Final = 60.0
"""Seconds for which a mark stands."""
CONNECT: Final = 1.0
"""Seconds to reach another gateway: it is near."""
TRIES: Final = 3
MISDIRECTED: Final = 421
READY: Final = "/ready"
ITSELF: Final = "127.0.0.1"
"""Who asks where it is no client: gateways without API keys answer their own machine alone."""
EVENTS: Final = "text/event-stream"

RedisThere: TypeAlias = Literal["answers", "silent", "gone", "unknown"]
"""What is known of another gateway's Redis; ``gone`` is the gateway itself."""
_REDIS_THERE: Final[Mapping[int, RedisThere]] = {200: "answers", 503: "silent", MISDIRECTED: "gone"}

_HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_NOT_SENT: Final = _HOP_BY_HOP | {"host", "content-length", "expect", "x-request-id", HEADER.lower()}
_NOT_ANSWERED: Final = _HOP_BY_HOP | {"content-length", "x-request-id", "date", "server"}

_log: Final = structlog.get_logger("gateway.forwarding")


class Mark(msgspec.Struct, frozen=True):
    """What the gateway that took a request tells the one that answers it: the client, and for which process it is."""

    client: str
    instance: str


class Alive(Protocol):
    """Knows which gateways there are, and what time it is for all of them."""

    def now(self) -> float:
        """Return the time in UTC seconds, the same for all."""
        ...

    async def is_there(self, place: str) -> bool:
        """Tell whether a gateway gave a sign of life lately; raises ``SharedStateUnavailable``."""
        ...


class Forwarder:
    """Hands requests on, from the gateway at ``here``; ``answer`` is the seconds that an answer may be silent."""

    def __init__(self, here: str, key: bytes, places: Places, alive: Alive, *, answer: float) -> None:
        self.instance: Final = Place(here).instance
        self._key = key
        self._places = places
        self._alive = alive
        self._timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT, sock_read=answer)
        self._session: aiohttp.ClientSession | None = None
        self._under_way: set[asyncio.Timeout] = set()

    def end(self) -> None:
        """End what is being handed on: this gateway is going away."""
        for limit in self._under_way:
            limit.reschedule(0.0)

    @asynccontextmanager
    async def until_end(self) -> AsyncIterator[None]:
        """Run the block until ``end``; raises ``ShuttingDown`` then."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._under_way.add(limit)
                try:
                    yield
                finally:
                    self._under_way.discard(limit)
        except TimeoutError:
            if limit.expired():
                raise ShuttingDown from None
            raise

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def read(self, request: web.BaseRequest) -> Mark | None:
        """Return the mark of a request that another gateway handed on; None where it came from a client."""
        parts = request.headers.get(HEADER, "").split(" ")
        if len(parts) != len(("sent at", "client", "instance", "signature")):
            return None
        sent_at, client, instance, signature = parts
        wanted = self._sign(request.method, request.raw_path, sent_at, client, instance)
        if not hmac.compare_digest(signature.encode("utf-8", "surrogateescape"), wanted.encode()):
            return None
        age = self._alive.now() - float(sent_at)
        if abs(age) > VALID:
            _log.warning("mark of another gateway out of date: its request is taken for a client's", seconds=int(age))
            return None
        return Mark(client.strip("-"), instance)

    async def forward(self, request: web.Request, error: HeldElsewhere) -> web.StreamResponse | None:
        """Answer with what the other gateway answers; None where that is no more, and the request was not heard."""
        place = Place(error.place)
        if not await self._alive.is_there(error.place):
            await self._places.forget(error.name, error.place)
            return None
        url = URL(f"{place.address}{request.raw_path}", encoded=True)
        body = await request[keys.BODY].read() if request.body_exists else b""
        try:
            async with self.until_end():
                answer = await self._client().request(
                    request.method, url, data=body, headers=self._headers(request, place), allow_redirects=False
                )
            async with answer:
                if answer.status == MISDIRECTED:
                    await self._places.forget(error.name, error.place)
                    return None
                request.app[keys.METRICS].forwarded.inc()
                return await self._relay(request, answer)
        except aiohttp.ClientConnectorError:
            await self._places.forget(error.name, error.place)
            return None
        except aiohttp.ConnectionTimeoutError:  # its queue is full, or its machine is gone: nothing was sent
            _log.warning("other gateway takes no connection", address=place.address)
            raise error from None
        except (aiohttp.ClientError, TimeoutError) as failure:
            _log.warning("forwarded request not answered", reason=type(failure).__name__)
            raise OutcomeUnknown from None

    async def redis_of(self, place: str) -> RedisThere:
        """Return whether Redis answers another gateway, as far as that can be asked."""
        there = Place(place)
        headers = {HEADER: self._mark("GET", READY, ITSELF, there)}
        try:
            async with asyncio.timeout(CONNECT):
                async with self._client().get(f"{there.address}{READY}", headers=headers) as answer:
                    return _REDIS_THERE.get(answer.status, "unknown")
        except aiohttp.ClientConnectorError as error:
            return "gone" if isinstance(error.os_error, ConnectionRefusedError) else "unknown"
        except (aiohttp.ClientError, TimeoutError):
            return "unknown"

    async def _relay(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """Hand an answer on as it comes; one that breaks ends as it can: an error in-band, or a cut."""
        headers = _kept(answer.headers, _NOT_ANSWERED)
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        writer, transport, notes = await response.prepare(request), request.transport, request[keys.NOTES]
        notes.outcome = "forwarded"
        try:
            if writer is None or transport is None:
                raise ConnectionResetError("the client went away")  # noqa: TRY301 - as at any other time
            transport.set_write_buffer_limits(high=HIGH_WATER)
            patience = request.app[keys.SETTINGS].write_timeout
            ending = await self._copy(request, answer, writer, patience)
            await _taken(response.write_eof(ending), patience)
        except ConnectionResetError:
            notes.outcome = "client_disconnected" if notes.outcome == "forwarded" else notes.outcome
            if transport is not None:
                transport.abort()
        return response

    async def _copy(
        self, request: web.Request, answer: aiohttp.ClientResponse, writer: AbstractStreamWriter, patience: float
    ) -> bytes:
        """Return what is still to be said; raises ``ConnectionResetError`` where the answer can only be cut."""
        try:
            async with self.until_end():
                async for data in answer.content.iter_any():
                    await _taken(writer.write(data), patience)
                    await _taken(writer.drain(), patience)
        except ConnectionResetError:
            raise
        except (aiohttp.ClientError, TimeoutError, ShuttingDown) as failure:
            _log.warning("forwarded answer broke off", reason=type(failure).__name__)
            request[keys.NOTES].outcome = "failed"
            if answer.content_type != EVENTS:
                raise ConnectionResetError from None
            error: GatewayError = failure if isinstance(failure, ShuttingDown) else ThreadLost()
            request[keys.NOTES].error_code = request.app[keys.METRICS].count_error(error)
            return b"data: " + error.body() + b"\n\n"
        return b""

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, socket_factory=sockets.receiving),
                timeout=self._timeout,
                read_bufsize=sockets.READ_BUFFER,
                auto_decompress=False,
            )
        return self._session

    def _headers(self, request: web.Request, place: Place) -> CIMultiDict[str]:
        headers = _kept(request.headers, _NOT_SENT)
        headers[HEADER] = self._mark(request.method, request.raw_path, request[keys.NOTES].client or "-", place)
        headers["X-Request-Id"] = request[keys.REQUEST_ID]
        return headers

    def _mark(self, method: str, path: str, client: str, place: Place) -> str:
        sent_at = f"{self._alive.now():.0f}"
        return f"{sent_at} {client} {place.instance} {self._sign(method, path, sent_at, client, place.instance)}"

    def _sign(self, *parts: str) -> str:
        text = "\n".join(parts).encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, text, "sha256").hex()


def forwarded(handler: Handler) -> Handler:
    """Have a handler's request answered by the gateway that has what it is about."""

    @wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        forwarder, notes = request.app[keys.FORWARDER], request[keys.NOTES]
        for tries_left in reversed(range(TRIES)):
            try:
                return await handler(request)
            except HeldElsewhere as error:
                if forwarder is None or notes.is_forwarded or not tries_left:
                    raise
                response = await forwarder.forward(request, error)
                if response is not None:
                    return response
        raise AssertionError  # the last try returns or raises

    return answer


async def _taken(writing: Awaitable[None], patience: float) -> None:
    """See something written; raises ``ConnectionResetError`` where the client went away, or takes nothing."""
    try:
        async with asyncio.timeout(patience):
            await writing
    except TimeoutError:
        raise ConnectionResetError("the client takes nothing") from None


def _kept(headers: CIMultiDictProxy[str], left_out: AbstractSet[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in ",".join(headers.getall("Connection", ())).split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in left_out | named)
