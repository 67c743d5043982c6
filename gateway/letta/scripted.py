"""A backend that plays scripts instead of speaking to Letta: for tests, and for trying the gateway without a server.

A ``Script`` says what one turn does: what happens while it is opened, the batches and pauses of its stream, how it is
settled. ``ScriptedBackend`` plays them in order and records what was asked of it::

    backend = ScriptedBackend([Agent("agent-1", "friend", 0)])
    backend.play(says("Hel", "lo"))
    backend.play(Script(opening=(Break(ConversationBusy()), Pause(0.1)), steps=([TextDelta("Hi")], Hang())))
    ...
    assert backend.turns[0].sent.news == (UserSaid((Text("Hello?"),)),)
    assert backend.turns[1].cancelled
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Final, TypeAlias

import msgspec

from gateway.errors import AgentGone, GatewayError, InvalidRequest, MemoryNotFound
from gateway.letta.backend import (
    Agent,
    AgentDetails,
    AgentSpec,
    Capabilities,
    MemoryBlock,
    ModelProvider,
    Ready,
    SentTurn,
    Take,
    always_ready,
)
from gateway.letta.event_stream import EventStream
from gateway.letta.frames import DONE, FrameDecoder
from gateway.translation.agent_events import Batch, Failure, Stop, StopReason, TextDelta, Usage
from gateway.translation.agent_turn import AgentTurn


class Pause(msgspec.Struct, frozen=True):
    """Nothing happens for so many seconds."""

    seconds: float


class Hold(msgspec.Struct, frozen=True):
    """Nothing happens until the test sets the event."""

    gate: asyncio.Event


class Hang(msgspec.Struct, frozen=True):
    """Nothing happens any more."""


class Break(msgspec.Struct, frozen=True):
    """Raise this error; what is asked next goes on with the step after it."""

    error: GatewayError


Wait: TypeAlias = Pause | Hold | Hang
Step: TypeAlias = Batch | Wait | Break


class Script(msgspec.Struct, frozen=True):
    """What one turn does.

    ``steps`` is its stream, which ends where they end: with no ``Stop`` or ``Failure`` among them, it is a stream that
    was cut off. ``opening`` happens in ``open`` (a ``Break`` refuses the turn: the next ``open`` goes on after it),
    ``settling`` in ``cancel``. ``counted`` is what Letta says that the turn took where that was not heard to its end:
    what was heard of it, unless told otherwise.
    """

    steps: tuple[Step, ...] = ()
    opening: tuple[Wait | Break, ...] = ()
    settling: tuple[Wait | Break, ...] = ()
    counted: Usage | Break | None = None


def says(*texts: str, stop: StopReason = "end_turn", usage: Usage | None = None) -> Script:
    """Script a turn that says these texts, one batch each, and ends well, as Letta does: stop reason, then usage."""
    said: list[Batch] = [[TextDelta(text)] for text in texts]
    return Script(steps=(*said, [Stop(stop), usage or Usage(100, 20)]))


def recorded(stream: bytes) -> Script:
    """Script the turn of a recorded stream's bytes, one batch per frame."""
    frames = FrameDecoder()
    batches: list[Batch] = []
    for payload in EventStream().feed(stream):
        batches.append([])
        if payload != DONE:
            frames.decode(payload, batches[-1])
    return Script(steps=tuple(batch for batch in (*batches, frames.end()) if batch))


USUAL: Final = says("Hello", ", ", "world", "!")
"""What a turn does that nobody wrote a script for."""


