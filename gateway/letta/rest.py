"""Letta's REST API: the V1 server and Letta Cloud.

letta-client speaks to the control plane, its answers decoded here to the few fields that are used; what every turn may
ask is asked by aiohttp (``lookups.py``), and the token stream is read by it (``rest_turn.py``): typed streaming by the
client costs six times the CPU per event.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Final, Literal, TypeVar

import aiohttp
import httpx
import letta_client
import msgspec
from letta_client import Omit, omit
from letta_client.types.agents import MessageType

from gateway import sockets
from gateway.errors import AgentGone, ConversationGone, GatewayError, UpstreamInvalid, UpstreamRejected
from gateway.letta import upstream_errors
from gateway.letta.backend import Agent, AgentDetails, AgentSpec, Capabilities, MemoryBlock, SentTurn
from gateway.letta.breaker import Breaker, RetryBudget
from gateway.letta.deadlines import Limits
from gateway.letta.lookups import Lookups
from gateway.letta.rest_agents import LettaAgents
from gateway.letta.rest_ask import Raw, anything
from gateway.letta.rest_bridge import Bridge
from gateway.letta.rest_memory import LettaMemory
from gateway.letta.rest_prompts import Prompts
from gateway.letta.rest_returns import decode_messages, waiting_calls
from gateway.letta.rest_runs import Runs
from gateway.letta.rest_turn import RestTurn
from gateway.letta.wire import (
    OWN_THREAD,
    AgentProfile,
    AgentRow,
    decode_agent,
    decode_agents,
    decode_conversation,
    decode_health,
    decode_profile,
)
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn

T = TypeVar("T")

PAGE: Final = 100
MOST_PAGES: Final = 1_000
IDLE_CONNECTION: Final = 3.0
"""Seconds a connection is kept for reuse: less than uvicorn's five, or a turn meets a connection just being closed."""
CONTROL_TIMEOUT: Final = 15.0
CONTROL_BODY: Final = 4_194_304
"""Bytes of one answer of the control plane: a page of agents is 660 KB."""
PING_TIMEOUT: Final = 3.0
PROFILE_TTL: Final = 30.0
"""Seconds for which an agent is taken to have the tools it had."""
FIRST_WITH_CLIENT_TOOLS: Final = (0, 16, 2)
"""The version of Letta that first knows ``client_tools``; older ones let them fall."""
FIRST_WITH_OVERRIDES: Final = (0, 16, 7)
"""The version of Letta that first knows ``override_system``; older ones let it fall."""
MOST_PROFILES: Final = 1_000
MODEL_TTL: Final = 60.0
"""Seconds for which an agent is taken to answer with the model it had."""
MOST_MODELS: Final = 10_000
CALL_MESSAGES: Final[list[MessageType]] = [
    "approval_request_message",
    "approval_response_message",
    "tool_return_message",
]
"""The kinds of messages that tell which calls wait."""
LATEST_CALLS: Final = 20
"""Messages about calls in which the ones that wait are looked for: they are among the newest three."""
_is_id: Final = re.compile(r"agent-[A-Za-z0-9_-]{1,100}").fullmatch
"""What may be an agent's id; a slash in it, however encoded, is a path of its own to Letta."""


class RestConfig(msgspec.Struct, frozen=True):
    """Where Letta is and how to speak to it; ``project`` is the slug that goes out as ``X-Project``.

    ``client_tools`` is how agents get the client's tools: as Letta has it, by the bridge, or by what the agent can.
    """

    base_url: str
    api_key: str | None = None
    project: str | None = None
    limits: Limits = Limits()
    client_tools: Literal["auto", "native", "bridge"] = "auto"


