"""The turn registry: every turn starts, ends, is cancelled and drained through it.

One turn at a time on each thread, as Letta interleaves overlapping ones; a bounded, first-come queue before that. What
a turn says is decided when its thread is its own. One that is left before its end is settled in the background, and its
thread stays taken until then.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from typing import Final, Literal, Protocol

import msgspec
import structlog

from gateway.conversations.metering import Meter, Payer, TurnOutcome
from gateway.errors import (
    AgentGone,
    ConversationBusy,
    GatewayError,
    Overloaded,
    ResponseCancelled,
    ShuttingDown,
    StorageUnavailable,
    ThreadLost,
)
from gateway.letta.backend import AgentBackend, RunningTurn
from gateway.metrics import Metrics
from gateway.shared_state.locks import Lease, ThreadLocks
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import AgentTurn

SETTLE: Final = 5.0
"""Seconds that aborted turns have to be settled when the gateway goes away."""
TELL: Final = 20.0
"""Seconds to write down how a turn went."""
STOP: Final = 15.0
"""Seconds that turns have to be settled which somebody else ends."""
MOST_RETIRED: Final = 10_000
"""Agents with which no turn begins any more."""
_STOPPED: Final = "This answer was ended: its agent or its account was reset, blocked or deleted."
BUSY_PAUSE: Final = 0.2
LONGEST_BUSY_PAUSE: Final = 2.0

_log: Final = structlog.get_logger("gateway.turns")


class TurnPolicy(msgspec.Struct, frozen=True):
    """How turns share an agent's thread, and what becomes of one whose client went away; waits are in seconds."""

    on_disconnect: Literal["cancel", "finish"] = "cancel"
    queue_depth: int = 8
    queue_wait: float = 30.0
    max_turns: int = 1_000


class TurnRules(Protocol):
    """A ``TurnPolicy`` that may change from one turn to the next."""

    @property
    def on_disconnect(self) -> Literal["cancel", "finish"]:
        """Tell what becomes of a turn whose client went away."""
        ...

    @property
    def queue_wait(self) -> float:
        """Return the seconds that a turn waits where Letta itself is busy with its thread."""
        ...

    @property
    def max_turns(self) -> int:
        """Return how many turns are held at once."""
        ...


class OpenTurn(msgspec.Struct, frozen=True):
    """A turn that is open, for the operator: ``source`` is the API that it came by, ``began_at`` in UTC seconds."""

    id: str
    agent_id: str
    owner: str
    source: str
    began_at: float


class TurnPlan(Protocol):
    """A turn that is to be: asked what it says once its thread is its own, and told how it went."""

    @property
    def thread(self) -> str:
        """Name what takes one turn at a time."""
        ...

    @property
    def payer(self) -> Payer:
        """Tell whom the turn is for."""
        ...

    @property
    def is_quiet(self) -> bool:
        """Tell that ``end`` has nothing to do."""
        ...

    async def begin(self, lease: Lease) -> AgentTurn:
        """Return what is said, on the thread that is its own now."""
        ...

    async def end(self, *, is_delivered: bool) -> None:
        """Write down how it went, while the thread is still held; ``is_delivered`` is False where surely not."""
        ...


class Place(msgspec.Struct, eq=False):
    """What a turn takes in the registry from before it waits until it is settled; ``running`` once it is to be sent."""

    owner: str
    agent_id: str | None = None
    running: RunningTurn | None = None
    stopped: GatewayError | None = None
    """What ends it, where somebody else does."""
    left: asyncio.Event | None = None
    """Set at the end of a turn that somebody waits for."""


class HeldTurn(msgspec.Struct):
    """A turn of the registry's: ``id`` is its name in the ledger, ``outcome`` how it goes as far as is known."""

    id: str
    place: Place
    running: RunningTurn
    plan: TurnPlan
    lease: Lease
    outcome: TurnOutcome = "interrupted"
    characters: int = 0
    """How much came of the answer, where whoever hears it counts that."""
    is_metered: bool = False
    """Whether the ledger has been told what it took."""


class TurnRegistry:
    """All turns of one gateway."""

    def __init__(
        self,
        backend: AgentBackend,
        meter: Meter,
        policy: TurnRules,
        metrics: Metrics,
        tasks: TaskSet,
        *,
        locks: ThreadLocks,
    ) -> None:
        self._backend = backend
        self._meter = meter
        self._policy = policy
        self._metrics = metrics
        self._tasks = tasks
        self._locks = locks
        self._open: dict[RunningTurn, OpenTurn] = {}
        self._places: set[Place] = set()
        self._retired: dict[str, None] = {}
        """Agents that are deleted, or about to be; those of longest ago, whom Letta knows no more, are forgotten."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        metrics.most_turns.set_function(lambda: policy.max_turns)
        metrics.held_turns.set_function(lambda: len(self._places))

    @property
    def held(self) -> int:
        """Return how many turns are waiting, open or being settled."""
        return len(self._places)

    @property
    def open(self) -> list[OpenTurn]:
        """Return the turns that Letta works on, the oldest first."""
        return list(self._open.values())

    async def is_taken(self, thread: str) -> bool:
        """Tell whether a turn has the thread, or waits for it; raises ``SharedStateUnavailable``."""
        return await self._locks.is_taken(thread)

    @asynccontextmanager
    async def turn(self, plan: TurnPlan) -> AsyncIterator[HeldTurn]:
        """Wait for the thread, open the turn, and settle it however the context is left.

        Where it is left well, the ledger has what the turn took. Raises ``ConversationBusy`` where too many wait or
        the wait is too long, ``BudgetExceeded``, ``Overloaded`` where the gateway is full, ``ShuttingDown`` where it
        is going away, what the locks raise, and the backend's errors.
        """
        place = self._admit(plan.payer.owner)
        try:
            lease = await self._locks.acquire(plan.thread)
        except BaseException:
            self._leave(place)
            raise
        held, is_open = await self._begin(plan, lease, place), False
        try:
            await self._open_turn(held.running, lease)
            is_open = True
            yield held
            if held.running.ended:
                held.outcome = "complete"
                await self._meter_turn(held)
        except GatewayError as error:
            held.outcome = _outcome_of(error, is_open=is_open)
            raise
        finally:
            self._settle_later(held)

    async def idle(self) -> None:
        """Wait until no turn is held."""
        await self._idle.wait()

    async def stop(self, owner: str) -> None:
        """End the turns of an owner, those that wait included, and see them settled within some seconds."""
        await self._stop(lambda place: place.owner == owner)

    async def retire(self, agent_ids: AbstractSet[str]) -> None:
        """End the turns of agents that are to be deleted, see them settled, and let none begin any more."""
        self._retired.update(dict.fromkeys(agent_ids))
        while len(self._retired) > MOST_RETIRED:
            del self._retired[next(iter(self._retired))]
        await self._stop(lambda place: place.agent_id in agent_ids)

    async def _stop(self, concerns: Callable[[Place], bool]) -> None:
        ending = []
        for place in filter(concerns, self._places):
            if place.stopped is None:
                place.stopped = ResponseCancelled(_STOPPED, should_retry=False)
            if place.running is not None:
                place.running.abort(place.stopped)
            place.left = place.left or asyncio.Event()
            ending.append(place.left.wait())
        try:
            async with asyncio.timeout(STOP):
                await asyncio.gather(*ending)
        except TimeoutError:
            _log.warning("turns that were ended not settled yet", turns=sum(map(concerns, self._places)))

    async def end(self) -> None:
        """Refuse new turns, end the open ones with an error, and see them settled."""
        self._closed = True
        self._locks.refuse_waiting(_shutting_down())
        for running in list(self._open):
            running.abort(
                ShuttingDown("The gateway is being restarted and ended this answer early.", should_retry=False)
            )
        try:
            async with asyncio.timeout(SETTLE):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("turns left unsettled", turns=len(self._places))

    # Admission -------------------------------------------------------------------------------------------------------

    def _admit(self, owner: str) -> Place:
        if self._closed:
            raise _shutting_down()
        if len(self._places) >= self._policy.max_turns:
            raise Overloaded
        place = Place(owner)
        self._places.add(place)
        self._idle.clear()
        return place

    def _leave(self, place: Place) -> None:
        self._places.remove(place)
        if place.left is not None:
            place.left.set()
        if not self._places:
            self._idle.set()

    async def _begin(self, plan: TurnPlan, lease: Lease, place: Place) -> HeldTurn:
        turn_id = None
        try:
            self._check_wanted(place)
            turn = await plan.begin(lease)
            turn_id = await self._meter.open(plan.payer, turn)
            self._check_wanted(place, turn)
        except BaseException as error:
            if isinstance(error, StorageUnavailable | ThreadLost):
                error.should_retry = True  # nothing was said yet
            self._tasks.spawn(self._give_up(plan, lease, place, turn_id), "give up turn")
            raise
        running = self._backend.turn(msgspec.structs.replace(turn, mark=turn_id))
        place.agent_id, place.running = turn.agent_id, running
        self._open[running] = OpenTurn(turn_id, turn.agent_id, plan.payer.owner, plan.payer.source, time.time())
        self._metrics.turns.inc()
        lease.on_lost = lambda: running.abort(ThreadLost())
        return HeldTurn(turn_id, place, running, plan, lease)

    def _check_wanted(self, place: Place, turn: AgentTurn | None = None) -> None:
        """Refuse a turn that somebody ended while it waited, or whose agent is not to be spoken to any more."""
        if place.stopped is not None:
            raise place.stopped
        if turn is not None and turn.agent_id in self._retired:
            raise AgentGone(should_retry=False)

    async def _give_up(self, plan: TurnPlan, lease: Lease, place: Place, turn_id: str | None) -> None:
        try:
            if turn_id is not None:
                await self._meter.close(turn_id, None, "unsent")
            await self._tell(plan, is_delivered=False)
        finally:
            self._locks.release(lease)
            self._leave(place)

    async def _open_turn(self, running: RunningTurn, lease: Lease) -> None:
        """Open the turn; where Letta itself is busy with this thread, keep our place and ask again."""
        pause = BUSY_PAUSE
        give_up = asyncio.get_running_loop().time() + self._policy.queue_wait
        while True:
            if self._closed:  # since we were admitted: while we waited for our turn, or for Letta
                raise _shutting_down()
            await self._locks.check(lease)
            try:
                await running.open()
            except ConversationBusy:
                if asyncio.get_running_loop().time() + pause > give_up:
                    raise
            else:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_BUSY_PAUSE)

    # The end ---------------------------------------------------------------------------------------------------------

    def _settle_later(self, held: HeldTurn) -> None:
        if held.running.ended and held.is_metered and held.plan.is_quiet:
            self._end_turn(held)
        else:
            self._tasks.spawn(self._settle(held), "settle turn")

    async def _settle(self, held: HeldTurn) -> None:
        try:
            await self._see_ended(held)
            await self._meter_turn(held)
        finally:
            if not held.is_metered:  # by a bug, or because the gateway is gone before Letta answered
                held.is_metered = True
                self._meter.leave_open(held.id)
            try:
                await self._tell(held.plan, is_delivered=held.outcome != "unsent")
            finally:
                self._end_turn(held)

    async def _meter_turn(self, held: HeldTurn) -> None:
        """Tell the ledger what the turn took, once."""
        if held.is_metered:
            return
        try:
            taken = None if held.outcome == "unsent" else await held.running.usage()
        except (GatewayError, TimeoutError):
            held.is_metered = True
            self._meter.leave_open(held.id)
            return
        held.is_metered = True
        await self._meter.close(held.id, taken, held.outcome, held.characters)

    async def _see_ended(self, held: HeldTurn) -> None:
        try:
            if not held.running.ended and not await self._finishes(held):
                await held.running.cancel()
        except (GatewayError, TimeoutError) as error:
            reason = getattr(error, "code", None) or type(error).__name__
            _log.warning("turn not settled", thread=held.plan.thread, reason=reason)

    async def _tell(self, plan: TurnPlan, *, is_delivered: bool) -> None:
        try:
            async with asyncio.timeout(TELL):
                await plan.end(is_delivered=is_delivered)
        except (GatewayError, TimeoutError) as error:
            reason = getattr(error, "code", None) or type(error).__name__
            _log.warning("turn not written down", thread=plan.thread, reason=reason)

    async def _finishes(self, held: HeldTurn) -> bool:
        """Let a turn go on to its end where the operator wants that; False where it is to be cancelled after all."""
        if self._policy.on_disconnect == "cancel" or self._closed or held.place.stopped is not None:
            return False
        try:
            await held.running.drain()
        except GatewayError:
            return False  # it ran out of time, or its stream broke: the run may go on without us
        return True

    def _end_turn(self, held: HeldTurn) -> None:
        held.running.close()
        self._open.pop(held.running, None)
        self._metrics.turns.dec()
        self._locks.release(held.lease)
        self._leave(held.place)


def _outcome_of(error: GatewayError, *, is_open: bool) -> TurnOutcome:
    if not is_open and error.should_retry is True:
        return "unsent"
    return "interrupted" if isinstance(error, ShuttingDown | ResponseCancelled | ThreadLost) else "failed"


def _shutting_down() -> ShuttingDown:
    return ShuttingDown(should_retry=True, retry_after=2.0)
