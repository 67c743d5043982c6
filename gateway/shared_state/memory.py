"""The locks of a gateway that is alone."""

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.errors import ConversationBusy, GatewayError
from gateway.metrics import Metrics
from gateway.shared_state.locks import Lease


class MemoryLocks:
    """``ThreadLocks`` in this process's memory; ``depth()`` turns may wait for a thread, ``wait`` seconds each."""

    def __init__(self, *, depth: Callable[[], int], wait: float, metrics: Metrics) -> None:
        self._depth = depth
        self._wait = wait
        self._metrics = metrics
        self._threads: dict[str, deque[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._threads)

    async def acquire(self, thread: str) -> Lease:
        """Wait for a thread; raises ``ConversationBusy`` where too many wait or the wait is too long."""
        queue = self._threads.get(thread)
        if queue is None:
            self._threads[thread] = deque()
            return Lease(thread)
        if len(queue) >= self._depth():
            raise ConversationBusy
        turn_comes = asyncio.get_running_loop().create_future()
        queue.append(turn_comes)
        self._metrics.waiting.inc()
        try:
            async with asyncio.timeout(self._wait):
                await turn_comes
            return Lease(thread)
        except BaseException as error:
            if turn_comes.done() and not turn_comes.cancelled() and turn_comes.exception() is None:
                self._hand_on(thread)  # it was given to us in the very moment that we gave up
            elif turn_comes in queue:
                queue.remove(turn_comes)
            if isinstance(error, TimeoutError):
                raise ConversationBusy from None
            raise
        finally:
            self._metrics.waiting.dec()

    async def check(self, lease: Lease) -> None:
        """Do nothing: nobody else could have the thread."""

    def release(self, lease: Lease) -> None:
        """Give a thread to whoever waits first."""
        self._hand_on(lease.thread)

    def _hand_on(self, thread: str) -> None:
        queue = self._threads[thread]
        while queue:
            next_turn = queue.popleft()
            if not next_turn.done():
                next_turn.set_result(None)
                return
        del self._threads[thread]

    async def is_taken(self, thread: str) -> bool:
        """Tell whether a turn has a thread."""
        return thread in self._threads

    def refuse_waiting(self, error: GatewayError) -> None:
        """End every wait with this error."""
        for queue in self._threads.values():
            for waiter in queue:
                if not waiter.done():
                    waiter.set_exception(error)
