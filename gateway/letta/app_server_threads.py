"""Where turns run on the App Server: agents' own threads, conversations beside them, and the sockets that hear them.

Where the server neither ends nor starts a turn on a conversation, that goes on in a copy, under the same id for those
who use it: the conversation's summary says which copy, so that it is found again after a restart.
"""

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import UNSET

from gateway.errors import ConversationGone, GatewayError, UpstreamInvalid
from gateway.letta import app_server_wire as wire
from gateway.letta import failures
from gateway.letta.app_server_parked import ParkedTurn
from gateway.letta.app_server_socket import Socket, new_request_id
from gateway.letta.app_server_tools import Toolkit
from gateway.letta.app_server_wire import Runtime, ToolGroup
from gateway.translation.agent_turn import AgentTurn

if TYPE_CHECKING:
    from gateway.letta.app_server import AppServerBackend

THREADS: Final = 10_000
"""Own threads of one listing."""
THREADS_TTL: Final = 30.0
"""Seconds for which an agent that no listing knew has no thread: another gateway may have made one since."""
MODELS_TIMEOUT: Final = 5.0
MOVED: Final = "Goes on in "
MOST_MOVES: Final = 100

_log: Final = structlog.get_logger("gateway.letta")


class Threads:
    """The threads of one App Server's agents; ``parked`` are the turns that wait on them."""

    def __init__(self, backend: "AppServerBackend") -> None:
        self._backend = backend
        self._own: dict[str, Runtime] = {}
        self._own_expire = 0.0
        self._chats: dict[str, Runtime] = {}
        self._new: set[Runtime] = set()
        self._listing = asyncio.Lock()
        self.parked: dict[Runtime, ParkedTurn] = {}

    async def close(self) -> None:
        """End what waits for a client."""
        await asyncio.gather(*(parked.end() for parked in list(self.parked.values())))

    def is_warm(self, turn: AgentTurn) -> bool:
        """Tell whether the thread of a turn has been used or is known, so that it starts without more ado."""
        if turn.conversation_id is None:
            return turn.agent_id in self._own
        return self._chats.get(turn.conversation_id) not in self._new

    async def place_of(self, turn: AgentTurn, toolkit: Toolkit) -> tuple[Socket, Runtime]:
        """Return what a turn runs on, and the socket that hears it."""
        socket = await self._backend.socket_of(turn.thread)
        if not socket.models_asked:
            await self._load_models(socket)
        if turn.conversation_id is None:
            return socket, await self._thread_of(socket, turn.agent_id, toolkit)
        return socket, await self._chat_of(socket, turn.agent_id, turn.conversation_id, toolkit)

    async def offer(self, socket: Socket, runtime: Runtime, toolkit: Toolkit) -> None:
        """Register the client's tools for a conversation, where they are not those of the turn before."""
        if toolkit.offered and socket.offered.get(runtime) != toolkit.digest:
            await self._register(socket, runtime, toolkit.groups)
            socket.offered[runtime] = toolkit.digest

    async def leave(self, stuck: Runtime) -> None:
        """Go on in a copy of a thread where the server neither ends nor starts a turn."""
        chats = [chat for chat, runtime in self._chats.items() if runtime == stuck]
        is_own = self._own.get(stuck.agent_id) == stuck
        if not chats and not is_own:
            return
        command = wire.ForkConversation(request_id=new_request_id(), conversation_id=stuck.conversation_id)
        fork = (await self._backend.ask(command, wire.ConversationReply)).conversation
        if fork is None:
            return
        copy = Runtime(stuck.agent_id, fork.id)
        if is_own:
            self._own[stuck.agent_id] = copy
        for chat in chats:
            self._chats[chat] = copy
            await self._put_away(stuck.conversation_id, f"{MOVED}{copy.conversation_id}")

    async def find(self, agent_id: str, conversation_id: str | None) -> Runtime | None:
        """Return where a conversation stands, or an agent's own thread, without starting it; None where nowhere."""
        if conversation_id is None:
            if agent_id not in self._own:
                await self._list_own()
            return self._own.get(agent_id)
        found = self._chats.get(conversation_id, Runtime(agent_id, conversation_id)).conversation_id
        for _ in range(MOST_MOVES):
            command = wire.RetrieveConversation(request_id=new_request_id(), conversation_id=found)
            socket = await self._backend.control_socket()
            row = (await self._backend.reply_of(socket, command, wire.ConversationReply)).conversation
            if row is None:
                return None
            if row.summary is None or not row.summary.startswith(MOVED):
                return Runtime(agent_id, found)
            found = row.summary.removeprefix(MOVED)
        raise UpstreamInvalid(should_retry=False)

    async def new_conversation(self, agent_id: str) -> str:
        """Make a conversation beside an agent's own thread and return its id."""
        runtime = await self._make(wire.ConversationBody(agent_id, wire.CHAT))
        self._chats[runtime.conversation_id] = runtime
        return runtime.conversation_id

    async def delete_conversation(self, conversation_id: str) -> None:
        """Put a conversation away, as the server deletes none, and stop what waits in it."""
        runtime = self._chats.pop(conversation_id, None)
        if runtime is not None:
            await self._forget(runtime, self._backend.open_socket_of(conversation_id))
            if runtime.conversation_id != conversation_id:
                await self._put_away(runtime.conversation_id)
        await self._put_away(conversation_id)

    async def _put_away(self, conversation_id: str, summary: str | None = None) -> None:
        changes = wire.ConversationChanges(archived=True, summary=summary)
        command = wire.UpdateConversation(request_id=new_request_id(), conversation_id=conversation_id, body=changes)
        reply = await self._backend.reply(await self._backend.control_socket(), command)
        if not reply.success and not failures.is_no_conversation(reply.error):
            raise failures.of_refusal(reply.error)

    async def _forget(self, runtime: Runtime, socket: Socket | None) -> None:
        self._new.discard(runtime)
        parked = self.parked.get(runtime)
        if parked is not None:
            await parked.end()
        if socket is not None:
            if runtime in socket.offered:
                await self._register(socket, runtime, ())
            socket.drop(runtime)

    # Finding ---------------------------------------------------------------------------------------------------------

    async def _chat_of(self, socket: Socket, agent_id: str, conversation_id: str, toolkit: Toolkit) -> Runtime:
        runtime = self._chats.get(conversation_id, Runtime(agent_id, conversation_id))
        for _ in range(MOST_MOVES):
            started = await self._started(socket, runtime, toolkit)
            if started is None:
                raise ConversationGone(should_retry=False)
            if started == runtime:
                self._chats[conversation_id] = runtime
                return runtime
            runtime = started
        raise UpstreamInvalid(should_retry=False)

    async def _thread_of(self, socket: Socket, agent_id: str, toolkit: Toolkit) -> Runtime:
        if agent_id not in self._own:
            await self._list_own()
        known = self._own.get(agent_id)
        if known is None or not await self._started(socket, known, toolkit):  # none yet, or it was deleted meanwhile
            known = self._own[agent_id] = await self._make(wire.ConversationBody(agent_id))
            await self._started(socket, known, toolkit)
        return known

    async def _list_own(self) -> None:
        """Learn all agents' threads at once: one listing serves the first turns of all agents for a while."""
        async with self._listing:
            now = asyncio.get_running_loop().time()
            if now < self._own_expire:
                return
            query = wire.ConversationsQuery(limit=THREADS, summary_search=wire.THREAD)
            command = wire.ListConversations(request_id=new_request_id(), query=query)
            rows = (await self._backend.ask(command, wire.ConversationsReply)).conversations
            for row in sorted(rows, key=lambda row: (row.created_at, row.id), reverse=True):
                if row.summary == wire.THREAD and row.agent_id is not None:
                    self._own.setdefault(row.agent_id, Runtime(row.agent_id, row.id))
            self._own_expire = now + THREADS_TTL

    async def _make(self, body: wire.ConversationBody) -> Runtime:
        command = wire.CreateConversation(request_id=new_request_id(), body=body)
        reply = await self._backend.reply_of(await self._backend.control_socket(), command, wire.ConversationReply)
        if reply.conversation is None:
            raise failures.of_refusal(reply.error)
        runtime = Runtime(body.agent_id, reply.conversation.id)
        self._new.add(runtime)
        return runtime

    # Starting --------------------------------------------------------------------------------------------------------

    async def _started(self, socket: Socket, runtime: Runtime, toolkit: Toolkit) -> Runtime | None:
        """Let the socket hear a conversation; None where it is not there, its copy where it goes on in one."""
        may_call = bool(toolkit.server_tools or toolkit.offered)
        if runtime in (socket.unrestricted if may_call else socket.started):
            return runtime
        if runtime in self._new and not may_call:
            # An input starts the runtime as well, and spares the server a fifth of the time to the first token; what
            # the command adds is that tools do not ask for permission.
            self._new.discard(runtime)
            socket.started.add(runtime)
            return runtime
        return await self._start(socket, runtime, toolkit)

    async def _start(self, socket: Socket, runtime: Runtime, toolkit: Toolkit) -> Runtime | None:
        command = wire.StartRuntime(
            request_id=new_request_id(),
            agent_id=runtime.agent_id,
            conversation_id=runtime.conversation_id,
            external_tools=toolkit.groups or UNSET,
        )
        reply = await self._backend.reply_of(socket, command, wire.ConversationReply)
        if not reply.success:
            if failures.is_no_conversation(reply.error):
                return None
            raise failures.of_refusal(reply.error)
        summary = reply.conversation.summary if reply.conversation is not None else None
        if summary is not None and summary.startswith(MOVED):
            return Runtime(runtime.agent_id, summary.removeprefix(MOVED))
        self._new.discard(runtime)
        socket.started.add(runtime)
        socket.unrestricted.add(runtime)
        if toolkit.offered:
            socket.offered[runtime] = toolkit.digest
        return runtime

    async def _register(self, socket: Socket, runtime: Runtime, groups: tuple[ToolGroup, ...]) -> None:
        update = wire.ToolUpdate((runtime,), groups)
        command = wire.UpdateTools(request_id=new_request_id(), updates=(update,))
        if not (await self._backend.reply(socket, command)).success:
            raise UpstreamInvalid(should_retry=False)

    async def _load_models(self, socket: Socket) -> None:
        """Have the server look up its models before a socket's first turn.

        It does so when the first turn needs one, and fails the turns that come meanwhile: "Unknown model" (letta
        0.34.12).
        """
        async with self._listing:
            if socket.models_asked:
                return
            try:
                await socket.ask(wire.ListModels(request_id=new_request_id()), MODELS_TIMEOUT)
            except GatewayError as error:
                _log.warning("letta's models not listed", code=error.code)
            socket.models_asked = True
