import logging
import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway.storage import connections
from gateway.storage.address import PostgresServer, SqliteFile
from tests.storage.databases import opened


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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


async def test_files_are_for_our_own_eyes(sqlite_file: SqliteFile) -> None:
    before = os.umask(0)
    try:
        async with opened(sqlite_file):
            files = {path.name: mode(path) for path in sqlite_file.path.parent.iterdir()}
    finally:
        os.umask(before)
    assert mode(sqlite_file.path.parent) == 0o700
    assert files == {"gateway.db": 0o600, "gateway.db-wal": 0o600}


def test_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "restored.db"
    path.write_bytes(b"")
    path.chmod(0o644)
    connections.prepare(path)
    assert mode(path) == 0o600


def test_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    connections.prepare(tmp_path / "gateway.db")
    assert mode(tmp_path) == 0o755


def test_file_that_is_there_keeps_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    path.write_bytes(b"something")
    connections.prepare(path)
    assert path.read_bytes() == b"something"


def test_another_file_of_the_same_name_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    assert connections.identity(path) is None
    path.touch()
    first = connections.identity(path)
    assert first == connections.identity(path)
    path.rename(tmp_path / "old.db")
    path.touch()
    assert connections.identity(path) not in (None, first)


async def test_statements_are_not_logged(sqlite_file: SqliteFile, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with opened(sqlite_file) as database, database.read() as connection:
            await connection.execute(text("SELECT 'secret'"))
    assert "secret" not in caplog.text


@pytest.mark.live
async def test_url_as_libpq_reads_it(postgres_address: PostgresServer) -> None:
    address = PostgresServer(f"{postgres_address.url}&application_name=gateway_test")
    async with opened(address) as database, database.read() as connection:
        assert (await connection.execute(text("SHOW application_name"))).scalar_one() == "gateway_test"
