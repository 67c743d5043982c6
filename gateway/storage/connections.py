"""How each kind of database is connected to: all that differs between the two is here and in ``upsert``."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry

from gateway.storage.address import Address, PostgresServer

WRITES: Final = "writes"
"""The execution option that says of a transaction that it will write."""


def connect(address: Address, *, connections: int, patience: float) -> AsyncEngine:
    """Return an engine, which connects when it is first used.

    ``patience`` is how many seconds PostgreSQL may take to connect, and SQLite to wait for a lock.
    """
    if isinstance(address, PostgresServer):
        return _postgres(address.url, connections, patience)
    return _sqlite(address.path, patience)


def _postgres(url: str, connections: int, patience: float) -> AsyncEngine:
    import asyncpg  # noqa: PLC0415 - 3 MiB that a gateway with a file of its own does without

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=partial(asyncpg.connect, url, timeout=patience),  # it knows every part of such a URL
        pool_size=connections,
        max_overflow=0,
        pool_pre_ping=True,  # a server that was restarted is not the next request's failure
        hide_parameters=True,
    )


def _sqlite(path: Path, patience: float) -> AsyncEngine:
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # below that it logs each statement with its values
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        connect_args={"timeout": patience, "isolation_level": None},
        # One connection does everything, reads included: two that write can lose commits (SQLite up to 3.51.2 has the
        # WAL-reset bug, and Python brings the system's).
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1,
        max_overflow=0,
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "connect", _configure)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor: Any = connection.cursor()
    # Exclusive before WAL: then there is no shared memory, and no second process gets in.
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
        cursor.fetchall()
    cursor.close()


def _begin(connection: Connection) -> None:
    """Begin by hand: the driver itself would begin late, and not at all before DDL.

    What only reads needs no transaction: nothing else is at work on the one connection, nor in the file.
    """
    if connection.get_execution_options().get(WRITES, False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


# The file ------------------------------------------------------------------------------------------------------------


def prepare(path: Path) -> None:
    """Make the file and its folder, for our own eyes only, where they are missing; raises ``OSError``.

    A file that is there is not opened: closing it again would drop the locks that this process has on it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(0o600)


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells this file from another of the same name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
