"""What a request's turn is to be: which Letta conversation it goes to, and what of the client's transcript.

A chat with an identity has a conversation of its own, pinned and written down; a request without one goes to the
agent's own thread, or into a conversation for itself alone. Results of tool calls go where the calls wait.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Literal, Protocol

import msgspec
import structlog

from gateway.conversations.directory import Directory
from gateway.conversations.divergence import instructions, split, spoken
from gateway.conversations.metering import Payer
from gateway.conversations.plans import (
    Continued,
    Desk,
    OwnThread,
    PinnedChat,
    Plan,
    Request,
    SystemPrompts,
    Throwaway,
    thread_of,
)
from gateway.conversations.tool_calls import WaitingCall, WaitingCalls
from gateway.conversations.turns import HeldTurn, TurnRegistry
from gateway.errors import (
    AgentGone,
    ConversationGone,
    GatewayError,
    SharedStateUnavailable,
    StorageUnavailable,
    ToolCallNotFound,
)
from gateway.letta.backend import AgentBackend, Ready, Take
from gateway.shared_state.places import Places
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Batch
from gateway.translation.agent_turn import ClientTool, Instructed, Said, ToolResult
from gateway.translation.answer_filters import AnswerFilter, answer_tool, filters_of
from gateway.translation.ask import Ask, Named
from gateway.translation.heard import length_of

_log: Final = structlog.get_logger("gateway.chats")


class ChatPolicy(msgspec.Struct, frozen=True):
    """What becomes of requests that name no chat, of system prompts, and of tools; ``tool_wait`` is in seconds."""

    conversation: Literal["agent", "stateless"] = "agent"
    system_prompts: SystemPrompts = "overlay"
    tool_activity: Literal["hidden", "reasoning"] = "hidden"
    tool_wait: float = 900.0
    remembers: bool = True
    """Whether pins may be held in memory: ``Directory``."""


class ChatRules(Protocol):
    """A ``ChatPolicy`` that may change from one request to the next, but for what it says of prompts and pins."""

    @property
    def conversation(self) -> Literal["agent", "stateless"]:
        """Tell what becomes of requests that name no chat."""
        ...

    @property
    def system_prompts(self) -> SystemPrompts:
        """Tell what becomes of system prompts."""
        ...

    @property
    def tool_activity(self) -> Literal["hidden", "reasoning"]:
        """Tell whether what the agent's own tools do is shown."""
        ...

    @property
    def tool_wait(self) -> float:
        """Return the seconds that a tool call waits for its result."""
        ...

    @property
    def remembers(self) -> bool:
        """Tell whether pins may be held in memory."""
        ...


class Asker(msgspec.Struct, frozen=True):
    """Who asks whom: ``payer`` by the credential, ``client`` by the program; ``chat`` where one is named.

    ``is_direct`` asks on the agent's own thread, whatever the policy says, and hears what its tools do as it is;
    ``shows_activity`` hears of it in the reasoning, whatever the policy says.
    """

    payer: Payer
    client: str
    agent_id: str
    chat: str | None = None
    is_background: bool = False
    is_direct: bool = False
    shows_activity: bool = False

    @property
    def owner(self) -> str:
        """Tell whose the chat is."""
        return self.payer.owner


class ChatTurn:
    """A turn that is open: what its client hears of it."""

    def __init__(self, held: HeldTurn, plan: Plan, filters: Sequence[AnswerFilter]) -> None:
        self.id = held.id
        self._held = held
        self._running = held.running
        self._plan = plan
        self._filters = filters

    @property
    def agent_id(self) -> str:
        """Return whose turn it is."""
        return self._plan.request.agent_id

    @property
    def conversation_id(self) -> str | None:
        """Return which conversation it is in; None for the agent's own thread."""
        return self._plan.conversation_id

    async def deliver(self, take: Take, ready: Ready) -> None:
        """Hand every batch to ``take``, as ``RunningTurn.deliver`` does, after the request's filters."""
        if self._plan.request.payer.is_user:
            take = self._counted(take)
        hear = self._plan.heard.receive if self._plan.listens else None
        filters = self._filters
        if not filters and hear is None:
            await self._running.deliver(take, ready)
            return

        def filtered(batch: Batch) -> bool:
            for answer_filter in filters:
                batch = answer_filter.receive(batch)
            if hear is not None:
                hear(batch)
            return take(batch) if batch else True

        await self._running.deliver(filtered, ready)
        try:
            await self._plan.note_calls()
        except (SharedStateUnavailable, StorageUnavailable) as error:
            error.should_retry = False  # the message reached the agent
            raise

    def _counted(self, take: Take) -> Take:
        held = self._held

        def counted(batch: Batch) -> bool:
            held.characters += length_of(batch)
            return take(batch)

        return counted


