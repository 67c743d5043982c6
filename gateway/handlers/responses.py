"""``/v1/responses``: an agent's turn as a response, and the responses that were stored."""

import time
import uuid
from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from gateway import keys
from gateway.conversations.attempts import Attempts
from gateway.conversations.chats import ChatTurn
from gateway.conversations.responses import StoredResponse
from gateway.errors import ConversationBusy, GatewayError, InvalidRequest, ResponseNotFound, UnsupportedParameter
from gateway.handlers.answering import Asked, answer, identity_of, owner_of, taken_apart
from gateway.handlers.json_answers import json_answer
from gateway.handlers.keeping import AnswerEnd
from gateway.handlers.queries import query_of
from gateway.translation.ask import Ask
from gateway.translation.responses_answer import ResponseAnswer, response_of
from gateway.translation.responses_input_items import input_items, listed
from gateway.translation.responses_items import items_by_id
from gateway.translation.responses_request import ask_of, decode, echo_of, namespaced, references
from gateway.translation.responses_stored import output_of, said_before
from gateway.translation.responses_stream import ResponsesStream
from gateway.translation.responses_types import DeletedResponse, InputItemsQuery, Item, ResponseQuery, ResponsesRequest

LONGEST_CHAIN: Final = 500
"""Responses that one may follow, each the one before."""

Translation = TypeVar("Translation", ResponsesStream, ResponseAnswer)


async def create(request: web.Request) -> web.StreamResponse:
    """Answer one request for a response."""
    arrived = time.monotonic()
    body = await request[keys.BODY].read()
    asked = await taken_apart(body, decode)
    answering = Answering(request, asked)
    ask = await answering.ask()
    return await answer(
        request,
        Asked(
            source="responses",
            ask=ask,
            identity=await identity_of(request, body),
            arrived=arrived,
            keeper=answering if answering.is_stored else None,
            so_far=answering.so_far,
        ),
        answering.stream,
        answering.whole,
    )


async def retrieve(request: web.Request) -> web.Response:
    """Answer a stored response, or how far one has come that is under way."""
    if query_of(request, ResponseQuery).stream:
        raise UnsupportedParameter(
            "Unsupported parameter: 'stream'. A stored response is not streamed again: leave it out.", param="stream"
        )
    so_far = request.app[keys.ATTEMPTS].so_far(owner_of(request), request.match_info["response"])
    body = (await _stored(request)).response if so_far is None else so_far
    return web.Response(body=body, content_type="application/json")


async def list_input_items(request: web.Request) -> web.Response:
    """Answer what a stored response was asked with."""
    wanted = query_of(request, InputItemsQuery)
    stored = await _stored(request)
    return json_answer(listed(stored.input_items, wanted))


async def delete(request: web.Request) -> web.Response:
    """Delete a stored response."""
    response_id = request.match_info["response"]
    await _stored(request)
    if not await request.app[keys.RESPONSES].delete(owner_of(request), response_id):
        raise ResponseNotFound(response_id)
    return json_answer(DeletedResponse(response_id))


async def cancel(request: web.Request) -> web.Response:
    """Cancel a response that is under way; whoever listens to it is told."""
    response_id = request.match_info["response"]
    if not await request.app[keys.ATTEMPTS].cancel(owner_of(request), response_id):
        await _stored(request)
        raise InvalidRequest("This response has ended already: there is nothing to cancel.", param="response_id")
    stored = await request.app[keys.RESPONSES].find(owner_of(request), response_id)
    if stored is None:
        raise ResponseNotFound(response_id)
    return web.Response(body=stored.response, content_type="application/json")


