"""Letta's App Server: agents and turns over a few WebSockets (``letta server --listen``, letta 0.34.12).

A conversation stays on one socket, as only the socket that started a runtime hears its events, and starting one takes
longer than all else before the first token. There are a few sockets, so that a large answer on one of them delays no
more than its share of the turns.
"""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final, TypeVar

import aiohttp
import msgspec
import structlog

from gateway.errors import (
    BackendError,
    GatewayError,
    UpstreamAuthFailed,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.letta import app_server_wire as wire
from gateway.letta import failures, upstream_errors
from gateway.letta.app_server_socket import MOST_BYTES, Socket, new_request_id
from gateway.letta.app_server_turn import AppServerTurn
from gateway.letta.app_server_wire import Command, Runtime
from gateway.letta.backend import Agent
from gateway.letta.breaker import Breaker
from gateway.letta.deadlines import Limits
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import AgentTurn

T = TypeVar("T", bound=wire.Reply)

SOCKETS: Final = 4
PAGE: Final = 10_000
"""Agents of one page: the server sorts them by when they last ran, so pages would shift under a reader of several."""
THREADS_TTL: Final = 30.0
"""Seconds for which an agent that no listing knew has no thread: another gateway may have made one since."""
COLD_STARTS: Final = 6
"""Turns on threads yet to be made that the server starts at a time. Each takes it a quarter of a second of work, and
twenty at once all get their first token when the last does: one after the other, half of them need a third less."""
MOST_PAGES: Final = 1_000
CONTROL_TIMEOUT: Final = 15.0
MODELS_TIMEOUT: Final = 5.0
PING_TIMEOUT: Final = 3.0
LONGEST_HEARTBEAT: Final = 20.0

_log: Final = structlog.get_logger("gateway.letta")


class AppServerConfig(msgspec.Struct, frozen=True):
    """Where the server is, and which of its machine's tools an agent may use: by agent id or name, ``*`` for all."""

    url: str
    api_key: str | None = None
    limits: Limits = Limits()
    server_tools: dict[str, tuple[str, ...]] = {}


def _anyway() -> None:
    """Try whatever the breaker says."""


class _Slot:
    """A place for one socket; whoever comes while it is being opened waits for the same one."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.socket: Socket | None = None


class AppServerBackend:
    """An ``AgentBackend`` for App Servers; ``close`` frees its connections."""

    def __init__(self, config: AppServerConfig, metrics: Metrics, tasks: TaskSet) -> None:
        self.config = config
        self.metrics = metrics
        self.tasks = tasks
        self._breaker = Breaker()
        self._slots = [_Slot() for _ in range(SOCKETS)]
        self._names: dict[str, str] = {}
        self._threads: dict[str, Runtime] = {}
        self._threads_expire = 0.0
        self._listing = asyncio.Lock()
        self.cold_starts = asyncio.Semaphore(COLD_STARTS)
        self._readers = TaskSet()
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.limits.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all sockets."""
        for slot in self._slots:
            if slot.socket is not None:
                await slot.socket.close()
        await self._readers.close(1.0)
        await self._session.close()

    async def agents(self) -> list[Agent]:
        """Return every agent, page by page."""
        return [row.agent() for row in await self.rows()]

    async def rows(self) -> list[wire.AgentRow]:
        """Return every agent as the server tells of it, page by page."""
        rows: dict[str, wire.AgentRow] = {}
        after: str | None = None
        for _ in range(MOST_PAGES):
            page = await self._page(wire.ListQuery(limit=PAGE, after=after))
            known = len(rows)
            rows.update((row.id, row) for row in page)
            if len(page) < PAGE or len(rows) == known:
                self._names = {row.id: row.name for row in rows.values()}
                return list(rows.values())
            after = page[-1].id
        raise UpstreamInvalid(should_retry=False)

    async def find_agents(self, name_or_id: str) -> list[Agent]:
        """Return the agents of exactly this name, and the one of this id."""
        page = await self._page(wire.ListQuery(limit=PAGE, query_text=name_or_id))
        found = [row for row in page if name_or_id in (row.id, row.name)]
        self._names.update((row.id, row.name) for row in found)
        return [row.agent() for row in found]

    def turn(self, turn: AgentTurn) -> AppServerTurn:
        """Return a turn that is yet to be opened."""
        return AppServerTurn(self, turn)

    async def ping(self) -> None:
        """Ask who is there, past the breaker: readiness wants to know what is, not what was."""
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                socket = await self._open(self._slots[0])
        except TimeoutError as error:
            raise upstream_errors.before_answer(error) from error
        if not (await self.reply(socket, wire.ServerInfo(request_id=new_request_id()), PING_TIMEOUT)).success:
            raise UpstreamInvalid(should_retry=False)

    async def models(self) -> list[str]:
        """Return the handles of the models that its providers offer."""
        return [
            row.handle
            for row in (await self._ask(wire.ListModels(request_id=new_request_id()), wire.ModelsReply)).entries
        ]

    async def create_agent(self, body: wire.AgentBody) -> wire.AgentRow:
        """Make an agent."""
        return _agent(await self._ask(wire.CreateAgent(request_id=new_request_id(), body=body), wire.AgentReply))

    async def update_agent(self, agent_id: str, body: wire.AgentBody) -> wire.AgentRow:
        """Change an agent."""
        command = wire.UpdateAgent(request_id=new_request_id(), agent_id=agent_id, body=body)
        return _agent(await self._ask(command, wire.AgentReply))

    def tools_of(self, agent_id: str) -> tuple[str, ...]:
        """Return the tools of the server's machine that an agent may use: none unless the operator named them."""
        allowed = self.config.server_tools
        name = self._names.get(agent_id, agent_id)
        return allowed.get(agent_id, allowed.get(name, allowed.get("*", ())))

    def is_warm(self, agent_id: str) -> bool:
        """Tell whether an agent's own thread is known, so that its turn starts without more ado."""
        return agent_id in self._threads

    async def thread_of(self, agent_id: str) -> tuple[Socket, Runtime]:
        """Return an agent's own thread, and the socket that hears it."""
        slot = self._slots[hashlib.blake2s(agent_id.encode()).digest()[0] % SOCKETS]
        socket = await self._socket(slot)
        if not socket.models_asked:
            await self._load_models(socket)
        if agent_id not in self._threads:
            await self._list_threads()
        known = self._threads.get(agent_id)
        if known is None or not await self._started(socket, known):  # there is none yet, or it was deleted meanwhile
            known = self._threads[agent_id] = await self._new_thread(socket, agent_id)
        return socket, known

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

    async def _started(self, socket: Socket, runtime: Runtime) -> bool:
        """Let the socket hear a conversation; False where there is no such conversation."""
        if runtime in socket.started:
            return True
        command = wire.StartRuntime(
            request_id=new_request_id(), agent_id=runtime.agent_id, conversation_id=runtime.conversation_id
        )
        reply = await self.reply(socket, command, CONTROL_TIMEOUT)
        if reply.success:
            socket.started.add(runtime)
        elif not failures.is_no_conversation(reply.error):
            raise failures.of_refusal(reply.error)
        return reply.success

    async def _list_threads(self) -> None:
        """Learn all agents' threads at once: one listing serves the first turns of all agents for a while."""
        async with self._listing:
            now = asyncio.get_running_loop().time()
            if now < self._threads_expire:
                return
            query = wire.ConversationsQuery(limit=PAGE, summary_search=wire.THREAD)
            command = wire.ListConversations(request_id=new_request_id(), query=query)
            rows = (await self._ask(command, wire.ConversationsReply)).conversations
            for row in sorted(rows, key=lambda row: (row.created_at, row.id), reverse=True):
                if row.summary == wire.THREAD and row.agent_id is not None:
                    self._threads.setdefault(row.agent_id, Runtime(row.agent_id, row.id))
            self._threads_expire = now + THREADS_TTL

    async def _new_thread(self, socket: Socket, agent_id: str) -> Runtime:
        body = wire.ConversationBody(agent_id)
        command = wire.CreateConversation(request_id=new_request_id(), body=body)
        reply = _decoded(await socket.ask(command, CONTROL_TIMEOUT), wire.ConversationReply)
        if reply.conversation is None:
            raise failures.of_refusal(reply.error)
        runtime = Runtime(agent_id, reply.conversation.id)
        if self.tools_of(agent_id):
            await self._started(socket, runtime)
        else:
            # An input starts the runtime as well, and spares the server a fifth of the time to the first token; what
            # the command adds is that tools do not ask for permission.
            socket.started.add(runtime)
        return runtime

    async def leave_thread(self, stuck: Runtime) -> None:
        """Let an agent go on in a copy of its thread, where the server neither ends nor starts a turn on this one."""
        command = wire.ForkConversation(request_id=new_request_id(), conversation_id=stuck.conversation_id)
        fork = (await self._ask(command, wire.ConversationReply)).conversation
        if fork is not None and self._threads.get(stuck.agent_id) == stuck:
            self._threads[stuck.agent_id] = Runtime(stuck.agent_id, fork.id)

    async def reply(self, socket: Socket, command: Command, within: float) -> wire.Reply:
        """Ask and return what any reply says."""
        return _decoded(await socket.ask(command, within), wire.Reply)

    async def _page(self, query: wire.ListQuery) -> list[wire.AgentRow]:
        return (await self._ask(wire.ListAgents(request_id=new_request_id(), query=query), wire.AgentsReply)).agents

    async def _ask(self, command: Command, kind: type[T]) -> T:
        socket = await self._socket(self._slots[0])
        reply = _decoded(await socket.ask(command, CONTROL_TIMEOUT), kind)
        if not reply.success:
            raise UpstreamInvalid(should_retry=False)
        return reply

    async def _socket(self, slot: _Slot) -> Socket:
        """Return the slot's socket, through the breaker where it has to be opened."""
        if slot.socket is not None and not slot.socket.is_lost:
            return slot.socket
        return await self._open(slot, self._breaker.check)

    async def _open(self, slot: _Slot, may: Callable[[], None] = _anyway) -> Socket:
        async with slot.lock:
            if slot.socket is not None and not slot.socket.is_lost:
                return slot.socket
            may()  # within the lock: who waited for a try that failed does not try again at once
            try:
                slot.socket = await self._connect()
                self._breaker.succeeded()
            except (UpstreamUnavailable, UpstreamTimeout):
                self._breaker.failed()
                raise
            finally:
                self.metrics.breaker_open.set(self._breaker.is_open)
            return slot.socket

    async def _connect(self) -> Socket:
        limits = self.config.limits
        try:
            async with asyncio.timeout(limits.connect):
                ws = await self._session.ws_connect(
                    f"{self.config.url.rstrip('/')}/ws",
                    heartbeat=min(limits.silence / 1.5, LONGEST_HEARTBEAT),
                    max_msg_size=MOST_BYTES,
                    compress=0,
                )
        except aiohttp.WSServerHandshakeError as error:
            raise _refused(error.status) from error
        except upstream_errors.FOREIGN as error:
            raise upstream_errors.before_answer(error) from error
        socket = Socket(ws, self.metrics)
        self._readers.spawn(socket.read(), "read app server")
        return socket


def _refused(status: int) -> BackendError:
    if status in (401, 403):
        return UpstreamAuthFailed(should_retry=False)
    if status in upstream_errors.PASSING:
        return UpstreamUnavailable(retry_after=upstream_errors.DEFAULT_RETRY_AFTER, should_retry=True)
    return UpstreamInvalid(should_retry=False)


def _agent(reply: wire.AgentReply) -> wire.AgentRow:
    if reply.agent is None:
        raise UpstreamInvalid(should_retry=False)
    return reply.agent


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamInvalid(should_retry=False) from error
