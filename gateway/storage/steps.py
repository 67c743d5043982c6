"""The steps of one transaction: each goes to its end or to its deadline, whatever becomes of who waits for it.

A driver that is cancelled in the midst of a statement loses its connection. PostgreSQL gives another one; SQLite's is
the only one, and has its lock for as long as the statement goes on: there nothing is cancelled, only waited for, and
nobody gets the connection until the statement is over.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from gateway.errors import StorageUnavailable
from gateway.storage.failures import SLOW, translated
from gateway.tasks import TaskSet

T = TypeVar("T")

_TO_STOP: Final = 1.0
"""Seconds that a step has to stop when it is told to; it is told twice, as the first time drivers close politely."""


class Steps:
    """Does steps, one after another, within ``deadline`` seconds each."""

    def __init__(self, tasks: TaskSet, deadline: float, *, may_cancel: bool) -> None:
        self._tasks = tasks
        self._patience = (deadline, _TO_STOP, _TO_STOP) if may_cancel else (deadline,)
        self._stuck: asyncio.Task[Any] | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do a step; raises ``StorageUnavailable``, and what the work raises, and a cancellation once it is over."""
        if self._stuck is not None:
            work.close()
            raise StorageUnavailable(SLOW)
        task = self._tasks.spawn(_outcome(work), "storage")
        cancelled: asyncio.CancelledError | None = None
        for number, patience in enumerate(self._patience):
            if number:
                task.cancel()
            cancelled = await _wait(task, patience) or cancelled
            if task.done():
                break
        self._stuck = None if task.done() else task
        if cancelled is not None:
            raise cancelled
        if not task.done() or task.cancelled():
            raise StorageUnavailable(SLOW)
        outcome = task.result()
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    async def end(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the last step, which is done whatever happens; after a step that is stuck nobody waits for it."""
        stuck = self._stuck
        if stuck is None:
            await self.run(work)
        else:
            self._tasks.spawn(_after(stuck, work), "storage")


class _Failure:
    """An error as a value: it is the caller's, and no failure of a background task."""

    def __init__(self, error: Exception) -> None:
        self.error = error


async def _outcome(work: Coroutine[Any, Any, T]) -> T | _Failure:
    try:
        with translated():
            return await work
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        return _Failure(error)


async def _after(stuck: asyncio.Task[Any], work: Coroutine[Any, Any, None]) -> None:
    await asyncio.wait({stuck})
    with translated():
        await work


async def _wait(task: asyncio.Task[Any], patience: float) -> asyncio.CancelledError | None:
    """Wait for the task, cancelled or not; return the cancellation."""
    clock = asyncio.get_running_loop().time
    end = clock() + patience
    cancelled: asyncio.CancelledError | None = None
    while not task.done() and clock() < end:
        try:
            await asyncio.wait({task}, timeout=end - clock())
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled
