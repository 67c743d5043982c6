"""A service of the operator's that the gateway asks over HTTP: Supabase Auth, a LiteLLM proxy.

One place decides when it cannot be reached: then every question is ``UpstreamUnavailable``, whatever was asked. What
its other answers mean is for whoever asks.
"""

import email.utils
import ssl
from collections.abc import Mapping
from typing import Final, TypeVar

import aiohttp
import msgspec
import structlog

from gateway.errors import UpstreamInvalid, UpstreamUnavailable
from gateway.letta.breaker import Breaker

T = TypeVar("T")

RETRY_AFTER: Final = 2.0
MAX_RETRY_AFTER: Final = 3_600.0
"""Seconds that a service may ask for: Supabase limits its e-mails by the hour."""
IDLE_CONNECTION: Final = 3.0
"""Seconds a connection is kept for reuse: less than the five of uvicorn and Node.js, which close them then."""
MAX_BODY: Final = 8_388_608
"""Bytes of one answer: a year of a user's days is 6 MB."""
STRUGGLING: Final = frozenset({502, 503, 504})
"""Statuses that count as a failure of the way to the service rather than of one request."""
SERVER_ERROR: Final = 500

_log: Final = structlog.get_logger("gateway.accounts")


class RemoteConfig(msgspec.Struct, frozen=True):
    """Where a service is; ``name`` is what people call it, ``code`` begins its errors' codes, times are in seconds."""

    name: str
    code: str
    base_url: str
    connect: float = 5.0
    answer: float = 15.0


class Reply(msgspec.Struct, frozen=True):
    """An answer below 500."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """Return the seconds of a ``Retry-After`` header, where it holds some."""
        value = self.headers.get("Retry-After", "")
        return min(float(value), MAX_RETRY_AFTER) if value.isascii() and value.isdigit() else None

    @property
    def date(self) -> float | None:
        """Return when the service answered by its own clock, in UTC seconds."""
        try:
            return email.utils.parsedate_to_datetime(self.headers.get("Date", "")).timestamp()
        except (ValueError, OverflowError):
            return None


class RemoteService:
    """Asks one service, within deadlines and through a breaker; ``close`` frees its connections."""

    def __init__(self, config: RemoteConfig, *, breaker: Breaker | None = None) -> None:
        self._config = config
        self._breaker = breaker or Breaker()
        self._is_down = False
        self._session = aiohttp.ClientSession(
            base_url=config.base_url.rstrip("/") + "/",
            connector=aiohttp.TCPConnector(keepalive_timeout=IDLE_CONNECTION, ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(total=config.answer, sock_connect=config.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None = None,
        body: msgspec.Struct | None = None,
    ) -> Reply:
        """Ask, and return the answer below 500; raises ``UpstreamUnavailable`` and ``UpstreamInvalid``."""
        try:
            self._breaker.check()
        except UpstreamUnavailable as error:
            raise self.unavailable(error.retry_after) from None
        data = None if body is None else msgspec.json.encode(body)
        sent = {
            "Accept": "application/json",
            **({} if body is None else {"Content-Type": "application/json"}),
            **headers,
        }
        try:
            async with self._session.request(
                method, path.lstrip("/"), params=query, data=data, headers=sent, allow_redirects=False
            ) as response:
                reply = Reply(response.status, response.headers, await self._read(response))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._went_down(type(error).__name__)
            raise self.unavailable() from error
        if reply.status in STRUGGLING:
            self._went_down(str(reply.status))
        else:
            self._came_back()
        if reply.status >= SERVER_ERROR:
            raise self.unavailable(reply.retry_after)
        return reply

    def decoded(self, reply: Reply, kind: type[T]) -> T:
        """Return what an answer says; raises ``UpstreamInvalid`` where it is not of its kind."""
        try:
            return msgspec.json.decode(reply.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.invalid() from error

    def unavailable(self, retry_after: float | None = None) -> UpstreamUnavailable:
        """Return the error of a service that cannot be asked now."""
        return UpstreamUnavailable(
            f"{self._config.name} cannot be reached right now. Try again in a moment.",
            code=f"{self._config.code}_unavailable",
            retry_after=retry_after or RETRY_AFTER,
            should_retry=True,
        )

    def invalid(self) -> UpstreamInvalid:
        """Return the error of an answer that makes no sense."""
        return UpstreamInvalid(
            f"{self._config.name} answered something that is not its protocol. The operator should check its URL.",
            code=f"{self._config.code}_invalid_response",
            should_retry=False,
        )

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > MAX_BODY:
                raise self.invalid()
        return bytes(body)

    def _went_down(self, reason: str) -> None:
        self._breaker.failed()
        if not self._is_down:
            _log.warning("service unavailable", service=self._config.name, reason=reason)
        self._is_down = True

    def _came_back(self) -> None:
        self._breaker.succeeded()
        if self._is_down:
            _log.info("service available", service=self._config.name)
        self._is_down = False
