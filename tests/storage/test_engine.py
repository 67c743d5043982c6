import asyncio
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import IntegrityError

from gateway.errors import StorageUnavailable
from gateway.storage.address import Address, PostgresServer, SqliteFile
from gateway.storage.engine import Database, StorageLimits
from gateway.storage.tables import outcomes
from tests.live.postgres import Postgres
from tests.server.recorded_logs import recorded_logs
from tests.storage.databases import QUICK, opened
from tests.storage.mounts import mounted

# A statement that takes its time: far longer than a step may.
_SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) SELECT max(i) FROM n"


def row(key: str, body: bytes = b"b") -> dict[str, Any]:
    return {
        "owner": "o",
        "key": key,
        "request": b"r",
        "status": 200,
        "content_type": "t",
        "body": body,
        "ended_at": 1.5,
    }


async def write(database: Database, key: str, body: bytes = b"b") -> None:
    async with database.write() as connection:
        await connection.execute(insert(outcomes), [row(key, body)])


async def keys(database: Database) -> list[str]:
    async with database.read() as connection:
        return list((await connection.execute(select(outcomes.c.key).order_by(outcomes.c.key))).scalars())


@pytest.fixture
async def quick(address: Address) -> AsyncIterator[Database]:
    async with opened(address, QUICK) as found:
        yield found


async def why_not(database: Database, key: str = "x", body: bytes = b"b") -> str:
    """Return why a write is refused, which it is in time and without holding up the loop."""
    begin = time.monotonic()
    with pytest.raises(StorageUnavailable) as raised:
        await write(database, key, body)
    assert time.monotonic() - begin < 5
    return raised.value.reason


# Transactions --------------------------------------------------------------------------------------------------------


async def test_block_that_ends_is_committed_and_one_that_raises_is_not(database: Database) -> None:
    await write(database, "1")

    async def fail() -> None:
        async with database.write() as connection:
            await connection.execute(insert(outcomes), [row("2")])
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    await write(database, "3")
    assert await keys(database) == ["1", "3"]


async def test_bug_is_not_taken_for_a_broken_database(database: Database) -> None:
    await write(database, "1")
    with pytest.raises(IntegrityError) as raised:
        await write(database, "1", b"secret")
    assert "secret" not in str(raised.value)
    await write(database, "2")
    assert await keys(database) == ["1", "2"]


async def test_what_is_written_is_there_for_the_next_start(address: Address) -> None:
    async with opened(address) as database:
        await write(database, "1")
    async with opened(address) as database:
        assert await keys(database) == ["1"]


async def test_many_at_once(database: Database) -> None:
    await asyncio.gather(*(write(database, f"{number:03}") for number in range(60)))
    assert await keys(database) == [f"{number:03}" for number in range(60)]


async def test_callers_that_are_cancelled_anywhere_leave_all_or_nothing_and_no_harm(database: Database) -> None:
    chance = random.Random(7)

    async def two(number: int) -> None:
        async with database.write() as connection:
            await connection.execute(insert(outcomes), [row(f"{number}a")])
            await asyncio.sleep(0)
            await connection.execute(insert(outcomes), [row(f"{number}b")])

    async def cancelled(number: int) -> bool:
        task = asyncio.get_running_loop().create_task(two(number))
        await asyncio.sleep(chance.random() * 0.03)
        task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0] is None

    done: list[bool] = []
    for first in range(0, 60, 3):
        done += await asyncio.gather(*(cancelled(first + offset) for offset in range(3)))
    found = set(await keys(database))
    for number, ended in enumerate(done):
        assert (f"{number}a" in found) == (f"{number}b" in found)
        assert not ended or f"{number}a" in found
    assert not all(done)
    await database.ping()