class ScriptedTurn:
    """A ``RunningTurn`` that plays its script and remembers what was asked of it.

    ``opened`` counts the calls of ``open``; ``taken`` tells whether one of them ended well; ``heard`` counts the
    batches that were taken from the stream; ``aborted`` is the error it was aborted with.
    """

    def __init__(self, sent: AgentTurn, script: Script) -> None:
        self.sent = sent
        self.opened = 0
        self.taken = False
        self.heard = 0
        self.aborted: GatewayError | None = None
        self.cancelled = False
        self.drained = False
        self.closed = False
        self._opening: deque[Step] = deque(script.opening)
        self._steps: deque[Step] = deque(script.steps)
        self._counted = script.counted
        self._used: Usage | None = None
        self._settling: deque[Step] = deque(script.settling)
        self._waiting: asyncio.Timeout | None = None
        self._delivered = False
        self._over = False

    @property
    def ended(self) -> bool:
        """Tell whether the script is done with the turn, or never took it."""
        return self._over or not self._delivered

    async def open(self) -> None:
        """Play the opening; when that is left by a cancellation, the turn counts as delivered: Letta may have it."""
        self.opened += 1
        self._delivered = True
        try:
            await self._play_opening()
        except GatewayError:
            self._delivered = False
            raise
        self.taken = True

    async def deliver(self, take: Take, ready: Ready) -> None:
        """Play the stream, from where it stands."""
        while self._steps:
            self._raise_abort()
            step = self._steps[0]
            if isinstance(step, list):
                self._steps.popleft()
                self._over = self._over or any(isinstance(event, Stop | Failure) for event in step)
                self._count(step)
                self.heard += 1
                if not take(step):
                    await ready()
            else:
                await self._next(self._steps)
        self._raise_abort()

    def abort(self, error: GatewayError) -> None:
        """End ``open`` or ``deliver`` with this error, at once."""
        if self.aborted is not None:
            return
        self.aborted = error
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def cancel(self) -> None:
        """Play the settling; then the run is over."""
        self.cancelled = True
        while self._settling:
            await _wait_or_break(self._settling)
        self._over = True

    async def drain(self) -> None:
        """Play the turn to its end, unheard."""
        self.drained = True
        await self._play_opening()
        await self.deliver(lambda _: True, always_ready)

    async def usage(self) -> Usage | None:
        """Return what was heard of it, or what the script says of a turn that was not heard to its end."""
        match self._counted:
            case Break(error=error) if self._steps:
                raise error
            case Usage() if self._steps:
                return self._counted
            case _:
                return self._used

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def _count(self, batch: Batch) -> None:
        for event in batch:
            if isinstance(event, Usage):
                self._used = event if self._used is None else self._used.plus(event)

    async def _play_opening(self) -> None:
        while self._opening:
            await self._next(self._opening)
        self._raise_abort()

    async def _next(self, steps: deque[Step]) -> None:
        """Take one step, or raise the error of an abort that comes meanwhile."""
        self._raise_abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as waiting:
                self._waiting = waiting
                try:
                    await _wait_or_break(steps)
                finally:
                    self._waiting = None
        self._raise_abort()

    def _raise_abort(self) -> None:
        if self.aborted is not None:
            raise self.aborted


