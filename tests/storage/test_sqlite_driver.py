import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
from sqlalchemy import Connection, insert, select, text

from gateway.errors import StorageUnavailable
from gateway.storage import database_file
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.storage.sqlite_driver import SqliteDriver
from gateway.storage.tables import instances
from tests.storage.databases import opened

T = TypeVar("T")

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


async def test_sqlite_is_as_safe_as_it_can_be(sqlite_file: SqliteFile) -> None:
    expected = {
        "journal_mode": "wal",
        "synchronous": 2,
        "locking_mode": "exclusive",
        "foreign_keys": 1,
        "busy_timeout": 3_000,
    }
    async with opened(sqlite_file) as database, database.read() as connection:
        found = {name: (await connection.execute(text(f"PRAGMA {name}"))).scalar_one() for name in expected}
    assert found == expected


async def test_statements_are_not_logged(sqlite_file: SqliteFile, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with opened(sqlite_file) as database, database.read() as connection:
            await connection.execute(text("SELECT 'secret'"))
    assert "secret" not in caplog.text


async def test_whole_transaction_is_one_trip_to_the_thread(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        driver = database._driver
        assert isinstance(driver, SqliteDriver)
        trips: list[str] = []
        do = driver._do

        def counted(work: Callable[[Connection], T]) -> T:
            trips.append(threading.current_thread().name)
            return do(work)

        driver._do = counted  # type: ignore[method-assign]

        def write(connection: Connection) -> list[str]:
            connection.execute(insert(instances), [{"id": "a", "seen_at": 1.0}, {"id": "b", "seen_at": 1.0}])
            return list(connection.execute(select(instances.c.id).order_by(instances.c.id)).scalars())

        assert await database.write_at_once(write) == ["a", "b"]
        assert trips == ["database_0"]
        trips.clear()
        async with database.write() as connection:
            await connection.execute(insert(instances), [{"id": "c", "seen_at": 1.0}])
        assert len(trips) == 2, "the statement, then the commit"
        async with database.read() as connection:
            found = await connection.execute(select(instances))
        assert [row.id for row in found] == ["a", "b", "c"], "rows outlive the transaction"


async def test_work_that_fails_leaves_nothing(sqlite_file: SqliteFile) -> None:
    def fail(connection: Connection) -> None:
        connection.execute(insert(instances), [{"id": "a", "seen_at": 1.0}])
        raise KeyError

    async with opened(sqlite_file) as database:
        with pytest.raises(KeyError):
            await database.write_at_once(fail)
        assert await ids(database) == []


async def ids(database: Database) -> list[str]:
    async with database.read() as connection:
        return list((await connection.execute(select(instances.c.id))).scalars())


async def test_file_that_has_lost_its_name_takes_no_work(sqlite_file: SqliteFile) -> None:
    def write(connection: Connection) -> None:
        connection.execute(insert(instances), [{"id": "a", "seen_at": 1.0}])

    async with opened(sqlite_file) as database:
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        with pytest.raises(StorageUnavailable) as raised:
            await database.write_at_once(write)
        assert raised.value.reason == "gone"
        moved.rename(sqlite_file.path)
        assert await ids(database) == []
        await database.write_at_once(write)
        assert await ids(database) == ["a"]


async def test_statement_without_end_does_not_outlive_the_database(sqlite_file: SqliteFile) -> None:
    database_file.prepare(sqlite_file.path)
    driver = SqliteDriver(sqlite_file.path, 1.0)
    endless = asyncio.get_running_loop().create_task(driver.transaction(writes=False).execute(text(ENDLESS), None))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await driver.close()
    assert time.monotonic() - began < 10
    with pytest.raises(Exception, match="interrupted"):
        await endless
