"""A gateway's chats over a scripted Letta and a real database, and people who chat."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from gateway.conversations.chats import Asker, ChatPolicy, Chats
from gateway.conversations.directory import Directory, Pinned
from gateway.conversations.metering import Payer
from gateway.conversations.tool_calls import WaitingCall, WaitingCalls
from gateway.conversations.turns import TurnPolicy, TurnRegistry
from gateway.letta.backend import always_ready
from gateway.letta.scripted import Script, ScriptedBackend, ScriptedTurn
from gateway.metrics import Metrics
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import Alone
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from gateway.translation.agent_events import AgentEvent, Batch, Stop, TextDelta, ToolCallDelta, Usage
from gateway.translation.agent_turn import AgentSaid, AgentTurn, Call, ClientTool, Instructed, Said, Text, UserSaid
from gateway.translation.ask import Ask
from gateway.translation.tools import NO_PARAMETERS
from tests.conversations.meters import RecordingMeter

TOOL = ClientTool("f", "", NO_PARAMETERS)


def payer_of(owner: str) -> Payer:
    return Payer(owner, "chat_completions")


def user(text: str) -> UserSaid:
    return UserSaid((Text(text),))


def agent(text: str) -> AgentSaid:
    return AgentSaid(text)


def called(*call_ids: str, text: str = "") -> AgentSaid:
    return AgentSaid(text, tuple(Call(call_id, "f", "{}") for call_id in call_ids))


def answers(text: str) -> Script:
    return Script(steps=([TextDelta(text)], [Stop("end_turn")], [Usage(1, 1)]))


def calls(*call_ids: str, name: str = "f") -> Script:
    made: Batch = [ToolCallDelta(call_id, name, "{}") for call_id in call_ids]
    return Script(steps=([*made], [Stop("requires_approval")], [Usage(1, 1)]))


class Letta(ScriptedBackend):
    """A Letta that fails the test where two turns of one thread overlap; ``shown`` are the turns' overlays."""

    @property
    def shown(self) -> list[str]:
        return [turn.sent.overlay for turn in self.turns]

    def turn(self, turn: AgentTurn) -> ScriptedTurn:
        for other in self.turns:
            if not other.closed:
                assert other.sent.thread != turn.thread, "two turns at once"
        return super().turn(turn)

    @property
    def kept(self) -> list[str]:
        """Return the conversations that were not deleted."""
        return [conversation for conversation in self.conversations if conversation not in self.deleted]


class Gateway:
    """One process; ``restarted`` makes another one on the same database and the same Letta."""

    def __init__(self, database: Database, policy: ChatPolicy, turns: TurnPolicy, letta: Letta) -> None:
        self.database = database
        self.policy = policy
        self.turns = turns
        self.letta = letta
        self.tasks = TaskSet()
        self.clients = TaskSet()
        self.meter = RecordingMeter()
        metrics = Metrics()
        locks = MemoryLocks(depth=lambda: turns.queue_depth, wait=turns.queue_wait, metrics=metrics)
        self.registry = TurnRegistry(letta, self.meter, turns, metrics, self.tasks, locks=locks)
        self.chats = Chats(self.registry, letta, database, policy, self.tasks, places=Alone())
        self.directory = Directory(database)
        self.calls = WaitingCalls(database)

    def restarted(self, **policy: Any) -> "Gateway":
        changed = ChatPolicy(**{name: getattr(self.policy, name) for name in ChatPolicy.__struct_fields__} | policy)
        return Gateway(self.database, changed, self.turns, self.letta)

    async def ask(
        self,
        *transcript: Said,
        owner: str = "anna",
        client: str = "client",
        agent_id: str = "agent-1",
        chat: str | None = None,
        is_background: bool = False,
        **fields: Any,
    ) -> list[AgentEvent]:
        """Take a whole turn, see all of it written down, and return what was heard."""
        asker = Asker(payer_of(owner), client, agent_id, chat, is_background)
        try:
            return await self.talk(asker, Ask(model="friend", transcript=transcript, **fields))
        finally:
            await self.settled()

    async def ask_beside(self, *transcript: Said, owner: str = "anna", chat: str | None = None) -> list[AgentEvent]:
        """Take a whole turn while others go on."""
        return await self.talk(
            Asker(payer_of(owner), "client", "agent-1", chat), Ask(model="friend", transcript=transcript)
        )

    async def talk(self, asker: Asker, ask: Ask) -> list[AgentEvent]:
        events: list[AgentEvent] = []

        def take(batch: Batch) -> bool:
            events.extend(batch)
            return True

        async with self.chats.turn(asker, ask) as turn:
            await turn.deliver(take, always_ready)
        return events

    async def start(self, *transcript: Said, **fields: Any) -> "asyncio.Task[list[AgentEvent]]":
        """Let somebody ask, and see Letta asked."""
        before = len(self.letta.turns)
        task = self.clients.spawn(self.ask(*transcript, **fields), "client")
        async with asyncio.timeout(5):
            while len(self.letta.turns) == before and not task.done():  # noqa: ASYNC110 - Letta has no event for it
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        return task

    async def settled(self) -> None:
        """Wait until nothing is left to be done."""
        async with asyncio.timeout(5):
            await self.registry.idle()
            while len(self.tasks):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)

    @property
    def sent(self) -> AgentTurn:
        """Return the newest turn, without the name that the ledger gave it."""
        return msgspec.structs.replace(self.letta.turns[-1].sent, mark=None)

    async def waiting(self, *call_ids: str) -> list[WaitingCall]:
        return await self.calls.find(call_ids)

    async def pinned(self, chat: str, owner: str = "anna", agent_id: str = "agent-1") -> Pinned | None:
        return await Directory(self.database).find(owner, agent_id, chat)

    def assert_empty(self) -> None:
        """Fail where anything is left of any turn."""
        assert self.registry.held == 0
        assert len(self.tasks) == 0
        assert all(turn.closed for turn in self.letta.turns)
        self.meter.assert_settled()


async def leave(task: "asyncio.Task[list[AgentEvent]]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def instructed(turn: AgentTurn) -> list[str]:
    """Return what a turn says in the name of the client's developer."""
    return [said.text for said in turn.news if isinstance(said, Instructed)]


def later(seconds: float) -> float:
    return time.time() + seconds


@contextlib.asynccontextmanager
async def gateway_on(database: Database, turns: TurnPolicy | None = None, **policy: Any) -> AsyncIterator[Gateway]:
    """Open a gateway, and see that nothing is left of any turn."""
    made = Gateway(database, ChatPolicy(**policy), turns or TurnPolicy(), Letta())
    yield made
    await made.settled()
    made.assert_empty()
