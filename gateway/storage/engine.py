"""The database: transactions with deadlines, one at a time on SQLite, some at a time on PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Self, TypeVar

import msgspec
import sqlalchemy as sa
import structlog

from gateway.errors import StorageUnavailable
from gateway.storage import connections, failures, opening
from gateway.storage.address import Address, SqliteFile
from gateway.storage.steps import Steps
from gateway.storage.transactions import Rows, Transaction
from gateway.tasks import TaskSet

T = TypeVar("T")

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

    def __init__(self, transaction: Transaction, steps: Steps, dialect: sa.Dialect) -> None:
        self._transaction = transaction
        self._steps = steps
        self.dialect: Final = dialect

    async def execute(self, statement: sa.Executable, rows: Rows = None) -> sa.CursorResult[Any]:
        """Run a statement, once or for each row of parameters; raises ``StorageUnavailable``."""
        return await self._steps.run(self._transaction.execute(statement, rows))


class Database:
    """The gateway's own database; ``open`` makes one, and ``on_failure`` is called for each transaction that fails."""

    def __init__(self, address: Address, limits: StorageLimits) -> None:
        self._address = address
        self._limits = limits
        self._driver = connections.connect(address, connections=limits.connections, patience=limits.lock)
        self._places = limits.connections if self.is_shared else 1
        self._free = asyncio.Semaphore(self._places)
        self._tasks = TaskSet()
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
            await opening.migrate(database._driver, address)
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
        await self._driver.close()

    async def ping(self) -> None:
        """Raise ``StorageUnavailable`` unless the database answers."""
        async with self.read() as connection:
            await connection.execute(sa.text("SELECT 1"))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Connection]:
        """Open a transaction that changes nothing; raises ``StorageUnavailable``."""
        async with self._transaction(writes=False) as (transaction, steps):
            yield Connection(transaction, steps, self._driver.dialect)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Connection]:
        """Open a transaction that is committed at the end of the block, and rolled back when the block raises.

        Raises ``StorageUnavailable``: then nothing is known to be written. Who is cancelled inside of the block has
        written nothing, or, cancelled during the commit, everything.
        """
        async with self._transaction(writes=True) as (transaction, steps):
            yield Connection(transaction, steps, self._driver.dialect)
            await steps.run(transaction.commit())

    async def write_at_once(self, work: Callable[[sa.Connection], T]) -> T:
        """Do ``work`` as one transaction and one step, in SQLite's thread: it must not touch what is not its own.

        Raises ``StorageUnavailable``, as ``write`` does.
        """
        async with self._transaction(writes=True) as (transaction, steps):
            return await steps.run(transaction.run(work))

    @asynccontextmanager
    async def _transaction(self, *, writes: bool) -> AsyncIterator[tuple[Transaction, Steps]]:
        await self._take_place()
        transaction = self._driver.transaction(writes=writes)
        steps = Steps(self._tasks, self._limits.step, may_cancel=self.is_shared)
        is_spent = False
        try:
            yield transaction, steps
        except StorageUnavailable as error:
            self._went_down(error.reason)
            # A primary that has become a standby may keep its connections; a new one leads to who is primary now.
            is_spent = self.is_shared and error.reason == failures.READ_ONLY
            raise
        else:
            self._came_back()
        finally:
            if transaction.is_open:
                await steps.end(self._leave(transaction, is_spent=is_spent))
            else:
                self._free.release()

    async def _take_place(self) -> None:
        if self._is_closed:
            raise StorageUnavailable(failures.CLOSED)
        try:
            async with asyncio.timeout(self._limits.queue):
                await self._free.acquire()
        except TimeoutError:
            self._went_down(failures.BUSY)
            raise StorageUnavailable(failures.BUSY) from None

    async def _leave(self, transaction: Transaction, *, is_spent: bool) -> None:
        try:
            # Once this is closed there is no pool any more that would close the connection.
            await transaction.end(is_spent=is_spent or self._is_closed)
        finally:
            self._free.release()

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


async def revision(address: Address) -> str | None:
    """Return which schema a database has, which is left as it is; None: it has none. Raises ``StorageFailed``."""
    if isinstance(address, SqliteFile) and not await asyncio.to_thread(address.path.exists):
        return None
    limits = StorageLimits()
    driver = connections.connect(address, connections=1, patience=limits.lock)
    try:
        return await opening.revision(driver, address)
    finally:
        await driver.close()
