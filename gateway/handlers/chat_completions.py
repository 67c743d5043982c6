"""``POST /v1/chat/completions``: an agent's turn, streamed or whole."""

import time
import uuid

from aiohttp import web

from gateway import keys
from gateway.handlers.answering import Asked, answer, identity_of, taken_apart
from gateway.translation.ask import Ask
from gateway.translation.chat_stream import ChatStream
from gateway.translation.completion import Completion
from gateway.translation.request import ask_of, decode


async def create(request: web.Request) -> web.StreamResponse:
    """Answer one chat completion."""
    return await complete(request)


async def complete(request: web.Request, *, shows_activity: bool = False) -> web.StreamResponse:
    """Answer one chat completion; with ``shows_activity`` what the agent's own tools do is among its reasoning."""
    arrived = time.monotonic()
    body = await request[keys.BODY].read()
    ask = await taken_apart(body, _take_apart)
    completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    return await answer(
        request,
        Asked(
            source="chat_completions",
            ask=ask,
            identity=await identity_of(request, body),
            arrived=arrived,
            shows_activity=shows_activity,
        ),
        lambda: ChatStream(
            completion_id=completion_id,
            created=created,
            model=ask.model,
            include_usage=ask.wants_usage,
            is_legacy=ask.is_legacy,
        ),
        lambda: Completion(completion_id=completion_id, created=created, model=ask.model, is_legacy=ask.is_legacy),
    )


def _take_apart(body: bytes) -> Ask:
    return ask_of(decode(body))