class ScriptedBackend:
    """An ``AgentBackend`` whose agents and turns are scripted.

    ``listed`` are its agents: change them at will. ``down``, when set, is raised by whatever asks it something, and
    ``holding`` is waited for before each such answer. ``turns`` are those that were started, in order; ``listings``
    ``pings`` and ``cleanings`` count; ``searches`` are the names that were asked for; ``closed`` tells whether it was.
    ``conversations`` are those that were made, by id, with their agents, ``deleted`` those that were deleted, and
    ``can_overlay`` what ``takes_overlays`` tells. ``specs`` are what agents were made of, ``memories`` what they have
    in mind, both by their ids, ``providers`` what those were given that were there before, ``gone`` the agents that
    were deleted, and ``gone_providers`` the providers, by name. ``parked`` is how many turns wait for a client's tools,
    as far as anybody asks.
    ``spendings`` are what turns took that nobody heard, by their marks, and ``reconciled`` those that were asked for.
    """

    def __init__(self, agents: Iterable[Agent] = (), usual: Script = USUAL) -> None:
        self.listed = list(agents)
        self.usual = usual
        self.down: GatewayError | None = None
        self.holding: Wait | None = None
        self.turns: list[ScriptedTurn] = []
        self.listings = 0
        self.searches: list[str] = []
        self.pings = 0
        self.closed = False
        self.capabilities = Capabilities(providers=False)
        self.parked = 0
        self.conversations: dict[str, str] = {}
        self.deleted: list[str] = []
        self.cleanings = 0
        self.can_overlay = True
        self.specs: dict[str, AgentSpec] = {}
        self.memories: dict[str, dict[str, MemoryBlock]] = {}
        self.providers: dict[str, ModelProvider | None] = {}
        self.gone: list[str] = []
        self.gone_providers: list[str] = []
        self.spendings: dict[str, Usage] = {}
        self.reconciled: list[SentTurn] = []
        self._scripts: deque[Script] = deque()

    def play(self, *scripts: Script) -> None:
        """Let the next turns be these; after them, turns are the usual one again."""
        self._scripts.extend(scripts)

    async def agents(self) -> list[Agent]:
        """Return every agent."""
        self.listings += 1
        await self._answer()
        return list(self.listed)

    async def find_agents(self, name_or_id: str) -> list[Agent]:
        """Return the agents of exactly this name, and the one of this id."""
        self.searches.append(name_or_id)
        await self._answer()
        return [agent for agent in self.listed if name_or_id in (agent.name, agent.id)]

    def turn(self, turn: AgentTurn) -> ScriptedTurn:
        """Return the turn of the next script."""
        scripted = ScriptedTurn(turn, self._scripts.popleft() if self._scripts else self.usual)
        self.turns.append(scripted)
        return scripted

    async def new_conversation(self, agent_id: str) -> str:
        """Make a conversation, and note whose it is."""
        await self._answer()
        conversation_id = f"conv-{len(self.conversations) + 1}"
        self.conversations[conversation_id] = agent_id
        return conversation_id

    async def delete_conversation(self, conversation_id: str) -> None:
        """Note that it is gone."""
        await self._answer()
        self.deleted.append(conversation_id)

    async def details(self, agent_id: str) -> AgentDetails:
        """Return the same for every agent that is listed."""
        await self._answer()
        self._see_there(agent_id)
        return AgentDetails("An agent of a script.", "scripted/model", ("memory",))

    async def model(self, agent_id: str) -> str | None:
        """Return the handle of the model that an agent answers with."""
        return (await self.details(agent_id)).model

    async def find_tagged(self, tag: str) -> list[Agent]:
        """Return the agents that have this tag."""
        await self._answer()
        return [agent for agent in self.listed if tag in agent.tags]

    async def create_agent(self, spec: AgentSpec) -> Agent:
        """Make an agent, and note what of."""
        await self._answer()
        agent = Agent(f"agent-made-{len(self.specs) + 1}", spec.name, len(self.specs) + 1, spec.tags)
        self.specs[agent.id] = spec
        self.memories[agent.id] = {block.label: block for block in spec.blocks}
        self.listed.append(agent)
        return agent

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        """Note by what the agent is answered for."""
        await self._answer()
        self._see_there(agent_id)
        self.providers[agent_id] = spec.provider

    async def delete_agent(self, agent_id: str) -> None:
        """Delete an agent, and note it."""
        await self._answer()
        self.gone.append(agent_id)
        self.memories.pop(agent_id, None)
        self.listed = [agent for agent in self.listed if agent.id != agent_id]

    async def delete_provider(self, name: str) -> None:
        """Note that it is gone."""
        await self._answer()
        self.gone_providers.append(name)

    async def memory(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return what an agent has in mind."""
        await self._answer()
        self._see_there(agent_id)
        return tuple(block for _, block in sorted(self.memories.get(agent_id, {}).items()))

    async def write_memory(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace the text of a memory block, within its limit."""
        await self._answer()
        self._see_there(agent_id)
        blocks = self.memories.get(agent_id, {})
        if label not in blocks:
            raise MemoryNotFound
        limit = blocks[label].limit
        if limit is not None and len(value) > limit:
            raise InvalidRequest(f"This memory block takes at most {limit} characters.", param="value")
        blocks[label] = msgspec.structs.replace(blocks[label], value=value)
        return blocks[label]

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Return what a turn took: as it was told, or as it was heard."""
        self.reconciled.append(turn)
        await self._answer()
        heard = [played for played in self.turns if played.sent.mark == turn.mark]
        return self.spendings.get(turn.mark) or (await heard[0].usage() if heard else None)

    async def takes_overlays(self) -> bool:
        """Tell what was set."""
        await self._answer()
        return self.can_overlay

    async def clean_up(self) -> None:
        """Note it."""
        self.cleanings += 1

    async def ping(self) -> None:
        """Answer, or raise what is ``down``."""
        self.pings += 1
        await self._answer()

    async def close(self) -> None:
        """Note it."""
        self.closed = True

    def _see_there(self, agent_id: str) -> None:
        if all(agent.id != agent_id for agent in self.listed):
            raise AgentGone(should_retry=False)

    async def _answer(self) -> None:
        if self.holding is not None:
            await _wait_or_break(deque([self.holding]))
        if self.down is not None:
            raise self.down


async def _wait_or_break(steps: deque[Step]) -> None:
    """Take one step; a wait that is left early is still ahead."""
    match steps[0]:
        case Break(error=error):
            steps.popleft()
            raise error
        case Pause(seconds=seconds):
            await asyncio.sleep(seconds)
        case Hold(gate=gate):
            await gate.wait()
        case _:
            await asyncio.Event().wait()
    steps.popleft()