async def test_only_connection_of_sqlite_outlives_cancellations(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        for step in range(20):
            task = asyncio.get_running_loop().create_task(write(database, f"{step}"))
            await asyncio.sleep(step * 0.0005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                await asyncio.to_thread(_look, sqlite_file.path)


def _look(path: Path) -> None:
    connection = sqlite3.connect(path, timeout=0)
    try:
        connection.execute("SELECT count(*) FROM outcomes").fetchone()
    finally:
        connection.close()


async def test_closed_database(database: Database) -> None:
    await database.close()
    assert await why_not(database) == "closed"


async def test_close_waits_for_what_is_under_way(address: Address) -> None:
    database = await Database.open(address)
    under_way = asyncio.get_running_loop().create_task(write(database, "1"))
    await asyncio.sleep(0)
    await database.close()
    await under_way
    async with opened(address) as database:
        assert await keys(database) == ["1"]


async def test_who_holds_the_database_too_long_does_not_hold_up_its_end(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file, QUICK) as database, database.read():
        with recorded_logs() as logs:
            await database.close()
    assert [line["event"] for line in logs.lines] == ["database closed under open transactions"]


# What goes wrong -----------------------------------------------------------------------------------------------------


async def test_place_that_does_not_come_free(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file, QUICK) as database:
        async with database.read():
            assert await why_not(database) == "busy"
        await write(database, "1")


async def test_statement_over_its_deadline_does_not_block_the_loop(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file, QUICK) as database:
        slow = asyncio.get_running_loop().create_task(think(database))
        lag = 0.0
        while not slow.done():
            begin = time.monotonic()
            await asyncio.sleep(0.01)
            lag = max(lag, time.monotonic() - begin)
        with pytest.raises(StorageUnavailable) as raised:
            await slow
        assert raised.value.reason == "slow"
        assert lag < 0.25
        await recovers(database)


async def think(database: Database) -> None:
    async with database.read() as connection:
        await connection.execute(text(_SLOW))


async def recovers(database: Database) -> None:
    async with asyncio.timeout(15):
        while True:
            try:
                await write(database, "after")
            except StorageUnavailable:
                await asyncio.sleep(0.05)
            else:
                break
    assert "after" in await keys(database)


async def test_full_disk_refuses_writes_answers_reads_and_recovers(tmp_path: Path) -> None:
    with mounted(tmp_path, "4m") as volume, recorded_logs() as logs:
        async with opened(SqliteFile(volume.path / "gateway.db"), QUICK) as database:
            await write(database, "kept")
            filler = volume.fill()
            refused = [f"{number:03}" for number in range(40) if await is_refused(database, f"{number:03}", 100_000)]
            assert refused
            assert await why_not(database, "large", bytes(100_000)) == "full"
            found = await keys(database)
            assert "kept" in found
            assert not set(refused) & set(found)
            filler.unlink()
            await write(database, "after")
            async with database.read() as connection:
                assert (await connection.execute(text("PRAGMA integrity_check"))).scalar_one() == "ok"
    events = [(line["event"], line.get("reason")) for line in logs.lines if line["logger"] == "gateway.storage"]
    assert ("database unavailable", "full") in events
    assert ("database available", None) in events


async def is_refused(database: Database, key: str, size: int) -> bool:
    try:
        await write(database, key, bytes(size))
    except StorageUnavailable:
        return True
    return False


async def test_outage_is_one_line_in_the_log(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        with recorded_logs() as logs:
            for _ in range(5):
                assert await why_not(database) == "gone"
            moved.rename(sqlite_file.path)
            await write(database, "1")
            await write(database, "2")
    assert [(line["event"], line.get("reason")) for line in logs.lines if line["level"] != "debug"] == [
        ("database unavailable", "gone"),
        ("database available", None),
    ]


async def test_every_failure_is_told(sqlite_file: SqliteFile) -> None:
    told: list[None] = []
    async with opened(sqlite_file) as database:
        database.on_failure = lambda: told.append(None)
        await write(database, "1")
        assert told == []
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        for _ in range(3):
            assert await why_not(database) == "gone"
        assert len(told) == 3
        moved.rename(sqlite_file.path)
        await write(database, "2")
    assert len(told) == 3


async def test_deleted_file_takes_no_write_that_would_be_lost(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        await write(database, "1")
        sqlite_file.path.unlink()
        assert await why_not(database) == "gone"
        assert await keys(database) == ["1"]


async def test_damaged_page(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        for number in range(200):
            await write(database, f"{number}", bytes(1_000))
    with sqlite_file.path.open("r+b") as file:
        file.seek(-4_096 * 40, os.SEEK_END)  # behind the schema
        file.write(b"\xff" * 4_096 * 40)
    async with opened(sqlite_file) as database:
        with pytest.raises(StorageUnavailable) as raised:
            async with database.read() as connection:
                await connection.execute(select(func.sum(func.length(outcomes.c.body))))
        assert raised.value.reason == "damaged"


# PostgreSQL ----------------------------------------------------------------------------------------------------------


@pytest.mark.live
async def test_table_that_somebody_has_locked(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as other, opened(postgres_address, QUICK) as database:
        async with other.write() as connection:
            await connection.execute(text("LOCK TABLE outcomes"))
            assert await why_not(database) == "slow"
        await recovers(database)


@pytest.mark.live
async def test_server_that_was_restarted(postgres_address: PostgresServer, postgres: Postgres) -> None:
    async with opened(postgres_address, QUICK) as database:
        await asyncio.gather(*(write(database, f"{number}") for number in range(4)))
        name = postgres_address.url.rpartition("/")[2].partition("?")[0]
        ended = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
        assert int(await asyncio.to_thread(postgres.run, ended)) >= 1
        await asyncio.gather(*(write(database, f"{number}") for number in range(4, 8)))
        assert len(await keys(database)) == 8


@pytest.mark.live
async def test_connection_to_a_server_that_may_not_be_written_any_more_is_not_kept(
    postgres_address: PostgresServer,
) -> None:
    async with opened(postgres_address, StorageLimits(connections=1)) as database:
        async with database.write() as connection:
            await connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
        assert await why_not(database) == "read-only"
        await write(database, "1")
        assert await keys(database) == ["1"]


@pytest.mark.live
async def test_server_that_goes_away_within_a_transaction(postgres_address: PostgresServer, postgres: Postgres) -> None:
    async def end_midway(database: Database) -> None:
        async with database.write() as connection:
            await connection.execute(insert(outcomes), [row("1")])
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            await asyncio.to_thread(postgres.run, f"SELECT pg_terminate_backend({pid})")
            await connection.execute(insert(outcomes), [row("2")])

    async with opened(postgres_address, QUICK) as database:
        with pytest.raises(StorageUnavailable):
            await end_midway(database)
        assert await keys(database) == []


@pytest.mark.live
async def test_server_that_hangs_in_the_midst_of_a_transaction(postgres_address: PostgresServer) -> None:
    pids: list[int] = []

    async def hang_midway(database: Database) -> None:
        async with database.write() as connection:
            pids.append((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())
            os.kill(pids[0], signal.SIGSTOP)
            await connection.execute(insert(outcomes), [row("1")])

    async with opened(postgres_address, QUICK) as database:
        begin = time.monotonic()
        try:
            with pytest.raises(StorageUnavailable) as raised:
                await hang_midway(database)
            assert raised.value.reason == "slow"
            assert time.monotonic() - begin < 6
            await recovers(database)
        finally:
            os.kill(pids[0], signal.SIGCONT)
        assert await keys(database) == ["after"]


@pytest.mark.live
async def test_two_gateways_on_one_server(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as one, opened(postgres_address) as other:
        assert one.is_shared
        await write(one, "1")
        assert await keys(other) == ["1"]
