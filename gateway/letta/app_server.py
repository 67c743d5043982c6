"""Letta's App Server: agents and turns over a few WebSockets (``letta server --listen``, letta 0.34.12).

A conversation stays on one socket, as only the socket that started a runtime hears its events, and starting one takes
longer than all else before the first token. There are a few sockets, so that a large answer on one of them delays no
more than its share of the turns.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, TypeVar

import aiohttp
import msgspec
import structlog

from gateway.errors import (
    AgentGone,
    BackendError,
    UpstreamAuthFailed,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.letta import app_server_spent, failures, upstream_errors
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_agents import AppServerAgents
from gateway.letta.app_server_memory import AppServerMemory
from gateway.letta.app_server_socket import MOST_BYTES, Socket, new_request_id
from gateway.letta.app_server_threads import Threads
from gateway.letta.app_server_turn import AppServerTurn
from gateway.letta.app_server_wire import Command
from gateway.letta.backend import Agent, AgentDetails, AgentSpec, Capabilities, MemoryBlock, SentTurn
from gateway.letta.breaker import Breaker
from gateway.letta.deadlines import Limits
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn

T = TypeVar("T", bound=wire.Reply)

SOCKETS: Final = 4
PAGE: Final = 10_000
"""Agents of one page: the server sorts them by when they last ran, so pages would shift under a reader of several."""
COLD_STARTS: Final = 6
"""Turns on threads yet to be made that the server starts at a time. Each takes it a quarter of a second of work, and
twenty at once all get their first token when the last does: one after the other, half of them need a third less."""
MOST_PAGES: Final = 1_000
CONTROL_TIMEOUT: Final = 15.0
PING_TIMEOUT: Final = 3.0
LONGEST_HEARTBEAT: Final = 20.0

_log: Final = structlog.get_logger("gateway.letta")


class AppServerConfig(msgspec.Struct, frozen=True):
    """Where the server is, and which of its machine's tools an agent may use: by agent id or name, ``*`` for all."""

    url: str
    api_key: str | None = None
    limits: Limits = Limits()
    server_tools: Mapping[str, tuple[str, ...]] = {}
    parked_timeout: float = 900.0
    """Seconds that a turn waits for results of the client's tools; the server itself sets a limit of five minutes."""


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
        self.threads = Threads(self)
        self._agents = AppServerAgents(self)
        self._memory = AppServerMemory(self)
        self.cold_starts = asyncio.Semaphore(COLD_STARTS)
        self._readers = TaskSet()
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.limits.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """End what waits for a client, and close all sockets."""
        await self.threads.close()
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

    @property
    def capabilities(self) -> Capabilities:
        """Tell what an App Server can do: its agents' memory is files, and no blocks to be laid over it."""
        return Capabilities(providers=False, parks=True)

    @property
    def parked(self) -> int:
        """Return how many turns wait for results of the client's tools."""
        return len(self.threads.parked)

    async def new_conversation(self, agent_id: str) -> str:
        """Make a conversation of an agent's and return its id."""
        return await self.threads.new_conversation(agent_id)

    async def delete_conversation(self, conversation_id: str) -> None:
        """Put a conversation away, as the server deletes none."""
        await self.threads.delete_conversation(conversation_id)

    async def details(self, agent_id: str) -> AgentDetails:
        """Return what an agent is; its tools are those of the server's machine that it may use."""
        row = await self.row(agent_id)
        return AgentDetails(row.description, row.model, self.tools_of(agent_id))

    async def model(self, agent_id: str) -> str | None:
        """Return the handle of the model that an agent answers with."""
        return (await self.details(agent_id)).model

    async def row(self, agent_id: str) -> wire.AgentRow:
        """Return an agent as the server tells of it; raises ``AgentGone``."""
        command = wire.RetrieveAgent(request_id=new_request_id(), agent_id=agent_id)
        reply = await self.reply_of(await self.control_socket(), command, wire.AgentReply)
        if reply.agent is None:
            raise failures.of_refusal(reply.error)
        self._names[reply.agent.id] = reply.agent.name
        return reply.agent

    async def find_tagged(self, tag: str) -> list[Agent]:
        """Return the agents that have this tag."""
        return await self._agents.tagged(tag)

    async def create_agent(self, spec: AgentSpec) -> Agent:
        """Make an agent; its blocks become the files of its memory."""
        return await self._agents.create(spec)

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        """Do nothing: agents on this server have no providers of their own."""

    async def delete_agent(self, agent_id: str) -> None:
        """Delete an agent; no command deletes the files of its memory, so they are emptied."""
        with contextlib.suppress(AgentGone):
            await self._memory.blank(agent_id)
        await self._agents.delete(agent_id)

    async def delete_provider(self, name: str) -> None:
        """Do nothing: agents on this server have no providers of their own."""

    async def memory(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return the files of an agent's memory that stand in its prompt."""
        return await self._memory.blocks(agent_id)

    async def write_memory(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace what a file of an agent's memory says."""
        return await self._memory.write(agent_id, label, value)

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Return what a turn took whose socket is closed, which stopped it."""
        return await app_server_spent.spent(self, turn)

    async def takes_overlays(self) -> bool:
        """Tell that turns have none: what this server is told stays in the conversation."""
        return False

    async def clean_up(self) -> None:
        """Do nothing: what a gateway leaves on this server is its conversations, which go on."""

    async def ping(self) -> None:
        """Ask who is there, past the breaker: readiness wants to know what is, not what was."""
        self.metrics.breaker_open.set(self._breaker.refuses)  # the socket that is asked may be open all the while
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                socket = await self._open(self._slots[0])
        except TimeoutError as error:
            raise upstream_errors.before_answer(error) from error
        command = wire.ServerInfo(request_id=new_request_id())
        if not (await self.reply(socket, command, within=PING_TIMEOUT)).success:
            raise UpstreamInvalid(should_retry=False)

    async def models(self) -> list[str]:
        """Return the handles of the models that its providers offer."""
        return [
            row.handle
            for row in (await self.ask(wire.ListModels(request_id=new_request_id()), wire.ModelsReply)).entries
        ]

    async def make_agent(self, body: wire.AgentBody) -> wire.AgentRow:
        """Make an agent of these parts."""
        return _agent(await self.ask(wire.CreateAgent(request_id=new_request_id(), body=body), wire.AgentReply))

    async def update_agent(self, agent_id: str, body: wire.AgentBody) -> wire.AgentRow:
        """Change an agent."""
        command = wire.UpdateAgent(request_id=new_request_id(), agent_id=agent_id, body=body)
        return _agent(await self.ask(command, wire.AgentReply))

    def tools_of(self, agent_id: str) -> tuple[str, ...]:
        """Return the tools of the server's machine that an agent may use: none unless the operator named them."""
        allowed = self.config.server_tools
        name = self._names.get(agent_id, agent_id)
        return allowed.get(agent_id, allowed.get(name, allowed.get("*", ())))

    async def socket_of(self, thread: str) -> Socket:
        """Return the socket that hears a thread."""
        return await self._socket(self._slot_of(thread))

    def open_socket_of(self, thread: str) -> Socket | None:
        """Return the socket that hears a thread, where it is open already."""
        socket = self._slot_of(thread).socket
        return None if socket is None or socket.is_lost else socket

    async def control_socket(self) -> Socket:
        """Return the socket for what belongs to no thread."""
        return await self._socket(self._slots[0])

    @contextlib.asynccontextmanager
    async def own_socket(self, most_bytes: int) -> AsyncIterator[Socket]:
        """Give a connection for one large reply: on a shared one, a reply too large would end everybody's turns."""
        self._breaker.check()
        socket = await self._connect(most_bytes)
        try:
            yield socket
        finally:
            await socket.close()

    async def reply(self, socket: Socket, command: Command, within: float | None = None) -> wire.Reply:
        """Ask and return what any reply says; ``within`` is in seconds."""
        return await self.reply_of(socket, command, wire.Reply, within)

    async def reply_of(self, socket: Socket, command: Command, kind: type[T], within: float | None = None) -> T:
        """Ask and return the reply, whatever it says; ``within`` is in seconds."""
        data = await socket.ask(command, CONTROL_TIMEOUT if within is None else within)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamInvalid(should_retry=False) from error

    async def ask(self, command: Command, kind: type[T]) -> T:
        """Ask and return the reply; raises ``UpstreamInvalid`` where it is a refusal."""
        reply = await self.reply_of(await self.control_socket(), command, kind)
        if not reply.success:
            raise UpstreamInvalid(should_retry=False)
        return reply

    async def _page(self, query: wire.ListQuery) -> list[wire.AgentRow]:
        return (await self.ask(wire.ListAgents(request_id=new_request_id(), query=query), wire.AgentsReply)).agents

    def _slot_of(self, thread: str) -> _Slot:
        return self._slots[hashlib.blake2s(thread.encode()).digest()[0] % SOCKETS]

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
                self.metrics.breaker_open.set(self._breaker.refuses)
            return slot.socket

    async def _connect(self, most_bytes: int = MOST_BYTES) -> Socket:
        limits = self.config.limits
        try:
            async with asyncio.timeout(limits.connect):
                ws = await self._session.ws_connect(
                    f"{self.config.url.rstrip('/')}/ws",
                    heartbeat=min(limits.silence / 1.5, LONGEST_HEARTBEAT),
                    max_msg_size=most_bytes,
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
