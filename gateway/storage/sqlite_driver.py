"""SQLite's one connection, in a thread of its own: a statement is one trip there and back, a whole transaction too.

A driver that makes a trip for each call of the DB-API, as aiosqlite does, makes some ten for an insert and its commit,
and a trip costs more than the statement: 3 to 8 ms for such a transaction against 0.7 (measured on two busy cores).
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from sqlalchemy import URL, Connection, CursorResult, Dialect, Engine, Executable, NullPool, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from gateway.errors import StorageUnavailable
from gateway.storage import database_file, failures
from gateway.storage.transactions import Rows

T = TypeVar("T")

_TO_END: Final = 1.0
"""Seconds that a statement which is under way has when the database is closed."""


class SqliteDriver:
    """The connection: one does everything, reads included, as two that write can lose commits.

    (SQLite up to 3.51.2 has the WAL-reset bug, and Python brings the system's.)
    """

    def __init__(self, path: Path, patience: float) -> None:
        self._path = path
        self._engine = _engine(path, patience)
        # Of its own: every turn is written down, and must not wait until somebody else's thread is free.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._connection: Connection | None = None
        self._file: tuple[int, int] | None = None

    @property
    def dialect(self) -> Dialect:
        """Which SQL is spoken."""
        return self._engine.dialect

    def transaction(self, *, writes: bool) -> "SqliteTransaction":
        """Return a new transaction; there is never more than one."""
        return SqliteTransaction(self, writes=writes)

    async def do(self, work: Callable[[Connection], T]) -> T:
        """Do something in the connection's thread; who is cancelled meanwhile does not stop it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    async def roll_back(self) -> None:
        """Take back what was begun, if it came to a connection."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._roll_back)

    async def close(self) -> None:
        """Close the connection, and stop what is under way for long."""
        closing = asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        if not (await asyncio.wait({closing}, timeout=_TO_END))[0] and self._connection is not None:
            cast("sqlite3.Connection", self._connection.connection.driver_connection).interrupt()
        await closing
        self._thread.shutdown(wait=False)

    def commit(self, connection: Connection) -> None:
        """Commit, in the thread; what is written to a file that has lost its name would be lost too."""
        if database_file.identity(self._path) != self._file:
            raise StorageUnavailable(failures.GONE)
        connection.commit()

    def _do(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None or self._connection.invalidated:
            self._connection = self._engine.connect()
            self._file = self._file or database_file.identity(self._path)
        return work(self._connection)

    def _roll_back(self) -> None:
        if self._connection is not None:
            self._connection.rollback()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()


class SqliteTransaction:
    """A transaction; one that only reads needs none of SQLite's, as nothing else is at work in the file."""

    def __init__(self, driver: SqliteDriver, *, writes: bool) -> None:
        self._driver = driver
        self._writes = writes
        self.is_open = False

    async def execute(self, statement: Executable, rows: Rows) -> CursorResult[Any]:
        """Run a statement, and fetch what it finds."""
        return await self._do(lambda connection: _fetched(connection.execute(statement, rows)))

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do all that is to be done in it, and commit."""

        def whole(connection: Connection) -> T:
            found = work(connection)
            if self._writes:
                self._driver.commit(connection)
            return found

        found = await self._do(whole)
        self.is_open = False
        return found

    async def commit(self) -> None:
        """Commit what was done."""
        if self.is_open:
            await self._driver.do(self._driver.commit)
            self.is_open = False

    async def end(self, *, is_spent: bool) -> None:  # noqa: ARG002 - there is no other connection
        """Roll back what is not committed."""
        if self.is_open:
            await self._driver.roll_back()
            self.is_open = False

    async def _do(self, work: Callable[[Connection], T]) -> T:
        is_first, self.is_open = not self.is_open, True
        if not self._writes:
            found = await self._driver.do(lambda connection: _reading(connection, work))
            self.is_open = False
            return found
        return await self._driver.do(lambda connection: _begun(connection, work) if is_first else work(connection))


def _begun(connection: Connection, work: Callable[[Connection], T]) -> T:
    """Begin by hand: the driver itself would begin late, and not at all before DDL."""
    connection.begin()
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    return work(connection)


def _reading(connection: Connection, work: Callable[[Connection], T]) -> T:
    try:
        return work(connection)
    finally:
        connection.rollback()


def _fetched(result: CursorResult[Any]) -> CursorResult[Any]:
    """Fetch the rows here: a cursor is used in the thread that it was made in."""
    return cast("CursorResult[Any]", result.freeze()()) if result.returns_rows else result


def _engine(path: Path, patience: float) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": patience, "isolation_level": None},
        poolclass=NullPool,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _configure)
    return engine


def _configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor: Any = connection.cursor()
    # Exclusive before WAL: then there is no shared memory, and no second process gets in.
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
        cursor.fetchall()
    cursor.close()
