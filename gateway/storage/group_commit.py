"""Many small writes in one transaction: a commit costs a disk's millisecond, however much it writes.

Whoever writes waits for the commit; what comes in meanwhile goes into the next one together.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from sqlalchemy import Connection

from gateway.errors import StorageUnavailable
from gateway.storage import failures
from gateway.storage.engine import Database
from gateway.tasks import TaskSet

Entry = TypeVar("Entry")
Answer = TypeVar("Answer")
Write: TypeAlias = Callable[[Connection, Sequence[Entry]], Sequence[Answer]]
"""Writes entries within a transaction, in SQLite's thread, and returns an answer for each."""

AT_ONCE: Final = 256
"""Entries in one transaction: some milliseconds for which nobody else has SQLite's connection."""
TRIES: Final = 3
"""How often a transaction is begun that PostgreSQL takes back for another's sake: deadlocks, isolation levels."""


class _Waiting(NamedTuple, Generic[Entry, Answer]):
    entry: Entry
    answer: "asyncio.Future[Answer]"


class GroupCommit(Generic[Entry, Answer]):
    """Writes what waits, first come, first written."""

    def __init__(self, database: Database, tasks: TaskSet, write: Write[Entry, Answer]) -> None:
        self._database = database
        self._tasks = tasks
        self._write = write
        self._queue: deque[_Waiting[Entry, Answer]] = deque()
        self._is_writing = False

    async def submit(self, entry: Entry) -> Answer:
        """Have an entry written, and return its answer once that is committed.

        Raises ``StorageUnavailable``, then nothing is known to be written, and what the write raises for this entry
        alone. An entry whose submitter is cancelled while it waits is not written; later, it may be.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(entry, answer))
        if not self._is_writing:
            self._is_writing = True
            self._tasks.spawn(self._write_all(), "group commit")
        return await answer

    async def _write_all(self) -> None:
        batch: list[_Waiting[Entry, Answer]] = []
        try:
            while batch := self._next():
                await self._write_batch(batch)
        finally:
            self._is_writing = False
            _refuse((*batch, *self._queue), failures.CLOSED)  # there are some only where this task is cancelled
            self._queue.clear()

    def _next(self) -> list[_Waiting[Entry, Answer]]:
        batch: list[_Waiting[Entry, Answer]] = []
        while self._queue and len(batch) < AT_ONCE:
            waiting = self._queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch

    async def _write_batch(self, batch: Sequence[_Waiting[Entry, Answer]]) -> None:
        """Write a batch; where it cannot be written for a fault of its own, each entry gets its own transaction."""
        try:
            answers = await self._commit([waiting.entry for waiting in batch])
        except StorageUnavailable as error:
            _refuse(batch, error.reason)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            if len(batch) > 1:
                for waiting in batch:
                    await self._write_batch([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
        else:
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    async def _commit(self, entries: Sequence[Entry]) -> Sequence[Answer]:
        tries = 1
        while True:
            try:
                return await self._database.write_at_once(lambda connection: self._write(connection, entries))
            except StorageUnavailable as error:
                if error.reason != failures.CONFLICT or tries == TRIES:
                    raise
            tries += 1


def _refuse(batch: Sequence[_Waiting[Entry, Answer]], reason: str) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(StorageUnavailable(reason))
