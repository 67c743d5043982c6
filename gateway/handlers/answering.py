"""How an agent's answer gets from its turn to its client, or to whoever repeats the request; streamed or whole."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol, TypeVar

import msgspec
import structlog
from aiohttp import web

from gateway import keys
from gateway.accounts.errors import AgentMissing
from gateway.conversations.attempts import Attempt, Identity
from gateway.conversations.chats import Asker, ChatTurn
from gateway.conversations.identity import CHAT_HEADERS, chat_of, is_background
from gateway.conversations.metering import Payer
from gateway.conversations.outcomes import Outcome
from gateway.errors import (
    AgentGone,
    GatewayError,
    HeldElsewhere,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ResponseCancelled,
    dealt_with,
)
from gateway.handlers.agents import agent_of, forget
from gateway.handlers.keeping import Keeper, Keeping
from gateway.handlers.sse import SseResponse
from gateway.letta.backend import Ready, Take, always_ready
from gateway.translation.agent_events import Batch, Usage
from gateway.translation.ask import Ask

LONGEST_CLIENT: Final = 64
LONGEST_KEY: Final = 255
MOST_DIGITS: Final = 4
EVENTS: Final = "text/event-stream"
JSON: Final = "application/json"
OFF_LOOP: Final = 262_144
"""Bytes from which a request is taken apart in a thread: an image of 18 MB takes some 70 ms."""

T = TypeVar("T")

_log: Final = structlog.get_logger("gateway.answers")


class Stream(Protocol):
    """The translation of a streamed answer."""

    chunks: int

    @property
    def usage(self) -> Usage | None:
        """Return what the turn took."""
        ...

    @property
    def error(self) -> GatewayError | None:
        """Return the failure that Letta told of."""
        ...

    def receive(self, batch: Batch) -> bytes:
        """Return the bytes of a batch's events."""
        ...

    def finish(self) -> bytes:
        """Return the end of a stream that ended."""
        ...

    def fail(self, error: GatewayError) -> bytes:
        """Return the end of a stream that broke."""
        ...


