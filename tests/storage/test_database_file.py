import os
import stat
from pathlib import Path

from gateway.storage import database_file
from gateway.storage.address import SqliteFile
from tests.storage.databases import opened


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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
    database_file.prepare(path)
    assert mode(path) == 0o600


def test_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    database_file.prepare(tmp_path / "gateway.db")
    assert mode(tmp_path) == 0o755


def test_file_that_is_there_keeps_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    path.write_bytes(b"something")
    database_file.prepare(path)
    assert path.read_bytes() == b"something"


def test_another_file_of_the_same_name_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    assert database_file.identity(path) is None
    path.touch()
    first = database_file.identity(path)
    assert first == database_file.identity(path)
    path.rename(tmp_path / "old.db")
    path.touch()
    assert database_file.identity(path) not in (None, first)
