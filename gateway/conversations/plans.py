"""The turns that a request can become, one class for each kind of conversation."""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import msgspec
import structlog

from gateway.conversations.directory import Directory, Pinned
from gateway.conversations.divergence import DIGEST, digest, digests, split, unseen
from gateway.conversations.metering import Payer
from gateway.conversations.tool_calls import WaitingCall, WaitingCalls
from gateway.errors import GatewayError, SharedStateUnavailable
from gateway.letta.backend import AgentBackend
from gateway.shared_state.locks import Lease
from gateway.shared_state.places import Places
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    Call,
    ClientTool,
    Instructed,
    Said,
    ToolResult,
    UserSaid,
)
from gateway.translation.heard import Heard

SystemPrompts: TypeAlias = Literal["overlay", "message", "ignore"]

OWN_THREAD: Final = ""
"""The name under which an agent's own thread is written down, where chats have their identities."""

HOLD_AGAIN: Final = (
    "From here on, the instructions that you were given before hold again, in place of those in between: the ones that "
    "begin with {beginning!r}."
)
BEGINNING: Final = 120
"""Characters by which an agent knows which instructions are meant."""
LONG: Final = 400
"""Characters up to which instructions are said again as they are."""

_log: Final = structlog.get_logger("gateway.chats")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks, ready to be put into a turn; ``wish`` is how it wants to be answered."""

    payer: Payer
    client: str
    agent_id: str
    transcript: tuple[Said, ...]
    instructions: str
    wish: Instructed | None
    tools: tuple[ClientTool, ...]
    is_news: bool = False
    """Whether the transcript is what is new, and the chat's conversation holds the rest."""
    goes_on: bool = False
    """Whether the answer goes on with the one before it, and is one message with it to the client."""
    is_legacy: bool = False
    """Whether the transcript has calls' names where their ids belong."""
    ids: Mapping[str, str] = {}
    """The ids of calls that wait, by their names, where the transcript has only those."""

    @property
    def owner(self) -> str:
        """Tell whose the chat is."""
        return self.payer.owner


class Desk(msgspec.Struct, frozen=True):
    """What plans work with."""

    backend: AgentBackend
    directory: Directory
    calls: WaitingCalls
    system_prompts: SystemPrompts
    tasks: TaskSet
    places: Places
    parked: float
    """Seconds that a turn may wait in this gateway for the client's tools."""


