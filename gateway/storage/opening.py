"""The start: the file where there is to be one, the schema, and what is said when it does not work out."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from sqlalchemy import Connection, text

from gateway.storage import database_file, failures, stamp
from gateway.storage.address import Address, PostgresServer, SqliteFile
from gateway.storage.failures import StorageFailed
from gateway.storage.transactions import Driver

T = TypeVar("T")

MIGRATION: Final = 600.0
"""Seconds that all of a start's migrations may take."""
OLDEST_SQLITE: Final = (3, 35)
"""What ``RETURNING`` came with."""

_READ_COMMITTED: Final = text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
_ELSEWHERE: Final = "set LETTA_GATEWAY_HOME or LETTA_GATEWAY_DATABASE_URL"
_FILE: Final = {
    failures.LOCKED: f"is in use by another gateway: stop that one, or {_ELSEWHERE}.",
    failures.READ_ONLY: f"cannot be written: change its owner or mode, or {_ELSEWHERE}.",
    failures.GONE: f"cannot be opened: change its owner or mode, or {_ELSEWHERE}.",
    failures.DAMAGED: f"is damaged, or no database: restore it, or {_ELSEWHERE}.",
    failures.FULL: f"cannot be written, as the disk is full: make room, or {_ELSEWHERE}.",
}
_SERVER: Final = {
    failures.REFUSED: "refused the login: check its user, password and rights.",
    failures.GONE: "has no such database: create it.",
    failures.LOCKED: "is in somebody else's use, as a backup's: start again once that is over.",
    failures.READ_ONLY: "is read-only: name the primary.",
    failures.SLOW: "did not answer in time: check its host and port.",
    failures.UNREACHABLE: "cannot be reached: check its host and port.",
}


def has_wal_reset_bug(version: tuple[int, int, int] = sqlite3.sqlite_version_info) -> bool:
    """Tell whether SQLite may lose a commit when two connections write while its log begins anew.

    3.7.0 to 3.51.2 may; 3.44.6 and 3.50.7 have the correction of 3.51.3. The gateway itself writes by one connection.
    """
    is_corrected = (3, 44, 6) <= version < (3, 45, 0) or (3, 50, 7) <= version < (3, 51, 0)
    return (3, 7, 0) <= version < (3, 51, 3) and not is_corrected


async def prepare(file: SqliteFile) -> None:
    """Make the file and its folder where they are missing; raises ``StorageFailed``."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise StorageFailed(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed, or PostgreSQL.")
    try:
        await asyncio.to_thread(database_file.prepare, file.path)
    except OSError as error:
        raise StorageFailed(f"{file.path} cannot be made ({error.strerror}): {_ELSEWHERE}.") from None


async def migrate(driver: Driver, address: Address) -> None:
    """Bring the schema up to date, all of it or nothing; raises ``StorageFailed``."""
    await _run(driver, address, _migrate, writes=True)


async def revision(driver: Driver, address: Address) -> str | None:
    """Return which schema the database has; raises ``StorageFailed``."""
    return await _run(driver, address, stamp.current, writes=False)


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # Whatever the database's default: what another gateway migrated is to be seen once its lock is given.
        connection.execute(_READ_COMMITTED)
    if stamp.is_new_file(connection):
        stamp.create(connection)
    elif stamp.current(connection) != stamp.NEWEST:
        from gateway.storage import schema  # noqa: PLC0415 - at most starts there is nothing to do

        schema.upgrade(connection)


async def _run(driver: Driver, address: Address, work: Callable[[Connection], T], *, writes: bool) -> T:
    with _explained(address):
        async with asyncio.timeout(MIGRATION):
            transaction = driver.transaction(writes=writes)
            try:
                return await transaction.run(work)
            finally:
                await transaction.end(is_spent=False)


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    try:
        yield
    except StorageFailed:
        raise
    except Exception as error:
        reason = failures.reason_of(error)
        if reason is None:
            raise
        passes = isinstance(address, PostgresServer) and reason in failures.PASSING
        raise StorageFailed(_explanation(address, reason), passes=passes) from None


def _explanation(address: Address, reason: str) -> str:
    if isinstance(address, PostgresServer):
        return f"the database of LETTA_GATEWAY_DATABASE_URL {_SERVER.get(reason, f'cannot be used: {reason}.')}"
    return f"{address.path} {_FILE.get(reason, f'cannot be used ({reason}): {_ELSEWHERE}.')}"
