"""Background tasks that are kept: the event loop itself holds only weak references to them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import structlog

from gateway.errors import GatewayError

T = TypeVar("T")

_log: Final = structlog.get_logger("gateway.tasks")


class TaskSet:
    """Tasks that outlive the request which started them; a failure of one is logged, never lost.

    An error of the gateway's own tree is no bug: whoever waits for the task answers it, so it is logged for debugging.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start the work as a task that is kept until it is done."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self, timeout: float) -> None:
        """Give the tasks ``timeout`` seconds to end, then cancel those that are left."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        match task.exception():
            case None:
                pass
            case GatewayError(code=code):
                _log.debug("background task ended with an error", task=task.get_name(), code=code)
            case error:
                _log.error("background task failed", task=task.get_name(), exc_info=error)