class Plan:
    """A ``TurnPlan``: what its kinds have in common."""

    is_ephemeral = False
    chat: str | None = None

    def __init__(self, desk: Desk, request: Request, thread: str) -> None:
        self.desk = desk
        self.request = request
        self.heard = Heard()
        self.thread = thread
        self.lease = Lease(thread)
        self.conversation_id: str | None = None
        self._is_noted = False
        self._has_returns = False

    @property
    def payer(self) -> Payer:
        """Tell whom the turn is for."""
        return self.request.payer

    @property
    def listens(self) -> bool:
        """Tell whether what the agent says has to be known at the end."""
        return bool(self.request.tools)

    @property
    def is_quiet(self) -> bool:
        """Tell that there is nothing to write down."""
        return not self.request.tools and not self._has_returns

    async def begin(self, lease: Lease) -> AgentTurn:
        """Return what is said, on the thread that is its own now."""
        self.lease = lease
        return await self.compose()

    async def compose(self) -> AgentTurn:
        """Return what is said, with the lease at hand."""
        raise NotImplementedError

    async def end(self, *, is_delivered: bool) -> None:
        """Write down which calls wait now, unless that was done before the client learnt of them."""
        if is_delivered:
            await self.note_calls()

    async def note_calls(self) -> None:
        """Write down which calls wait now: results may come as soon as the client has the whole answer."""
        if self._is_noted or self.is_quiet:
            return
        self._is_noted = True
        request = self.request
        waiting = [self._waiting(call) for call in self.heard.calls] if self.heard.stop == "requires_approval" else []
        if self._has_returns or waiting:  # whatever waited before is answered, or superseded
            await self.desk.calls.settle(request.owner, request.agent_id, self.conversation_id)
        await self.desk.calls.record(waiting)
        await self._note_place(waiting)

    async def _note_place(self, waiting: list[WaitingCall]) -> None:
        """Tell the other gateways where the turn waits, if it does so in this one: there its results must come."""
        if not self.desk.backend.capabilities.parks:
            return
        for thread in {self.thread, *(thread_of(call) for call in waiting)}:
            if waiting:
                await self.desk.places.take(thread, self.desk.parked)
            else:
                with contextlib.suppress(SharedStateUnavailable):  # it ends by itself; until then this gateway is asked
                    await self.desk.places.leave(thread)

    async def forget(self) -> None:
        """Forget the conversation: Letta has it no more."""
        request = self.request
        await self.desk.calls.settle(request.owner, request.agent_id, self.conversation_id)

    def turn_of(self, news: tuple[Said, ...], history: tuple[Said, ...] = (), told: str = "") -> AgentTurn:
        """Return a turn of this plan's conversation that says these news."""
        ids = self.request.ids
        returns = tuple(
            msgspec.structs.replace(said, call_id=ids.get(said.call_id, said.call_id))
            for said in news
            if isinstance(said, ToolResult)
        )
        self._has_returns = bool(returns)
        instructed = (Instructed(told),) if told else ()
        is_question = not returns and any(isinstance(said, UserSaid) for said in news)
        wish = (self.request.wish,) if self.request.wish is not None and is_question else ()
        return AgentTurn(
            agent_id=self.request.agent_id,
            conversation_id=self.conversation_id,
            history=history,
            news=(*instructed, *(said for said in news if isinstance(said, UserSaid)), *wish),
            returns=returns,
            tools=self.request.tools,
        )

    def _waiting(self, call: Call) -> WaitingCall:
        request = self.request
        return WaitingCall(
            call_id=call.call_id,
            owner=request.owner,
            agent_id=request.agent_id,
            conversation_id=self.conversation_id,
            chat=self.chat,
            is_ephemeral=self.is_ephemeral,
            name=call.name,
            asked_at=time.time(),
        )


class OwnThread(Plan):
    """A turn on the agent's own thread: the newest message, and the client's instructions beside it."""

    def __init__(self, desk: Desk, request: Request) -> None:
        super().__init__(desk, request, request.agent_id)
        self._told: bytes | None = None

    @property
    def is_quiet(self) -> bool:
        """Tell that there is nothing to write down."""
        return super().is_quiet and self._told is None

    async def compose(self) -> AgentTurn:
        """Say the newest message; with results of tools, all that came with them."""
        news = self.request.transcript[split(self.request.transcript) :]
        if not any(isinstance(said, ToolResult) for said in news):
            news = news[-1:]
        text, desk = self.request.instructions, self.desk
        if not text or desk.system_prompts == "ignore":
            return self.turn_of(news)
        if desk.system_prompts == "overlay" and await desk.backend.takes_overlays():
            return msgspec.structs.replace(self.turn_of(news), overlay=text)
        return self.turn_of(news, told=await self._to_tell(text))

    async def _to_tell(self, text: str) -> str:
        """Return what has to be said of the instructions: all, once and when they change; that they hold again.

        The thread is all clients', each with instructions of its own: what holds is what was said last.
        """
        told = _digest_of(text)
        if await self._told_to(OWN_THREAD) == told:
            return ""
        self._told = told
        is_known = await self._told_to(_told_by(self.request.client)) == told
        return HOLD_AGAIN.format(beginning=text[:BEGINNING]) if is_known and len(text) > LONG else text

    async def _told_to(self, chat: str) -> bytes | None:
        request = self.request
        known = await self.desk.directory.find(request.owner, request.agent_id, chat, is_news=self.lease.is_news)
        return None if known is None else known.instructions

    async def end(self, *, is_delivered: bool) -> None:
        """Write down what was told."""
        request = self.request
        if self._told is not None and is_delivered:
            pinned = Pinned("", (), self._told, is_settled=True)
            for chat in (_told_by(request.client), OWN_THREAD):
                await self.desk.directory.pin(request.owner, request.agent_id, chat, pinned, self.lease.fence)
        await super().end(is_delivered=is_delivered)


class PinnedChat(Plan):
    """A turn of a chat that has an identity: what its conversation has not seen, or the whole where they parted."""

    def __init__(self, desk: Desk, request: Request, chat: str) -> None:
        super().__init__(desk, request, f"{request.owner}\n{request.agent_id}\n{chat}")
        self.chat = self._chat = chat
        self._before: Pinned | None = None
        self._made: str | None = None

    listens = True
    is_quiet = False

    async def compose(self) -> AgentTurn:
        """Go on in the pinned conversation, or begin another one with all that was said."""
        request = self.request
        known, start = await self._look_up()
        self._before = known
        self._holds = digests(request.transcript)
        if start is None and known is not None and request.is_news:
            start = split(request.transcript)
            self._holds = (*known.seen, *digests(request.transcript[start:]))
        if known is None or start is None:
            self.conversation_id = self._made = await self.desk.backend.new_conversation(request.agent_id)
            begin = split(request.transcript)
            turn = self.turn_of(request.transcript[begin:], request.transcript[:begin], self._instructions(None))
        else:
            self.conversation_id = known.conversation_id
            turn = self.turn_of(request.transcript[start:], told=self._instructions(known.instructions))
        await self._pin(() if start is None or known is None else known.seen, is_settled=False)
        return turn

    async def _look_up(self) -> tuple[Pinned | None, int | None]:
        """Return what is pinned, and how much of the transcript that holds.

        A transcript that shares nothing with it has a pin of its own beside the chat's: a first message that was
        edited, or what a front end asks for itself. The chat goes on with what was said in it after that too.
        """
        known = await self._find(self._chat)
        start, sent = self._known_part(known), digests(self.request.transcript)
        if known is None or not known.seen or start is not None or self.request.is_news or not sent:
            return known, start
        aside = _aside(self._chat, sent[0])
        other = await self._find(aside)
        if other is None and not set(sent).isdisjoint(known.seen):
            return known, None
        self._chat = aside
        return other, self._known_part(other)

    async def _find(self, chat: str) -> Pinned | None:
        request = self.request
        return await self.desk.directory.find(request.owner, request.agent_id, chat, is_news=self.lease.is_news)

    def _known_part(self, known: Pinned | None) -> int | None:
        """Return how much of the transcript the conversation holds; None where it is of no use."""
        if known is None or not known.is_settled:
            return None
        start = unseen(known.seen, digests(self.request.transcript))
        if start is None or any(isinstance(said, AgentSaid) for said in self.request.transcript[start:]):
            return None
        return start

    def _instructions(self, told: bytes | None) -> str:
        text = self.request.instructions
        if self.desk.system_prompts == "ignore" or not text or _digest_of(text) == told:
            return ""
        return text

    async def _pin(self, seen: tuple[bytes, ...], *, is_settled: bool) -> None:
        request, text = self.request, self.request.instructions
        told = _digest_of(text) if text else None
        pinned = Pinned(self.conversation_id or "", seen, told, is_settled=is_settled)
        await self.desk.directory.pin(request.owner, request.agent_id, self._chat, pinned, self.lease.fence)

    async def end(self, *, is_delivered: bool) -> None:
        """Write down what the conversation holds now, where that is known."""
        if not is_delivered:
            await self._forget()
            return
        if self.heard.stop is not None:
            said = _by_names(self.heard.said) if self.request.is_legacy else self.heard.said
            await self._pin(self._held_with(said), is_settled=True)
        await super().end(is_delivered=is_delivered)

    def _held_with(self, said: AgentSaid) -> tuple[bytes, ...]:
        """Return what the conversation holds with this answer, as the client will tell it."""
        request = self.request
        if request.goes_on and not request.is_news and isinstance(before := request.transcript[-2], AgentSaid):
            return (*self._holds[:-2], digest(AgentSaid(before.text + said.text, said.calls)))
        return (*self._holds, digest(said))

    async def forget(self) -> None:
        """Forget the conversation: Letta has it no more."""
        await super().forget()
        await self._unpin()

    async def _forget(self) -> None:
        """Leave the chat as it was before the turn."""
        request, directory = self.request, self.desk.directory
        if self._made is not None:
            self.desk.tasks.spawn(_delete(self.desk.backend, self._made), "delete conversation")
        if self._before is not None:
            await directory.pin(request.owner, request.agent_id, self._chat, self._before, self.lease.fence)
        elif self._made is not None:
            await self._unpin()

    async def _unpin(self) -> None:
        request = self.request
        await self.desk.directory.unpin(request.owner, request.agent_id, self._chat, self.lease.fence)