class RestBackend:
    """An ``AgentBackend`` for V1 servers and Letta Cloud; ``close`` frees its connections."""

    def __init__(self, config: RestConfig, metrics: Metrics, tasks: TaskSet) -> None:
        self.config = config
        self.metrics = metrics
        self.tasks = tasks
        self.budget = RetryBudget()
        trust = _trust()
        self.session = _stream_session(config, trust)
        self._breaker = Breaker()
        self._lookups = Lookups(self.session)
        self._profiles: dict[str, tuple[float, AgentProfile]] = {}
        self._models: dict[str, tuple[float, str | None]] = {}
        self._control = _control_plane(config, trust)
        self._version: tuple[int, ...] | None = None
        self.bridge = Bridge(self._control, self._ask)
        self._agents = LettaAgents(self._control, self._ask)
        self.prompts = Prompts(self._control, self._ask, tasks)
        self._memory = LettaMemory(self._control, self._ask, self.prompts)
        self.runs = Runs(self._control, self._ask)

    async def close(self) -> None:
        """Close all connections."""
        await self.session.close()
        await self._control.close()

    async def agents(self) -> list[Agent]:
        """Return every agent, page by page."""
        return await self._all_agents()

    async def find_tagged(self, tag: str) -> list[Agent]:
        """Return the agents that have this tag, page by page."""
        return await self._all_agents(tag)

    async def _all_agents(self, *tags: str) -> list[Agent]:
        agents: dict[str, Agent] = {}
        after: str | Omit = omit
        for _ in range(MOST_PAGES):
            page = await self._page(after=after, tags=tags)
            known = len(agents)
            agents.update((row.id, row.agent()) for row in page)
            # An agent deleted between two pages makes its cursor unknown, and Letta then starts from the top again.
            if len(page) < PAGE or len(agents) == known:
                return list(agents.values())
            after = page[-1].id
        raise UpstreamInvalid(should_retry=False)

    async def find_agents(self, name_or_id: str) -> list[Agent]:
        """Return the agents of exactly this name, and the one of this id."""
        rows = await self._named(name_or_id)
        found = [row.agent() for row in rows if row.name == name_or_id]
        if _is_id(name_or_id):
            with contextlib.suppress(AgentGone, UpstreamRejected):
                question = self._lookups.agent(name_or_id, (("include", "agent.tags"),), CONTROL_TIMEOUT)
                row = await self._look_up(question, decode_agent)
                found.append(row.agent())
                rows.append(row)
        self._note_models(rows)
        return found

    async def model(self, agent_id: str) -> str | None:
        """Return the handle of the model that an agent answers with, as it was within the last minute."""
        until, model = self._models.get(agent_id, (0.0, None))
        if asyncio.get_running_loop().time() < until:
            return model
        return (await self.details(agent_id)).model

    def turn(self, turn: AgentTurn) -> RestTurn:
        """Return a turn that is yet to be opened."""
        return RestTurn(self, turn)

    @property
    def capabilities(self) -> Capabilities:
        """Tell what V1 and Cloud can do."""
        return Capabilities(providers=True)

    @property
    def parked(self) -> int:
        """Return none: on these servers turns wait there, whichever process goes on with them."""
        return 0

    async def new_conversation(self, agent_id: str) -> str:
        """Make a conversation of an agent's and return its id."""
        return (await self._ask(self._create_conversation(agent_id), decode_conversation)).id

    async def delete_conversation(self, conversation_id: str) -> None:
        """Delete a conversation, as Letta does it: nobody sees it any more."""
        with contextlib.suppress(AgentGone):
            await self._ask(self._delete_conversation(conversation_id), anything)

    async def create_agent(self, spec: AgentSpec) -> Agent:
        """Make an agent of the present type, with no tools but those named."""
        return await self._agents.create(spec)

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        """Have an agent that is there be answered for as this one would be."""
        await self._agents.set_provider(agent_id, spec)

    async def delete_agent(self, agent_id: str) -> None:
        """Delete an agent with its memory and conversations."""
        await self._agents.delete(agent_id)

    async def delete_provider(self, name: str) -> None:
        """Delete a model provider with its key."""
        await self._agents.delete_provider(name)

    async def memory(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return an agent's memory blocks, without the gateway's own."""
        return await self._memory.blocks(agent_id)

    async def write_memory(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace the text of a memory block."""
        return await self._memory.write(agent_id, label, value)

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Stop the run that a turn began, and return what it took."""
        return await self.runs.spent(turn)

    async def details(self, agent_id: str) -> AgentDetails:
        """Return what an agent is, as it is now."""
        self._profiles.pop(agent_id, None)
        return (await self.profile(agent_id)).details()

    async def profile(self, agent_id: str) -> AgentProfile:
        """Return what an agent is, as it was lately."""
        now = asyncio.get_running_loop().time()
        known = self._profiles.get(agent_id)
        if known is not None and known[0] > now:
            return known[1]
        question = self._lookups.agent(agent_id, (("include", "agent.tools"),), CONTROL_TIMEOUT)
        profile = await self._look_up(question, decode_profile)
        if len(self._profiles) >= MOST_PROFILES:
            self._profiles.clear()
        self._profiles[agent_id] = (now + PROFILE_TTL, profile)
        return profile

    async def needs_bridge(self, profile: AgentProfile) -> bool:
        """Tell whether an agent takes tools of the client's by the bridge only."""
        if profile.is_legacy or self.config.client_tools == "bridge":
            return True  # a legacy agent lets a turn's tools fall without a word
        return self.config.client_tools == "auto" and not await self._is_since(FIRST_WITH_CLIENT_TOOLS)

    async def takes_overlays(self) -> bool:
        """Tell whether turns may have instructions of their own: beside the prompt, for one request alone."""
        return await self._is_since(FIRST_WITH_OVERRIDES)

    async def _is_since(self, version: tuple[int, ...]) -> bool:
        if self._version is None:
            try:
                health = await self._ask(self._health(), decode_health)
            except (AgentGone, UpstreamInvalid, UpstreamRejected):
                return True  # whoever tells no version is no old server
            self._version = _version(health.version)
        return self._version >= version

    async def clean_up(self) -> None:
        """Delete what a crash has left on Letta; once, when the gateway starts."""
        await self.bridge.clean_up()

    async def waiting_calls(self, agent_id: str, conversation_id: str | None) -> tuple[str, ...]:
        """Return the calls that wait for their results in a conversation, or on the agent's own thread."""
        try:
            rows = await self._ask(self._list_calls(agent_id, conversation_id), decode_messages)
        except AgentGone as error:
            if conversation_id is None:
                raise
            raise ConversationGone(should_retry=False) from error
        return waiting_calls(rows)

    async def ping(self) -> None:
        """Ask ``/v1/health/``, past the breaker: readiness wants to know what is, not what was."""
        answered = False
        try:
            body = await _body(self._control.with_raw_response.health(timeout=PING_TIMEOUT), PING_TIMEOUT)
            _decoded(body, decode_health)
            answered = True
        finally:
            self._breaker.pinged(answered=answered)
            self.metrics.breaker_open.set(self._breaker.refuses)

    async def cancel_run(self, agent_id: str, run_id: str) -> None:
        """Cancel one run of an agent, and no other; past the breaker, as it frees what is already held."""
        cancelled = self._control.agents.messages.with_raw_response.cancel(agent_id, run_ids=[run_id])
        await _body(cancelled, CONTROL_TIMEOUT)

    def check(self) -> None:
        """Raise while the breaker is open."""
        self._breaker.check()

    def observe(self, status: int | None) -> None:
        """Tell the breaker of an answer by its status, or of none."""
        if status is None or status in upstream_errors.STRUGGLING:
            self._breaker.failed()
        else:
            self._breaker.succeeded()
        self.metrics.breaker_open.set(self._breaker.refuses)

    def _note_models(self, rows: Iterable[AgentRow]) -> None:
        until = asyncio.get_running_loop().time() + MODEL_TTL
        if len(self._models) >= MOST_MODELS:
            self._models.clear()
        self._models.update((row.id, (until, row.model)) for row in rows)

    async def _named(self, name: str) -> list[AgentRow]:
        query = [
            ("include", "agent.tags"),
            ("limit", str(PAGE)),
            ("name", name),
            ("order", "asc"),
            ("order_by", "created_at"),
        ]
        with _listing():
            return await self._look_up(self._lookups.agents(query, CONTROL_TIMEOUT), decode_agents)

    async def _page(self, *, after: str | Omit = omit, tags: Sequence[str] = ()) -> list[AgentRow]:
        with _listing():
            return await self._ask(self._list_page(after, tags), decode_agents)

    async def _list_page(self, after: str | Omit, tags: Sequence[str]) -> Raw:
        return await self._control.agents.with_raw_response.list(
            after=after,
            tags=list(tags) or omit,
            include=["agent.tags"],
            limit=PAGE,
            order="asc",
            order_by="created_at",
        )

    async def _health(self) -> Raw:
        return await self._control.with_raw_response.health()

    async def _create_conversation(self, agent_id: str) -> Raw:
        return await self._control.conversations.with_raw_response.create(agent_id=agent_id)

    async def _delete_conversation(self, conversation_id: str) -> Raw:
        return await self._control.conversations.with_raw_response.delete(conversation_id)

    async def _list_calls(self, agent_id: str, conversation_id: str | None) -> Raw:
        if conversation_id is None:
            return await self._control.agents.messages.with_raw_response.list(
                agent_id,
                conversation_id=OWN_THREAD,
                limit=LATEST_CALLS,
                order="desc",
                include_return_message_types=CALL_MESSAGES,
            )
        return await self._control.conversations.messages.with_raw_response.list(
            conversation_id, limit=LATEST_CALLS, order="desc", include_return_message_types=CALL_MESSAGES
        )

    async def _ask(self, question: Coroutine[object, object, Raw], decode: Callable[[bytes], T]) -> T:
        """Ask by letta-client, through the breaker."""
        try:
            return await self._look_up(_body(question, CONTROL_TIMEOUT), decode)
        finally:
            question.close()

    async def _look_up(self, question: Coroutine[object, object, bytes], decode: Callable[[bytes], T]) -> T:
        """Ask through the breaker."""
        try:
            self._breaker.check()
        except GatewayError:
            question.close()
            raise
        try:
            body = await question
        except GatewayError as error:
            self.observe(upstream_errors.status_of(error))
            raise
        self.observe(200)
        return _decoded(body, decode)


@contextlib.contextmanager
def _listing() -> Iterator[None]:
    try:
        yield
    except (AgentGone, UpstreamRejected) as error:
        raise UpstreamInvalid(should_retry=False) from error  # no listing: whatever answers there is no Letta


async def _body(question: Awaitable[Raw], within: float) -> bytes:
    try:
        async with asyncio.timeout(within):  # httpx counts its own from one byte to the next
            response = await question
            return await response.read()
    except letta_client.LettaError as error:
        raise upstream_errors.control_plane(error) from error
    except TimeoutError as error:
        raise upstream_errors.too_slow() from error


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _decoded(body: bytes, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamInvalid(should_retry=False) from error


class _BoundedBody(httpx.AsyncByteStream):
    """The body of an answer, as long as it stays in bounds: the client reads it whole."""

    def __init__(self, body: httpx.AsyncByteStream) -> None:
        self._body: httpx.AsyncByteStream | None = body
        self._room = CONTROL_BODY

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert self._body is not None  # noqa: S101 - it is read before it is closed
        async for piece in self._body:
            self._room -= len(piece)
            if self._room < 0:
                raise httpx.DecodingError("the answer is too long")
            yield piece

    async def aclose(self) -> None:
        body, self._body = self._body, None  # httpx's holds the answer, which holds this
        if body is not None:
            await body.aclose()


async def _bound(response: httpx.Response) -> None:
    assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101 - what an asynchronous client gives
    response.stream = _BoundedBody(response.stream)


def _trust() -> ssl.SSLContext:
    """Return what both clients trust: the machine's own authorities (``SSL_CERT_FILE`` included), as curl does."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _control_plane(config: RestConfig, trust: ssl.SSLContext) -> letta_client.AsyncLetta:
    """Return letta-client as the settings say: by itself it takes a key and headers from the environment too.

    Its version header makes Letta leave tools, blocks and sources out of a listing: a third of the size (0.16.8).
    """
    client = letta_client.AsyncLetta(
        base_url=config.base_url,
        api_key=config.api_key,
        project=config.project,
        max_retries=0,
        timeout=httpx.Timeout(CONTROL_TIMEOUT, connect=config.limits.connect),
        http_client=letta_client.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=False, verify=trust, event_hooks={"response": [_bound]}
        ),
    )
    client.api_key = config.api_key
    client._custom_headers = {"Accept-Encoding": "identity"}  # noqa: SLF001 - LETTA_CUSTOM_HEADERS: nothing public keeps them out
    return client


def _stream_session(config: RestConfig, trust: ssl.SSLContext) -> aiohttp.ClientSession:
    """Return the session of the token streams: no pool limit, no total timeout, bounded buffers."""
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Content-Type": "application/json"}
    if config.api_key:
        headers["Authorization"] = f"Bearer {config.api_key}"
    if config.project:
        headers["X-Project"] = config.project
    return aiohttp.ClientSession(
        base_url=config.base_url.rstrip("/") + "/",
        headers=headers,
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=IDLE_CONNECTION, socket_factory=sockets.receiving, ssl=trust
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.limits.connect, ceil_threshold=5),
        read_bufsize=sockets.READ_BUFFER,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
