"""``/api/v1/chat``: a user talks with their own agent, and reads what was said."""

import asyncio
import time
from typing import Annotated, Final

import msgspec
import structlog
from aiohttp import web
from msgspec import Meta

from gateway import keys
from gateway.accounts.errors import InvalidToken
from gateway.accounts.history import Ended, Exchange, History, new_exchange
from gateway.conversations.chats import ChatTurn
from gateway.errors import GatewayError, StorageUnavailable
from gateway.handlers.answering import Asked, answer, identity_of, taken_apart
from gateway.handlers.json_answers import json_answer
from gateway.handlers.keeping import AnswerEnd
from gateway.handlers.queries import query_of
from gateway.tasks import TaskSet
from gateway.translation.platform_answer import PlatformAnswer
from gateway.translation.platform_request import ChatMessage, chat_message
from gateway.translation.platform_stream import PlatformStream, done
from gateway.translation.platform_types import ChatAnswer, Message, MessageStatus, Started

LATER: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds between the tries to store an answer that the database did not take."""

_STATUSES: Final[dict[AnswerEnd, MessageStatus]] = {
    "complete": "complete",
    "failed": "failed",
    "interrupted": "interrupted",
    "cancelled": "interrupted",
}

_encode: Final = msgspec.json.Encoder().encode
_log: Final = structlog.get_logger("gateway.history")


class HistoryQuery(msgspec.Struct, frozen=True):
    """What part of the history is asked for: some messages before the one of the id ``cursor``."""

    cursor: Annotated[str, Meta(pattern="^msg_[0-9a-f]{32}$")] | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


async def send(request: web.Request) -> web.StreamResponse:
    """Say something to the user's own agent, and answer what it says: as events, or whole where ``stream`` is false.

    Both messages are kept, one that the agent never got as ``failed``. A request that is repeated with its
    ``Idempotency-Key`` is the same message.
    """
    arrived = time.monotonic()
    body = await request[keys.BODY].read()
    message = await taken_apart(body, chat_message)
    user_id = _user_of(request)
    identity = await identity_of(request, body)
    exchange = new_exchange(user_id, identity.key if identity is not None and identity.is_explicit else None)
    kept = KeptChat(request.app[keys.HISTORY], request.app[keys.TASKS], exchange, message)
    asked = Asked(
        source="platform",
        ask=message.ask(),
        identity=identity,
        arrived=arrived,
        keeper=kept,
        own_agent=lambda: request.app[keys.OWN_AGENTS].id_of(user_id),
        is_heard_out=request.app[keys.SETTINGS].on_disconnect == "finish",
    )
    return await answer(request, asked, kept.stream, kept.whole)


async def history(request: web.Request) -> web.Response:
    """Answer the user's messages, newest first; ``next_cursor`` leads to older ones."""
    query = query_of(request, HistoryQuery)
    page = await request.app[keys.HISTORY].page(_user_of(request), query.cursor, query.limit)
    return json_answer(page)


async def delete_history(request: web.Request) -> web.Response:
    """Delete all that was said here, by whichever API; what the agent remembers of it stays, until it is reset.

    That is messages, stored responses, and the answers that stand under an ``Idempotency-Key``: a request that is
    repeated with it is not said again, and answered 409.
    """
    user_id = _user_of(request)
    await request.app[keys.HISTORY].delete(user_id)
    await request.app[keys.RESPONSES].delete_all(user_id)
    await request.app[keys.ATTEMPTS].forget_answers(user_id)
    return web.Response(status=204)


def _user_of(request: web.Request) -> str:
    user_id = request[keys.CALLER].user_id
    if user_id is None:
        raise InvalidToken
    return user_id


class KeptChat:
    """A ``Keeper`` of one message and the answer to it."""

    def __init__(self, history: History, tasks: TaskSet, exchange: Exchange, message: ChatMessage) -> None:
        self.name: str | None = None
        self._history = history
        self._tasks = tasks
        self._exchange = exchange
        self._message = message
        self._answer = PlatformAnswer()
        self._question: Message | None = None
        self._turn_id: str | None = None

    def stream(self) -> PlatformStream:
        """Return the translation of a streamed answer."""
        return PlatformStream(Started(self._exchange.answer_id, self._exchange.question_id), self._answer)

    def whole(self) -> PlatformAnswer:
        """Return the translation of a whole answer."""
        return self._answer

    async def begin(self) -> None:
        """Write down what the user says."""
        self._question = await self._history.begin(self._exchange, self._message.text)

    async def opened(self, turn: ChatTurn) -> None:
        """Write down the turn, by which the answer's cost is found though this process should die."""
        self._turn_id = turn.id
        try:
            await self._history.note_turn(self._exchange, turn.id)
        except StorageUnavailable as error:
            _log.warning("turn of a message not noted", code=error.code, reason=error.reason)

    async def end(self, how: AnswerEnd, error: GatewayError | None) -> bytes:
        """Write down the answer, and tell it as it is kept; or that the agent never got the message."""
        if how == "unsent":
            await self._history.refuse(self._exchange, None if error is None else error.code)
            return b""
        ended = self._ended(_STATUSES[how], error)
        try:
            kept = await self._history.end(self._exchange, ended)
        except StorageUnavailable:
            self._tasks.spawn(self._end_later(ended), "keep answer later")
            raise
        return self._told(kept or _unkept(self._exchange, ended)) if how == "complete" else b""

    def _ended(self, status: MessageStatus, error: GatewayError | None) -> Ended:
        said = self._answer.said()
        return Ended(
            status=status,
            text=said.text,
            reasoning=said.reasoning,
            activity=said.activity,
            error_code=None if error is None else error.code,
            turn_id=self._turn_id,
        )

    def _told(self, message: Message) -> bytes:
        if self._message.is_stream:
            return done(message)
        assert self._question is not None  # noqa: S101 - it was begun
        return _encode(ChatAnswer(message, self._question, message.usage))

    async def _end_later(self, ended: Ended) -> None:
        for pause in LATER:
            await asyncio.sleep(pause)
            try:
                await self._history.end(self._exchange, ended)
            except StorageUnavailable as error:
                _log.warning("answer not kept yet", code=error.code, reason=error.reason)
            else:
                return
        _log.error("answer not kept", status=ended.status)


def _unkept(exchange: Exchange, ended: Ended) -> Message:
    """Return an answer whose history was deleted while it was given."""
    now = time.time()
    return Message(
        id=exchange.answer_id,
        role="assistant",
        status=ended.status,
        text=ended.text,
        reasoning=ended.reasoning,
        activity=ended.activity,
        created_at=now,
        ended_at=now,
    )