class Throwaway(Plan):
    """A turn in a conversation of its own, which holds the transcript and goes when the turn or its tools are done."""

    listens = True
    is_quiet = False
    is_ephemeral = True

    def __init__(self, desk: Desk, request: Request) -> None:
        super().__init__(desk, request, f"throwaway {uuid.uuid4().hex}")

    async def compose(self) -> AgentTurn:
        """Say all that was said, and the news."""
        self.conversation_id = await self.desk.backend.new_conversation(self.request.agent_id)
        begin = split(self.request.transcript)
        told = "" if self.desk.system_prompts == "ignore" else self.request.instructions
        return self.turn_of(self.request.transcript[begin:], self.request.transcript[:begin], told)

    async def end(self, *, is_delivered: bool) -> None:
        """Delete the conversation unless calls wait in it."""
        waits = False
        try:
            await super().end(is_delivered=is_delivered)
            waits = self.heard.stop == "requires_approval"
        finally:
            if not waits and self.conversation_id is not None:
                self.desk.tasks.spawn(_delete(self.desk.backend, self.conversation_id), "delete conversation")


class Continued(Plan):
    """A turn that brings results to calls that wait in a conversation of their own."""

    listens = True
    is_quiet = False

    def __init__(self, desk: Desk, request: Request, waiting: WaitingCall) -> None:
        super().__init__(desk, request, thread_of(waiting))
        self.is_ephemeral = waiting.is_ephemeral
        self.conversation_id = waiting.conversation_id

    async def compose(self) -> AgentTurn:
        """Say what came behind the agent's last message."""
        return self.turn_of(self.request.transcript[split(self.request.transcript) :])

    async def end(self, *, is_delivered: bool) -> None:
        """Delete the conversation unless calls wait in it still."""
        await super().end(is_delivered=is_delivered)
        is_over = is_delivered and self.heard.stop != "requires_approval"
        if self.is_ephemeral and is_over and self.conversation_id is not None:
            self.desk.tasks.spawn(_delete(self.desk.backend, self.conversation_id), "delete conversation")


def thread_of(waiting: WaitingCall) -> str:
    """Name what takes one turn at a time where calls wait in a conversation of their own."""
    return f"conversation {waiting.conversation_id}"


def _by_names(said: AgentSaid) -> AgentSaid:
    """Return what the agent said as a client tells it that knows of no ids."""
    return AgentSaid(said.text, tuple(msgspec.structs.replace(call, call_id=call.name) for call in said.calls))


async def _delete(backend: AgentBackend, conversation_id: str) -> None:
    try:
        await backend.delete_conversation(conversation_id)
    except GatewayError as error:
        _log.warning("conversation not deleted", code=error.code)


def _aside(chat: str, first: bytes) -> str:
    """Return the name of what begins with another message than the chat does: no chat's, as those are printable."""
    return f"{chat}\n{first.hex()}"


def _told_by(client: str) -> str:
    """Return the name under which is written down what a client told on an agent's own thread: no chat's name."""
    return f"\n{hashlib.blake2b(client.encode('utf-8', 'surrogatepass'), digest_size=DIGEST).hexdigest()}"


def _digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()