class Chats:
    """Opens the turns of all requests."""

    def __init__(
        self,
        registry: TurnRegistry,
        backend: AgentBackend,
        database: Database,
        policy: ChatRules,
        tasks: TaskSet,
        *,
        places: Places,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._desk = Desk(
            backend=backend,
            directory=Directory(database, remembers=policy.remembers),
            calls=WaitingCalls(database),
            system_prompts=policy.system_prompts,
            tasks=tasks,
            places=places,
            parked=policy.tool_wait,
        )

    @asynccontextmanager
    async def turn(self, asker: Asker, ask: Ask) -> AsyncIterator[ChatTurn]:
        """Open the turn that a request asks for; raises what the registry and the backend raise."""
        tools, answering = _offered(ask)
        request = Request(
            payer=asker.payer,
            client=asker.client,
            agent_id=asker.agent_id,
            transcript=spoken(ask.transcript),
            instructions=instructions(ask.transcript),
            wish=_wish(ask, answering),
            tools=tools,
            is_news=ask.is_news,
            goes_on=ask.goes_on,
            is_legacy=ask.is_legacy,
            ids=await self._ids(asker, ask),
        )
        is_wanted = asker.shows_activity or self._policy.tool_activity == "reasoning"
        shows_activity = is_wanted and not asker.is_direct
        filters = filters_of(ask, answering, shows_activity=shows_activity)
        try:
            async with AsyncExitStack() as stack:
                plan = await self._plan(asker, request)
                try:
                    held = await stack.enter_async_context(self._registry.turn(plan))
                except ConversationGone:
                    await plan.forget()
                    plan = await self._plan(asker, request)
                    held = await stack.enter_async_context(self._registry.turn(plan))
                yield ChatTurn(held, plan, filters)
        except AgentGone:
            await self._desk.directory.forget_agent(asker.agent_id)
            raise

    async def sweep(self, now: float) -> None:
        """Give up calls that have waited too long, and the conversations that were kept for them alone."""
        overdue = await self._desk.calls.overdue(now - self._policy.tool_wait)
        for call in overdue:
            try:
                if await self._registry.is_taken(thread_of(call)):
                    continue  # its results have come at the last moment
                if call.is_ephemeral and call.conversation_id is not None:
                    await self._desk.backend.delete_conversation(call.conversation_id)
                await self._desk.calls.settle(call.owner, call.agent_id, call.conversation_id)
            except GatewayError as error:
                _log.warning("waiting call not given up", code=error.code)

    async def _plan(self, asker: Asker, request: Request) -> Plan:
        if asker.is_direct:
            return OwnThread(self._desk, request)
        waiting = await self._waiting(asker, request)
        if asker.is_background:
            return Throwaway(self._desk, request)
        if waiting is not None:
            return self._where(waiting, request)
        if asker.chat is not None:
            return PinnedChat(self._desk, request, asker.chat)
        if self._policy.conversation == "stateless":
            return Throwaway(self._desk, request)
        return OwnThread(self._desk, request)

    def _where(self, waiting: WaitingCall, request: Request) -> Plan:
        """Return the turn that brings results to where their calls wait."""
        if waiting.conversation_id is None:
            return OwnThread(self._desk, request)
        if waiting.chat is not None:
            return PinnedChat(self._desk, request, waiting.chat)
        return Continued(self._desk, request, waiting)

    async def _ids(self, asker: Asker, ask: Ask) -> dict[str, str]:
        """Return the ids of calls that wait, by name: functions have no ids on the wire."""
        if not ask.is_legacy or not _results(spoken(ask.transcript)):
            return {}
        waiting = await self._desk.calls.of_agent(asker.owner, asker.agent_id)
        return {call.name: call.call_id for call in waiting if call.chat == asker.chat}

    async def _waiting(self, asker: Asker, request: Request) -> WaitingCall | None:
        """Return a call that waits for one of the results; raises ``ToolCallNotFound`` where one waits for another."""
        results = [request.ids.get(said.call_id, said.call_id) for said in _results(request.transcript)]
        if not results:
            return None
        try:
            waiting = await self._desk.calls.find(results)
        except StorageUnavailable as error:
            error.should_retry = True  # nothing was said yet
            raise
        mine = [call for call in waiting if call.owner == asker.owner and call.agent_id == asker.agent_id]
        if {call.call_id for call in waiting} - {call.call_id for call in mine}:
            raise ToolCallNotFound
        return mine[0] if mine else None


def _results(transcript: tuple[Said, ...]) -> list[ToolResult]:
    """Return the results among the news."""
    return [said for said in transcript[split(transcript) :] if isinstance(said, ToolResult)]


def _offered(ask: Ask) -> tuple[tuple[ClientTool, ...], ClientTool | None]:
    """Return the tools that the agent is offered, and the one among them by which it answers."""
    choice = ask.tool_choice
    if choice == "none":
        tools: tuple[ClientTool, ...] = ()
    elif isinstance(choice, Named):
        tools = tuple(tool for tool in ask.tools if tool.name == choice.name)
    else:
        tools = ask.tools
    if ask.output is None:
        return tools, None
    answering = answer_tool(ask.output, ask.tools)
    return (*tools, answering), answering


def _wish(ask: Ask, answering: ClientTool | None) -> Instructed | None:
    """Return what the agent is told of how to answer: Letta has no way to make it call a tool."""
    wishes = []
    match ask.tool_choice:
        case Named(name=name):
            wishes.append(f"Answer this by calling the tool {name}.")
        case "required":
            wishes.append("Answer this by calling one of the tools, not in words.")
        case _ if answering is not None:
            wishes.append(f"When you know the answer, give it by calling the tool {answering.name}, not in words.")
    if ask.tools and ask.tool_choice != "none" and not ask.parallel_calls:
        wishes.append("Call one tool at a time.")
    return Instructed(" ".join(wishes)) if wishes else None