class Fold(Protocol):
    """The translation of a whole answer."""

    @property
    def usage(self) -> Usage | None:
        """Return what the turn took."""
        ...

    def receive(self, batch: Batch) -> bool:
        """Take a batch's events."""
        ...

    def answer(self) -> bytes:
        """Return the answer's JSON."""
        ...


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request, taken apart; ``source`` names its API in the ledger, ``arrived`` is by the monotonic clock.

    ``own_agent`` finds who is asked on their own thread, whatever the headers say; None: whom the ask's model names.
    ``shows_activity`` where what the agent's own tools do is shown, whatever the settings say.
    ``is_heard_out`` where the answer is to come to its end though its client went away.
    ``so_far`` tells others how far it has come, who ask for it by the keeper's name.
    """

    source: str
    ask: Ask
    identity: Identity | None
    arrived: float
    keeper: Keeper | None = None
    own_agent: Callable[[], Awaitable[str]] | None = None
    shows_activity: bool = False
    is_heard_out: bool = False
    so_far: Callable[[], bytes] | None = None


async def answer(
    request: web.Request, asked: Asked, stream: Callable[[], Stream], fold: Callable[[], Fold]
) -> web.StreamResponse:
    """Answer a request: by a turn of its own, or by the answer of the request that it repeats."""
    request[keys.NOTES].model = asked.ask.model
    known = await _known_attempt(request, asked)
    if isinstance(known, Outcome):
        return _replayed(request, known)
    if isinstance(known, _New):
        attempt, producer = known.attempt, Producer(request, asked)
        attempt.start(
            request.app[keys.TASKS],
            (lambda a: producer.stream(a, stream())) if asked.ask.is_stream else (lambda a: producer.whole(a, fold())),
        )
    else:
        attempt = known
        request[keys.NOTES].outcome = "repeated"
    return await (
        _follow_stream(request, attempt) if attempt.content_type == EVENTS else _follow_whole(request, attempt)
    )


class _New(msgspec.Struct, frozen=True):
    """An answer that is yet to be produced."""

    attempt: Attempt


async def _known_attempt(request: web.Request, asked: Asked) -> Attempt | Outcome | _New:
    attempts = request.app[keys.ATTEMPTS]
    known = await attempts.find(asked.identity) if asked.identity is not None else None
    if known is not None:
        return known
    content_type = EVENTS if asked.ask.is_stream else JSON
    attempt = Attempt(content_type, asked.identity, is_heard_out=asked.is_heard_out)
    earlier = await attempts.begin(attempt)
    if earlier is not None:
        return earlier
    if asked.keeper is not None and asked.keeper.name is not None and asked.so_far is not None:
        try:
            await attempts.name(owner_of(request), asked.keeper.name, attempt, asked.so_far)
        except BaseException as error:
            attempt.never_was(error)
            await attempts.end(attempt)
            raise
    return _New(attempt)


async def identity_of(request: web.Request, body: bytes) -> Identity | None:
    """Return by what a request is known again: its idempotency key, or what the SDKs send with each try."""
    named = request.headers.get("Idempotency-Key", "").strip()
    count = request.headers.get("x-stainless-retry-count", "")
    if not named and not count:
        return None
    if len(named) > LONGEST_KEY or not named.isprintable():
        raise InvalidRequest(f"The Idempotency-Key must be printable, and {LONGEST_KEY} characters at most.")
    made = hashlib.blake2b(request.path.encode(), digest_size=16)
    named_chat = "\n".join(request.headers.get(name, "") for name in CHAT_HEADERS)
    made.update(named_chat.encode("utf-8", "backslashreplace") + b"\n")
    await taken_apart(body, made.update)
    digest, owner = made.digest(), owner_of(request)
    if named:
        key = hashlib.blake2b(named.encode("utf-8", "backslashreplace"), digest_size=32).hexdigest()
        return Identity(owner, f"key {key}", digest, is_explicit=True)
    return Identity(owner, f"sdk {digest.hex()}", digest, is_explicit=False, retries=_number(count))


def _number(count: str) -> int:
    return int(count[:MOST_DIGITS]) if count.isascii() and count.isdigit() else 0


def owner_of(request: web.Request) -> str:
    """Return who asks, by the credential."""
    return request[keys.CALLER].owner


async def taken_apart(body: bytes, take_apart: Callable[[bytes], T]) -> T:
    """Return what a body says, read in a thread where that would hold the loop."""
    return await asyncio.to_thread(take_apart, body) if len(body) > OFF_LOOP else take_apart(body)


# The turn ------------------------------------------------------------------------------------------------------------


class Producer:
    """Takes a request's turn, and hands what comes of it to an attempt."""

    def __init__(self, request: web.Request, asked: Asked) -> None:
        self._app = request.app
        self._caller = request[keys.CALLER]
        self._asked = asked
        self._keeping = Keeping(asked.keeper, request.app[keys.TASKS])
        self._metrics = request.app[keys.METRICS]
        self._notes = request[keys.NOTES]
        self._asker = _asker(request, asked)

    async def stream(self, attempt: Attempt, stream: Stream) -> None:
        """Stream the answer into the attempt; raises what happens before there is any of it."""
        self._metrics.open_streams.inc()

        def take(batch: Batch) -> bool:
            data, is_ready = stream.receive(batch), True
            if data:
                if not attempt.size:
                    self._note_first_token()
                is_ready = attempt.push(data)
            if stream.error is not None and is_ready:
                raise stream.error
            return is_ready

        async def ready() -> None:
            await attempt.ready()
            if stream.error is not None:
                raise stream.error

        try:
            async with self._answering(attempt, stream.fail):
                async with self._turn() as turn:
                    await self._deliver(turn, attempt, take, ready)
                    ending = stream.finish()
                attempt.ending = ending + await self._keeping.complete()
        finally:
            self._notes.chunks = stream.chunks
            self._metrics.open_streams.dec()
            self._metrics.chunks.inc(stream.chunks)
            self._count(attempt, stream.usage)
            await self._app[keys.ATTEMPTS].end(attempt)

    async def whole(self, attempt: Attempt, fold: Fold) -> None:
        """Gather the answer and hand it over."""
        try:
            async with self._answering(attempt, lambda _: b""):
                async with self._turn() as turn:
                    await self._deliver(turn, attempt, fold.receive, always_ready)
                    body = fold.answer()
                attempt.push(body + await self._keeping.complete())
        finally:
            self._count(attempt, fold.usage)
            await self._app[keys.ATTEMPTS].end(attempt)

    @asynccontextmanager
    async def _answering(self, attempt: Attempt, told: Callable[[GatewayError], bytes]) -> AsyncIterator[None]:
        """Have the answer kept, however it ends; a failure is the attempt's, with what its client is told of it."""
        try:
            await self._keeping.begin()
            yield
            attempt.is_complete = True
            self._notes.outcome = "complete"
        except GatewayError as error:
            await self._fail(attempt, error, told(error))
        except ConnectionResetError:
            _log.debug("nobody listens any more")
        except Exception as error:  # noqa: BLE001 - a bug is logged, and answered as what it is
            _log.exception("answer failed", exc_info=error)
            failure = InternalError(should_retry=False)
            await self._fail(attempt, failure, told(failure))
        finally:
            self._keeping.leave()

    async def _deliver(self, turn: ChatTurn, attempt: Attempt, take: Take, ready: Ready) -> None:
        await self._keeping.opened(turn)
        try:
            await turn.deliver(take, ready)
        except asyncio.CancelledError:
            if not attempt.is_cancelled:
                raise
            raise ResponseCancelled(should_retry=False) from None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[ChatTurn]:
        """Open the turn with the agent that the request names."""
        app, ask, own = self._app, self._asked.ask, self._asked.own_agent
        agent_id = (await agent_of(app, self._caller, ask.model)).id if own is None else await own()
        self._notes.model = self._notes.model or agent_id
        try:
            async with app[keys.CHATS].turn(msgspec.structs.replace(self._asker, agent_id=agent_id), ask) as turn:
                yield turn
        except AgentGone as error:
            if own is not None:
                raise AgentMissing from error
            forget(app, self._caller)
            raise ModelNotFound(ask.model) from error

    async def _fail(self, attempt: Attempt, error: GatewayError, ending: bytes) -> None:
        self._notes.outcome = "failed"
        await self._keeping.fail(error, is_unsent=attempt.may_be_repeated(error))
        attempt.error, attempt.ending, attempt.is_complete = dealt_with(error), ending, True

    def _note_first_token(self) -> None:
        self._notes.first_token = time.monotonic() - self._asked.arrived
        self._metrics.first_token.observe(self._notes.first_token)

    def _count(self, attempt: Attempt, usage: Usage | None) -> None:
        if isinstance(attempt.error, HeldElsewhere):
            return  # the turn is another gateway's, which counts it
        self._notes.outcome = self._notes.outcome or "client_disconnected"
        self._metrics.turn_ends.labels(self._notes.outcome).inc()
        if usage is not None:
            self._metrics.tokens.labels("prompt").inc(usage.prompt_tokens)
            self._metrics.tokens.labels("completion").inc(usage.completion_tokens)


