"""``POST /v1/chat/completions``: an agent's turn, streamed or whole."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import structlog
from aiohttp import web

from gateway import keys
from gateway.errors import AgentGone, GatewayError, InternalError, ModelNotFound
from gateway.handlers.sse import SseResponse
from gateway.letta.backend import RunningTurn, always_ready
from gateway.translation.agent_events import Batch, Usage
from gateway.translation.agent_turn import Part
from gateway.translation.chat_stream import ChatStream
from gateway.translation.completion import Completion
from gateway.translation.openai_types import ChatCompletionRequest
from gateway.translation.request import agent_turn, decode, turn_content

_log: Final = structlog.get_logger("gateway.chat")


OFF_LOOP: Final = 262_144
"""Bytes from which a request is taken apart in a thread: an image of 18 MB takes some 70 ms."""


class Asked(msgspec.Struct, frozen=True):
    """A request, taken apart; ``arrived`` is by the monotonic clock."""

    chat: ChatCompletionRequest
    content: tuple[Part, ...]
    arrived: float


async def create(request: web.Request) -> web.StreamResponse:
    """Answer one chat completion."""
    arrived = time.monotonic()
    body = await request[keys.BODY].read()
    chat, content = await asyncio.to_thread(_take_apart, body) if len(body) > OFF_LOOP else _take_apart(body)
    request[keys.NOTES].model = chat.model
    asked = Asked(chat, content, arrived)
    return await (StreamedAnswer(request, asked).run() if chat.stream else _whole(request, asked))


def _take_apart(body: bytes) -> tuple[ChatCompletionRequest, tuple[Part, ...]]:
    chat = decode(body)
    return chat, turn_content(chat)


@asynccontextmanager
async def _turn(request: web.Request, asked: Asked) -> AsyncIterator[RunningTurn]:
    """Open the turn with the agent that the request names."""
    catalog = request.app[keys.CATALOG]
    agent = await catalog.resolve(asked.chat.model)
    try:
        async with request.app[keys.TURNS].turn(agent_turn(agent.id, asked.content)) as running:
            yield running
    except AgentGone as error:
        catalog.forget()
        raise ModelNotFound(asked.chat.model) from error


class StreamedAnswer:
    """One answer on its way to a client that asked for a stream."""

    def __init__(self, request: web.Request, asked: Asked) -> None:
        settings = request.app[keys.SETTINGS]
        options = asked.chat.stream_options
        self._request = request
        self._asked = asked
        self._metrics = request.app[keys.METRICS]
        self._notes = request[keys.NOTES]
        self._first_byte_wait = settings.first_byte_wait
        self._first = b""
        self._response = SseResponse(request, settings.write_timeout)
        self._stream = ChatStream(
            completion_id=_completion_id(),
            created=int(time.time()),
            model=asked.chat.model,
            include_usage=bool(options and options.include_usage),
        )

    async def run(self) -> web.StreamResponse:
        """Stream the answer; raises only what happens before the first byte."""
        self._metrics.open_streams.inc()
        try:
            async with self._response.beginning_within(self._first_byte_wait):
                # A task of its own: each token wakes this task's few frames, not those of the whole chain.
                relay = asyncio.get_running_loop().create_task(self._relay(), name="relay")
                await self._response.end(await relay)
        except ConnectionResetError:
            self._notes.outcome = "client_disconnected"
        finally:
            self._metrics.open_streams.dec()
            self._account()
        return self._response

    async def _relay(self) -> bytes:
        """Send what the agent says and return the end of the stream; raises while a failure can still be a status."""
        try:
            await self._send_batches()
            end = self._stream.finish()
        except GatewayError as error:
            return self._fail(error)
        except ConnectionResetError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug after the first byte is a logged in-band error
            _log.exception("stream failed", exc_info=error)
            return self._fail(InternalError(should_retry=False))
        self._notes.outcome = "complete"
        return end

    async def _send_batches(self) -> None:
        async with _turn(self._request, self._asked) as running:
            await running.deliver(self._take, self._ready)

    def _take(self, batch: Batch) -> bool:
        """Send a batch; False where that takes time: what is then waited for is in ``_ready``."""
        data, is_ready = self._stream.receive(batch), True
        if data:
            if self._notes.first_token is None:
                self._note_first_token()
                self._first = data
                return False
            is_ready = self._response.offer(data)
        if self._stream.error is not None:
            raise self._stream.error
        return is_ready

    async def _ready(self) -> None:
        """Wait for a slow client, or for the response to begin with the first data."""
        if not self._first:
            await self._response.drain()
            return
        first, self._first = self._first, b""
        await self._response.begin(first)
        if self._stream.error is not None:
            raise self._stream.error

    def _note_first_token(self) -> None:
        self._notes.first_token = time.monotonic() - self._asked.arrived
        self._metrics.first_token.observe(self._notes.first_token)

    def _fail(self, error: GatewayError) -> bytes:
        """Return the in-band error, or raise it while it can still be a status."""
        self._notes.outcome = "failed"
        if not self._response.begun:
            raise error
        self._notes.error_code = self._metrics.count_error(error)
        return self._stream.fail(error)

    def _account(self) -> None:
        self._notes.chunks = self._stream.chunks
        self._metrics.chunks.inc(self._stream.chunks)
        _count_turn(self._request, self._stream.usage)


async def _whole(request: web.Request, asked: Asked) -> web.Response:
    completion = Completion(completion_id=_completion_id(), created=int(time.time()), model=asked.chat.model)
    notes = request[keys.NOTES]
    try:
        async with _turn(request, asked) as running:
            await running.deliver(completion.receive, always_ready)
        answer = completion.answer()
    except asyncio.CancelledError:
        notes.outcome = "client_disconnected"
        raise
    except Exception:
        notes.outcome = "failed"
        raise
    else:
        notes.outcome = "complete"
    finally:
        _count_turn(request, completion.usage)
    return web.Response(body=answer, content_type="application/json")


def _count_turn(request: web.Request, usage: Usage | None) -> None:
    metrics, notes = request.app[keys.METRICS], request[keys.NOTES]
    notes.outcome = notes.outcome or "client_disconnected"
    metrics.turn_ends.labels(notes.outcome).inc()
    if usage is not None:
        metrics.tokens.labels("prompt").inc(usage.prompt_tokens)
        metrics.tokens.labels("completion").inc(usage.completion_tokens)


def _completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