class Answering:
    """One response as it is asked for, answered and stored."""

    def __init__(self, request: web.Request, asked: ResponsesRequest) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.name: str | None = self.id
        self.is_stored = asked.store is not False
        self._responses = request.app[keys.RESPONSES]
        self._attempts = request.app[keys.ATTEMPTS]
        self._owner = owner_of(request)
        self._asked = asked
        self._echo = echo_of(asked)
        self._namespaced = namespaced(asked)
        self._input = b""
        self._created = int(time.time())
        self._answer: ResponsesStream | ResponseAnswer | None = None
        self._turn: ChatTurn | None = None

    async def ask(self) -> Ask:
        """Return what is asked, with what was said in the responses before; raises ``ResponseNotFound``."""
        chain = await self._chain(self._asked.previous_response_id)
        before = said_before([(stored.input_items, stored.response) for stored in chain])
        ask = ask_of(self._asked, before=before, known=await self._known())
        self._input = input_items(self._asked, self.id) if self.is_stored else b""  # which are known to be items by now
        if chain and ask.chat is None:
            return msgspec.structs.replace(ask, chat=f"response:{chain[0].id}")
        return ask

    def stream(self) -> ResponsesStream:
        """Return the translation of a streamed answer."""
        return self._made(ResponsesStream)

    def whole(self) -> ResponseAnswer:
        """Return the translation of a whole answer."""
        return self._made(ResponseAnswer)

    def _made(self, kind: type[Translation]) -> Translation:
        self._answer = made = kind(
            response_id=self.id,
            created=self._created,
            echo=self._echo,
            tool_activity=True,
            namespaced=self._namespaced,
        )
        return made

    def so_far(self) -> bytes:
        """Return the response as far as it has come."""
        return (self._answer or self.whole()).under_way()

    async def begin(self) -> None:
        """Store nothing yet: a response is kept once it has ended."""

    async def opened(self, turn: ChatTurn) -> None:
        """Note whose turn it is."""
        self._turn = turn

    async def end(self, how: AnswerEnd, error: GatewayError | None) -> bytes:
        """Store a response whose message reached the agent, however it ended; the stream itself tells of it."""
        turn, answer = self._turn, self._answer
        if turn is None or answer is None or how == "unsent":
            return b""
        if how == "complete":
            await self._store(turn, answer.answer(), "completed")
        elif how == "cancelled" or error is None:
            await self._store(turn, answer.cancelled(), "cancelled")
        else:
            await self._store(turn, answer.failed(error), "failed")
        return b""

    async def _store(self, turn: ChatTurn, response: bytes, status: str) -> None:
        await self._responses.keep(
            StoredResponse(
                id=self.id,
                owner=self._owner,
                agent_id=turn.agent_id,
                conversation_id=turn.conversation_id,
                previous_id=self._asked.previous_response_id,
                input_items=self._input,
                response=response,
                status=status,
                created_at=time.time(),
            )
        )

    async def _chain(self, last: str | None) -> list[StoredResponse]:
        """Return a response and those that it follows, oldest first."""
        chain: list[StoredResponse] = []
        while last is not None and len(chain) < LONGEST_CHAIN:
            stored = await self._responses.find(self._owner, last)
            if stored is None:
                if not chain:
                    await _check_over(self._attempts, self._owner, last)
                    raise ResponseNotFound(last, param="previous_response_id")
                break  # an older one was deleted since: the chain begins behind it
            chain.append(stored)
            last = stored.previous_id
        return chain[::-1]

    async def _known(self) -> Mapping[str, Item]:
        """Return the stored items that the input refers to."""
        known: dict[str, Item] = {}
        for response_id in {response_of(item_id) for item_id in references(self._asked)} - {None}:
            stored = await self._responses.find(self._owner, response_id or "")
            if stored is not None:
                known |= items_by_id(stored.input_items) | items_by_id(output_of(stored.response))
        return known


async def _stored(request: web.Request) -> StoredResponse:
    response_id = request.match_info["response"]
    stored = await request.app[keys.RESPONSES].find(owner_of(request), response_id)
    if stored is None:
        await _check_over(request.app[keys.ATTEMPTS], owner_of(request), response_id)
        raise ResponseNotFound(response_id)
    return stored


async def _check_over(attempts: Attempts, owner: str, response_id: str) -> None:
    """Raise ``ConversationBusy`` where a response is under way here, ``HeldElsewhere`` where in another gateway."""
    if attempts.so_far(owner, response_id) is not None:
        raise ConversationBusy("This response is still under way: wait until it has ended, or cancel it.")
    await attempts.check_elsewhere(owner, response_id)