def _asker(request: web.Request, asked: Asked) -> Asker:
    caller, ask, is_direct = request[keys.CALLER], asked.ask, asked.own_agent is not None
    return Asker(
        payer=Payer(caller.owner, asked.source, caller.key_id, is_user=caller.user_id is not None),
        client=request.headers.get("User-Agent", "").partition("/")[0][:LONGEST_CLIENT],
        agent_id="",
        chat=None if is_direct else chat_of(request.headers, ask),
        is_background=not is_direct and is_background(request.headers, ask),
        is_direct=is_direct,
        shows_activity=asked.shows_activity,
    )


# The client ----------------------------------------------------------------------------------------------------------


class Follower:
    """One client's stream: a ``Listener`` that begins its response with the first piece."""

    def __init__(self, response: SseResponse) -> None:
        self._response = response
        self._write = response.offer
        self._is_writing = False
        self._first = b""

    def offer(self, data: bytes) -> bool:
        """Write a piece; the first one waits for ``ready``, which begins the response."""
        if self._is_writing:
            return self._write(data)
        self._is_writing = self._response.begun and not self._first
        if self._is_writing:
            return self._write(data)
        self._first += data
        return False

    async def ready(self) -> None:
        """Begin the response, or wait for a slow client."""
        if self._first:
            first, self._first = self._first, b""
            await self._response.begin(first)
        elif self._response.begun:
            await self._response.drain()


async def _follow_stream(request: web.Request, attempt: Attempt) -> web.StreamResponse:
    settings, notes = request.app[keys.SETTINGS], request[keys.NOTES]
    response = SseResponse(request, settings.write_timeout)
    follower = Follower(response)
    try:
        async with response.beginning_within(settings.first_byte_wait):
            before = attempt.join(follower)
            if before:
                await response.begin(before)
            await attempt.over.wait()
            if attempt.error is not None:
                if not response.begun:
                    raise attempt.error
                notes.error_code = request.app[keys.METRICS].count_error(attempt.error)
            await response.end(attempt.ending)
    except ConnectionResetError:
        notes.outcome = "client_disconnected"
    except asyncio.CancelledError:
        notes.outcome = "client_disconnected"
        raise
    finally:
        attempt.leave(follower)
    return response


class _Waiter:
    """A client that waits for a whole answer."""

    def offer(self, _: bytes) -> bool:
        return True

    async def ready(self) -> None:
        return


async def _follow_whole(request: web.Request, attempt: Attempt) -> web.Response:
    waiter = _Waiter()
    attempt.join(waiter)
    try:
        await attempt.over.wait()
    except asyncio.CancelledError:
        request[keys.NOTES].outcome = "client_disconnected"
        raise
    finally:
        attempt.leave(waiter)
    if attempt.error is not None:
        raise attempt.error
    return web.Response(body=b"".join(attempt.pieces), content_type=JSON)


def _replayed(request: web.Request, outcome: Outcome) -> web.Response:
    request[keys.NOTES].outcome = "repeated"
    headers = {"Cache-Control": "no-cache"} if outcome.content_type == EVENTS else {}
    return web.Response(
        body=outcome.body,
        status=outcome.status,
        content_type=outcome.content_type if outcome.status == 200 else JSON,  # noqa: PLR2004
        headers=headers,
    )
