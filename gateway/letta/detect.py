"""Which kind of Letta answers at a URL: the App Server or the V1 server, found out when it is first needed.

``GET /app-server-info`` answers JSON on the App Server, ``GET /v1/health/`` on V1 and Letta Cloud (letta 0.34.12 and
0.16.8). A server that is down at the start is asked again later; once one has answered, it stays what it was.
"""

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Final, Literal, TypeAlias

import aiohttp
import msgspec
import structlog

from gateway.errors import BackendError, UpstreamAuthFailed, UpstreamInvalid, UpstreamUnavailable
from gateway.letta import upstream_errors
from gateway.letta.backend import (
    Agent,
    AgentBackend,
    AgentDetails,
    AgentSpec,
    Capabilities,
    MemoryBlock,
    RunningTurn,
    SentTurn,
)
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn

Kind: TypeAlias = Literal["rest", "app_server"]

TIMEOUT: Final = 5.0
MOST_BYTES: Final = 65_536

_log: Final = structlog.get_logger("gateway.letta")


class _ServerInfo(msgspec.Struct):
    """What of ``/app-server-info`` tells the App Server from anything else that answers JSON."""

    letta_code_version: str


class _Health(msgspec.Struct):
    """What ``/v1/health/`` says."""

    version: str
    status: str


async def kind_at(url: str, api_key: str | None, connect_timeout: float) -> Kind:
    """Return the kind of the server at an http URL; raises ``BackendError`` where none of them answers."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout)
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context())
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        try:
            async with asyncio.timeout(TIMEOUT):
                return await _kind(session, url.rstrip("/"))
        except upstream_errors.FOREIGN as error:
            raise upstream_errors.before_answer(error) from error


async def _kind(session: aiohttp.ClientSession, url: str) -> Kind:
    status, body = await _get(session, f"{url}/app-server-info")
    if status == 200 and _is(_ServerInfo, body):  # noqa: PLR2004
        return "app_server"
    health, body = await _get(session, f"{url}/v1/health/")
    if health == 200 and _is(_Health, body):  # noqa: PLR2004
        return "rest"
    raise _neither({status, health})


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    async with session.get(url, allow_redirects=False) as response:
        return response.status, await response.content.read(MOST_BYTES)


def _is(kind: type[msgspec.Struct], body: bytes) -> bool:
    try:
        msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _neither(statuses: set[int]) -> BackendError:
    if statuses & {401, 403}:
        return UpstreamAuthFailed(should_retry=False)
    if statuses & upstream_errors.PASSING:
        return UpstreamUnavailable(retry_after=upstream_errors.DEFAULT_RETRY_AFTER, should_retry=True)
    return UpstreamInvalid(
        "What answers at LETTA_BASE_URL is no Letta server. The operator should check that setting.",
        should_retry=False,
    )


class DetectedBackend:
    """An ``AgentBackend`` that becomes one of two when it is first asked something."""

    def __init__(
        self, find: Callable[[], Coroutine[None, None, Kind]], make: Callable[[Kind], AgentBackend], tasks: TaskSet
    ) -> None:
        self._tasks = tasks
        self._find = find
        self._make = make
        self._found: AgentBackend | None = None
        self._finding: asyncio.Task[Kind] | None = None

    async def agents(self) -> list[Agent]:
        """Return every agent."""
        return await (await self._backend()).agents()

    async def find_agents(self, name_or_id: str) -> list[Agent]:
        """Return the agents of exactly this name, and the one of this id."""
        return await (await self._backend()).find_agents(name_or_id)

    def turn(self, turn: AgentTurn) -> RunningTurn:
        """Return a turn that is yet to be opened: its agent was found by this backend, so the server is known."""
        if self._found is None:
            raise UpstreamUnavailable(retry_after=upstream_errors.DEFAULT_RETRY_AFTER, should_retry=True)
        return self._found.turn(turn)

    @property
    def capabilities(self) -> Capabilities:
        """Tell what the server can do: nothing, before it is known which it is."""
        return Capabilities(providers=False) if self._found is None else self._found.capabilities

    @property
    def parked(self) -> int:
        """Return how many turns wait in this process for results of the client's tools."""
        return 0 if self._found is None else self._found.parked

    async def new_conversation(self, agent_id: str) -> str:
        """Make a conversation of an agent's and return its id."""
        return await (await self._backend()).new_conversation(agent_id)

    async def delete_conversation(self, conversation_id: str) -> None:
        """Delete a conversation."""
        await (await self._backend()).delete_conversation(conversation_id)

    async def details(self, agent_id: str) -> AgentDetails:
        """Return what an agent is."""
        return await (await self._backend()).details(agent_id)

    async def model(self, agent_id: str) -> str | None:
        """Return the handle of the model that an agent answers with."""
        return await (await self._backend()).model(agent_id)

    async def find_tagged(self, tag: str) -> list[Agent]:
        """Return the agents that have this tag."""
        return await (await self._backend()).find_tagged(tag)

    async def create_agent(self, spec: AgentSpec) -> Agent:
        """Make an agent."""
        return await (await self._backend()).create_agent(spec)

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        """Have an agent that is there be answered for as this one would be."""
        await (await self._backend()).set_provider(agent_id, spec)

    async def delete_agent(self, agent_id: str) -> None:
        """Delete an agent."""
        await (await self._backend()).delete_agent(agent_id)

    async def delete_provider(self, name: str) -> None:
        """Have the server forget a model provider."""
        await (await self._backend()).delete_provider(name)

    async def memory(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return an agent's memory."""
        return await (await self._backend()).memory(agent_id)

    async def write_memory(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace the text of a memory block."""
        return await (await self._backend()).write_memory(agent_id, label, value)

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Stop a turn that another process began, and return what it took."""
        return await (await self._backend()).spent(turn)

    async def takes_overlays(self) -> bool:
        """Tell whether turns may have instructions of their own."""
        return await (await self._backend()).takes_overlays()

    async def clean_up(self) -> None:
        """Remove what a gateway that was killed left on the server."""
        await (await self._backend()).clean_up()

    async def ping(self) -> None:
        """Ask whether the server answers."""
        await (await self._backend()).ping()

    async def close(self) -> None:
        """Close what was opened."""
        if self._found is not None:
            await self._found.close()

    async def _backend(self) -> AgentBackend:
        # One search serves all who ask while it is under way; it outlives the one who asked first.
        while self._found is None:
            if self._finding is None or self._finding.done():
                self._finding = self._tasks.spawn(self._find(), "find letta")
            kind = await asyncio.shield(self._finding)
            if self._found is None:
                self._found = self._make(kind)
                _log.debug("letta found", kind=kind)
        return self._found
