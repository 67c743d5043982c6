"""The ledger: each turn is written down before it is sent, and settled once, by whoever comes first.

What a crash leaves running is settled by the next gateway that finds it, with what Letta says that it took.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, TypeAlias

import msgspec
import structlog
from sqlalchemy import Connection

from gateway.accounts import bookkeeping
from gateway.accounts.agent_models import AgentModels
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.bookkeeping import Begun, Refusal, Settled, Status
from gateway.accounts.instances import BEAT, Instances
from gateway.accounts.orphans import Orphan, Orphans
from gateway.accounts.profiles import Budget
from gateway.accounts.settling import Over, Settling
from gateway.errors import BudgetExceeded, BudgetHeld, GatewayError
from gateway.letta.backend import AgentBackend
from gateway.storage.engine import Database
from gateway.storage.group_commit import GroupCommit
from gateway.storage.text import check_fit
from gateway.tasks import TaskSet
from gateway.translation.agent_events import Usage
from gateway.translation.agent_turn import AgentTurn

RECONCILE: Final = 30.0
"""Seconds between two looks for turns that nobody is going to settle."""
END: Final = 5.0
"""Seconds to write what is not written yet when the gateway goes away."""
WRITTEN: Final = 1.0
"""Seconds for which the end of an answer waits until its turn is settled: a database that hangs holds up no answer."""
STORED: Final = 10.0
"""Seconds after its start within which Letta may not have stored a turn yet, though it works on it."""
_ASK_AT_ONCE: Final = 8
"""Turns for which Letta is asked at the same time."""

_log: Final = structlog.get_logger("gateway.ledger")

_Entry: TypeAlias = Begun | Settled


class Payer(Protocol):
    """Who a turn is for, as whoever opens turns tells it."""

    @property
    def owner(self) -> str:
        """Name the owner."""
        ...

    @property
    def source(self) -> str:
        """Name the API by which it came."""
        ...

    @property
    def key_id(self) -> str | None:
        """Name the personal key by which it came."""
        ...


class Backlog(msgspec.Struct, frozen=True):
    """How many turns are over and not settled, and for how many seconds the oldest of them."""

    turns: int
    seconds: float


class Ledger:
    """The turns of one gateway, and what others left running: the ``Meter`` of whoever opens turns."""

    def __init__(
        self,
        database: Database,
        billing: Billing,
        backend: AgentBackend,
        tasks: TaskSet,
        instances: Instances,
        *,
        default_budget: Budget | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._billing = billing
        self._tasks = tasks
        self._instances = instances
        self._default_budget = default_budget
        self._now = now
        self._commits: GroupCommit[_Entry, Refusal | None] = GroupCommit(database, tasks, self._write)
        self._database = database
        self._settling = Settling(
            self._commits.submit, AgentModels(backend, tasks), billing, tasks, usual_prompt=self._usual_prompt
        )
        self._orphans = Orphans(database, backend, instances)
        self._open: dict[str, str] = {}
        """The agents of turns that are under way."""
        self._orphaned: dict[str, float] = {}
        """What the latest look found and left for the next, each with when it was first found."""
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Give a first sign of life, and reconcile from now on; raises ``StorageUnavailable``."""
        await self._instances.beat()
        self._loops = [
            self._tasks.spawn(_every(BEAT, self._instances.beat), "sign of life"),
            self._tasks.spawn(_every(RECONCILE, self._look_around), "reconcile the ledger"),
        ]

    async def end(self) -> None:
        """Write what is not written yet: to be called once no turn is held, while the database is still open."""
        for loop in self._loops:
            loop.cancel()
        await self._settling.end(END)
        try:
            await self._instances.leave()
        except GatewayError as error:
            _log.warning("gateway not signed off", code=error.code)

    async def open(self, payer: Payer, turn: AgentTurn) -> str:
        """Write down a turn that is about to be sent, and return its name in the ledger.

        Raises ``BudgetExceeded``, ``BudgetHeld`` and ``StorageUnavailable``: then it must not be sent.
        """
        await self._billing.admit(payer.owner)
        begun = self._begun(payer, turn)
        try:
            refusal = await self._commits.submit(begun)
        except BaseException:  # it may be written all the same
            self._settle_soon(Over(begun.id, begun.agent_id, None, "unsent", self._now()))
            raise
        if refusal is not None:
            raise BudgetHeld if refusal == "held" else BudgetExceeded
        self._open[begun.id] = begun.agent_id
        return begun.id

    async def close(self, turn_id: str, taken: Usage | None, outcome: Status, characters: int = 0) -> None:
        """Settle a turn; None where Letta keeps no count of it. Returns once that is written down, or will be."""
        agent_id = self._open.pop(turn_id, None)
        if agent_id is None:
            return
        is_cut = outcome == "interrupted" and (taken is not None or characters > 0)
        over = Over(turn_id, agent_id, taken, outcome, self._now(), characters if is_cut else None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WRITTEN):
                await asyncio.shield(self._settle_soon(over))

    def leave_open(self, turn_id: str) -> None:
        """Leave a turn for later: Letta could not be asked what it took."""
        if self._open.pop(turn_id, None) is not None:
            self._settling.forsaken.add(turn_id)

    def backlog(self) -> Backlog:
        """Return what waits: turns that are not written or priced yet, and those of which Letta says nothing yet."""
        now, oldest = self._now(), self._settling.oldest
        since = min([now if oldest is None else oldest, *self._orphaned.values()])
        return Backlog(len(self._settling) + len(self._orphaned), max(0.0, now - since))

    async def reconcile(self) -> None:
        """Settle what nobody else is going to, with what Letta says of it, as interrupted.

        A Letta that cannot be asked, or knows nothing of a turn just begun, leaves it for the next time. Raises
        ``StorageUnavailable``.
        """
        forsaken = frozenset(self._settling.forsaken)
        orphans = [orphan for orphan in await self._orphans.find(forsaken) if orphan.id not in self._settling]
        self._settling.forsaken -= forsaken - {orphan.id for orphan in orphans}
        now = self._now()
        self._orphaned = {orphan.id: self._orphaned.get(orphan.id, now) for orphan in orphans}
        for start in range(0, len(orphans), _ASK_AT_ONCE):
            some = orphans[start : start + _ASK_AT_ONCE]
            if not any(await asyncio.gather(*map(self._reconcile, some))):
                return

    async def _look_around(self) -> None:
        await self.reconcile()
        await self._instances.bury()

    async def _reconcile(self, orphan: Orphan) -> bool:
        """Settle an orphan, or leave it for later; False where it could not be asked for or written."""
        try:
            taken = await self._orphans.taken(orphan)
        except GatewayError as error:
            _log.debug("turn left for later", turn=orphan.id, code=error.code)
            return False
        if taken is None and abs(self._now() - orphan.started_at) < STORED:
            return True
        self._settling.forsaken.discard(orphan.id)
        self._orphaned.pop(orphan.id, None)
        return await self._settling.settle(Over(orphan.id, orphan.agent_id, taken, "interrupted", self._now()))

    async def _usual_prompt(self, turn_id: str) -> int | None:
        async with self._database.read() as connection:
            return (await connection.execute(bookkeeping.USUAL_PROMPT, {"turn_id": turn_id})).scalar_one_or_none()

    def _settle_soon(self, over: Over) -> "asyncio.Task[bool]":
        return self._tasks.spawn(self._settling.settle(over), "settle in the ledger")

    def _begun(self, payer: Payer, turn: AgentTurn) -> Begun:
        check_fit(payer.owner, payer.source, payer.key_id, turn.agent_id, turn.conversation_id)
        return Begun(
            id=str(uuid.uuid4()),
            owner=payer.owner,
            source=payer.source,
            agent_id=turn.agent_id,
            conversation_id=turn.conversation_id,
            key_id=payer.key_id,
            instance=self._instances.id,
            started_at=self._now(),
        )

    def _write(self, connection: Connection, entries: Sequence[_Entry]) -> list[Refusal | None]:
        """Write entries; a refusal for a turn whose owner's budget has no room."""
        begun = [entry for entry in entries if isinstance(entry, Begun)]
        settled = [entry for entry in entries if isinstance(entry, Settled)]
        bookkeeping.lock(connection, begun, settled)
        bookkeeping.settle(connection, settled)
        refused = bookkeeping.begin(connection, begun, self._default_budget)
        return [refused.get(entry.id) for entry in entries]


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except GatewayError as error:
            _log.debug("tried again later", code=error.code)
        await asyncio.sleep(seconds)
