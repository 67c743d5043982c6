"""The database: transactions with deadlines, one at a time on SQLite, some at a time on PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import msgspec
import structlog
from sqlalchemy import CursorResult, Dialect, Executable, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.errors import StorageUnavailable
from gateway.storage import connections, failures, opening
from gateway.storage.address import Address, SqliteFile
from gateway.storage.steps import Steps
from gateway.tasks import TaskSet

_TO_END: Final = 1.0
"""Seconds that a step which is stuck has when the database is closed."""

_log: Final = structlog.get_logger("gateway.storage")


class StorageLimits(msgspec.Struct, frozen=True):
    """How long things may take, in seconds, and how many connections PostgreSQL gets."""

    step: float = 5.0
    """A statement, a commit."""
    queue: float = 5.0
    """Waiting for a connection."""
    lock: float = 3.0
    """Waiting for another process's lock, or for PostgreSQL to accept a connection: less than a step."""
    connections: int = 10


class Connection:
    """One transaction's way to the database."""

    def __init__(self, raw: AsyncConnection, steps: Steps) -> None:
        self._raw = raw
        self._steps = steps

    @property
    def dialect(self) -> Dialect:
        """Which SQL is spoken."""
        return self._raw.dialect

    async def execute(
        self, statement: Executable, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None
    ) -> CursorResult[Any]:
        """Run a statement, once or for each row of parameters; raises ``StorageUnavailable``."""
        return await self._steps.run(self._raw.execute(statement, rows))


class Database:
    """The gateway's own database; ``open`` makes one, and ``on_failure`` is called for each transaction that fails."""

    def __init__(self, address: Address, limits: StorageLimits) -> None:
        self._address = address
        self._limits = limits
        self._engine = connections.connect(address, connections=limits.connections, patience=limits.lock)
        self._places = limits.connections if self.is_shared else 1
        self._free = asyncio.Semaphore(self._places)
        self._tasks = TaskSet()
        # A thread of its own: every turn is written down, and must not wait until somebody else's thread is free.
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="database-file")
        self._identity: tuple[int, int] | None = None
        self._is_down = False
        self._is_closed = False
        self.on_failure: Callable[[], object] | None = None

    @property
    def is_shared(self) -> bool:
        """Tell whether other gateways may use the same database."""
        return not isinstance(self._address, SqliteFile)

    @classmethod
    async def open(cls, address: Address, limits: StorageLimits | None = None) -> Self:
        """Connect, and bring the schema up to date; raises ``StorageFailed``."""
        database = cls(address, limits or StorageLimits())
        try:
            if isinstance(address, SqliteFile):
                await opening.prepare(address)
            await opening.migrate(database._engine, address)
            database._identity = await database._file_now()
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Let open transactions end, and close the connections; later ones are refused."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(self._limits.step):
                for _ in range(self._places):
                    await self._free.acquire()
        except TimeoutError:
            _log.warning("database closed under open transactions")
        await self._tasks.close(_TO_END)
        await self._engine.dispose()
        self._looker.shutdown(wait=False)

    async def ping(self) -> None:
        """Raise ``StorageUnavailable`` unless the database answers."""
        async with self.read() as connection:
            await connection.execute(text("SELECT 1"))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Connection]:
        """Open a transaction that changes nothing; raises ``StorageUnavailable``."""
        async with self._transaction(writes=False) as (raw, steps):
            yield Connection(raw, steps)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Connection]:
        """Open a transaction that is committed at the end of the block, and rolled back when the block raises.

        Raises ``StorageUnavailable``: then nothing is known to be written. Who is cancelled inside of the block has
        written nothing, or, cancelled during the commit, everything.
        """
        async with self._transaction(writes=True) as (raw, steps):
            yield Connection(raw, steps)
            await steps.run(self._commit(raw))

    @asynccontextmanager
    async def _transaction(self, *, writes: bool) -> AsyncIterator[tuple[AsyncConnection, Steps]]:
        await self._take_place()
        raw = self._engine.connect()
        steps = Steps(self._tasks, self._limits.step, may_cancel=self.is_shared)
        is_spent = False
        try:
            await steps.run(_begin(raw, writes=writes))
            yield raw, steps
        except StorageUnavailable as error:
            self._went_down(error.reason)
            # A primary that has become a standby may keep its connections; a new one leads to who is primary now.
            is_spent = self.is_shared and error.reason == failures.READ_ONLY
            raise
        else:
            self._came_back()
        finally:
            await steps.end(self._leave(raw, is_spent=is_spent))

    async def _take_place(self) -> None:
        if self._is_closed:
            raise StorageUnavailable(failures.CLOSED)
        try:
            async with asyncio.timeout(self._limits.queue):
                await self._free.acquire()
        except TimeoutError:
            self._went_down(failures.BUSY)
            raise StorageUnavailable(failures.BUSY) from None

    async def _commit(self, raw: AsyncConnection) -> None:
        if await self._file_now() != self._identity:
            raise StorageUnavailable(failures.GONE)  # what is written to a file that has lost its name is lost too
        await raw.commit()

    async def _leave(self, raw: AsyncConnection, *, is_spent: bool) -> None:
        try:
            if raw.sync_connection is not None:
                if is_spent or self._is_closed:  # then there is no pool any more that would close it
                    await raw.invalidate()
                await raw.close()  # which rolls back what is not committed
        finally:
            self._free.release()

    async def _file_now(self) -> tuple[int, int] | None:
        if not isinstance(self._address, SqliteFile):
            return None
        return await asyncio.get_running_loop().run_in_executor(self._looker, connections.identity, self._address.path)

    def _went_down(self, reason: str) -> None:
        if self.on_failure is not None:
            self.on_failure()
        if not self._is_down:
            _log.warning("database unavailable", reason=reason)
        self._is_down = True

    def _came_back(self) -> None:
        if self._is_down:
            _log.info("database available")
        self._is_down = False


async def _begin(raw: AsyncConnection, *, writes: bool) -> None:
    await raw.start()
    await raw.execution_options(**{connections.WRITES: writes})
    await raw.begin()


async def revision(address: Address) -> str | None:
    """Return which schema a database has, which is left as it is; None: it has none. Raises ``StorageFailed``."""
    if isinstance(address, SqliteFile) and not await asyncio.to_thread(address.path.exists):
        return None
    limits = StorageLimits()
    engine = connections.connect(address, connections=1, patience=limits.lock)
    try:
        return await opening.revision(engine, address)
    finally:
        await engine.dispose()
