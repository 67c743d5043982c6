"""The turn registry: every turn starts, ends, is cancelled and drained through it.

One turn at a time on each agent's thread, as Letta interleaves overlapping ones; a bounded, first-come queue before
that. A turn that is left before its end is settled in the background, and its thread stays taken until then.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal

import msgspec
import structlog

from gateway.errors import ConversationBusy, GatewayError, Overloaded, ShuttingDown
from gateway.letta.backend import AgentBackend, RunningTurn
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import AgentTurn

SETTLE: Final = 5.0
"""Seconds that aborted turns have to be settled when the gateway goes away."""
BUSY_PAUSE: Final = 0.2
LONGEST_BUSY_PAUSE: Final = 2.0

_log: Final = structlog.get_logger("gateway.turns")


class TurnPolicy(msgspec.Struct, frozen=True):
    """How turns share an agent's thread, and what becomes of one whose client went away; waits are in seconds."""

    on_disconnect: Literal["cancel", "finish"] = "cancel"
    queue_depth: int = 8
    queue_wait: float = 30.0
    max_turns: int = 1_000


class TurnRegistry:
    """All turns of one gateway."""

    def __init__(self, backend: AgentBackend, policy: TurnPolicy, metrics: Metrics, tasks: TaskSet) -> None:
        self._backend = backend
        self._policy = policy
        self._metrics = metrics
        self._tasks = tasks
        self._threads: dict[str, deque[asyncio.Future[None]]] = {}
        self._open: set[RunningTurn] = set()
        self._held = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def held(self) -> int:
        """Return how many turns are waiting, open or being settled."""
        return self._held

    @asynccontextmanager
    async def turn(self, turn: AgentTurn) -> AsyncIterator[RunningTurn]:
        """Wait for the thread, open the turn, and settle it however the context is left.

        Raises ``ConversationBusy`` where too many wait or the wait is too long, ``Overloaded`` where the gateway is
        full, ``ShuttingDown`` where it is going away, and the backend's errors.
        """
        self._admit()
        try:
            await self._acquire(turn.thread)
        except BaseException:
            self._leave()
            raise
        running = self._backend.turn(turn)
        self._open.add(running)
        self._metrics.turns.inc()
        try:
            await self._open_turn(running)
            yield running
        finally:
            self._settle_later(running, turn.thread)

    async def idle(self) -> None:
        """Wait until no turn is held."""
        await self._idle.wait()

    async def end(self) -> None:
        """Refuse new turns, end the open ones with an error, and see them settled."""
        self._closed = True
        for queue in self._threads.values():
            for waiter in queue:
                if not waiter.done():
                    waiter.set_exception(_shutting_down())
        for running in list(self._open):
            running.abort(
                ShuttingDown("The gateway is being restarted and ended this answer early.", should_retry=False)
            )
        try:
            async with asyncio.timeout(SETTLE):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("turns left unsettled", turns=self._held)

    # Admission -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if self._closed:
            raise _shutting_down()
        if self._held >= self._policy.max_turns:
            raise Overloaded
        self._held += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._held -= 1
        if not self._held:
            self._idle.set()

    async def _acquire(self, thread: str) -> None:
        queue = self._threads.get(thread)
        if queue is None:
            self._threads[thread] = deque()
            return
        if len(queue) >= self._policy.queue_depth:
            raise ConversationBusy
        turn_comes = asyncio.get_running_loop().create_future()
        queue.append(turn_comes)
        self._metrics.waiting.inc()
        try:
            async with asyncio.timeout(self._policy.queue_wait):
                await turn_comes
        except BaseException as error:
            if turn_comes.done() and not turn_comes.cancelled() and turn_comes.exception() is None:
                self._release(thread)  # it was given to us in the very moment that we gave up
            elif turn_comes in queue:
                queue.remove(turn_comes)
            if isinstance(error, TimeoutError):
                raise ConversationBusy from None
            raise
        finally:
            self._metrics.waiting.dec()

    def _release(self, thread: str) -> None:
        queue = self._threads[thread]
        while queue:
            next_turn = queue.popleft()
            if not next_turn.done():
                next_turn.set_result(None)
                return
        del self._threads[thread]

    async def _open_turn(self, running: RunningTurn) -> None:
        """Open the turn; where Letta itself is busy with this thread, keep our place and ask again."""
        pause = BUSY_PAUSE
        give_up = asyncio.get_running_loop().time() + self._policy.queue_wait
        while True:
            if self._closed:  # since we were admitted: while we waited for our turn, or for Letta
                raise _shutting_down()
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

    def _settle_later(self, running: RunningTurn, thread: str) -> None:
        if running.ended:
            self._end_turn(running, thread)
        else:
            self._tasks.spawn(self._settle(running, thread), "settle turn")

    async def _settle(self, running: RunningTurn, thread: str) -> None:
        try:
            if not await self._finishes(running):
                await running.cancel()
        except (GatewayError, TimeoutError) as error:
            _log.warning("turn not settled", thread=thread, reason=getattr(error, "code", None) or type(error).__name__)
        finally:
            self._end_turn(running, thread)

    async def _finishes(self, running: RunningTurn) -> bool:
        """Let a turn go on to its end where the operator wants that; False where it is to be cancelled after all."""
        if self._policy.on_disconnect == "cancel" or self._closed:
            return False
        try:
            await running.drain()
        except GatewayError:
            return False  # it ran out of time, or its stream broke: the run may go on without us
        return True

    def _end_turn(self, running: RunningTurn, thread: str) -> None:
        running.close()
        self._open.discard(running)
        self._metrics.turns.dec()
        self._release(thread)
        self._leave()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown(should_retry=True, retry_after=2.0)
