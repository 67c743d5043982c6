import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.storage.address import Address, PostgresServer, SqliteFile
from gateway.storage.engine import Database
from gateway.storage.failures import StorageFailed
from gateway.storage.opening import has_wal_reset_bug
from tests.live.processes import free_port
from tests.storage.databases import QUICK
from tests.storage.mounts import mounted

_HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


async def why_not(address: Address) -> str:
    with pytest.raises(StorageFailed) as failed:
        await Database.open(address, QUICK)
    message = str(failed.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


async def test_second_gateway_on_the_same_file(sqlite_file: SqliteFile) -> None:
    first = await Database.open(sqlite_file)
    try:
        command = [sys.executable, "-m", "gateway", "db", "upgrade"]
        environment = {"LETTA_GATEWAY_HOME": str(sqlite_file.path.parent), "PATH": ""}
        second = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, check=False
        )
        await first.ping()
    finally:
        await first.close()
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"letta-gateway: {sqlite_file.path} is in use by another gateway: ")
    assert "set LETTA_GATEWAY_HOME or LETTA_GATEWAY_DATABASE_URL" in line
    await (await Database.open(sqlite_file)).close()


async def test_other_program_holds_a_lock_at_start(sqlite_file: SqliteFile) -> None:
    await (await Database.open(sqlite_file)).close()
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _HOLD, sqlite_file.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    assert "is in use by another gateway" in await why_not(sqlite_file)
    await holder.communicate(b"")
    await (await Database.open(sqlite_file)).close()


async def test_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    path.write_bytes(b"something else" * 1_000)
    assert "is damaged, or no database" in await why_not(SqliteFile(path))
    assert path.read_bytes() == b"something else" * 1_000


async def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be made (Not a directory)" in await why_not(SqliteFile(tmp_path / "file" / "home" / "gateway.db"))


async def test_path_is_a_folder(tmp_path: Path) -> None:
    assert "cannot be opened" in await why_not(SqliteFile(tmp_path))


async def test_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path, "4m") as volume:
        file = SqliteFile(volume.path / "gateway.db")
        await (await Database.open(file)).close()
        volume.make_read_only()
        assert "cannot be " in await why_not(file)
        assert "cannot be made (Read-only file system)" in await why_not(SqliteFile(volume.path / "new.db"))


async def test_disk_that_is_full_at_start(tmp_path: Path) -> None:
    with mounted(tmp_path, "1m") as volume:
        volume.fill()
        assert "the disk is full" in await why_not(SqliteFile(volume.path / "gateway.db"))


async def test_whether_it_may_be_opened_later(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server = PostgresServer(f"postgresql://me@127.0.0.1:{free_port()}/gateway")
    file = SqliteFile(tmp_path / "file" / "home" / "gateway.db")
    for address, passes in ((server, True), (file, False)):
        with pytest.raises(StorageFailed) as raised:
            await Database.open(address)
        assert raised.value.passes is passes


async def test_server_that_is_not_there() -> None:
    message = await why_not(PostgresServer(f"postgresql://me:secret@127.0.0.1:{free_port()}/gateway"))
    assert message == "the database of LETTA_GATEWAY_DATABASE_URL cannot be reached: check its host and port."


async def test_server_that_says_nothing() -> None:
    left = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        message = await why_not(PostgresServer(f"postgresql://me:secret@127.0.0.1:{port}/gateway"))
        await left.wait()
    assert message == "the database of LETTA_GATEWAY_DATABASE_URL did not answer in time: check its host and port."


@pytest.mark.live
async def test_database_that_is_not_there(postgres_address: PostgresServer) -> None:
    url = postgres_address.url.replace("/gateway_", "/none_")
    assert "has no such database: create it." in await why_not(PostgresServer(url))


@pytest.mark.live
async def test_user_that_is_not_known(postgres_address: PostgresServer) -> None:
    url = postgres_address.url.replace("postgres@", "nobody:secret@")
    message = await why_not(PostgresServer(url))
    assert "refused the login" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("version", "has_bug"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_versions_that_may_lose_a_commit(version: tuple[int, int, int], *, has_bug: bool) -> None:
    assert has_wal_reset_bug(version) is has_bug
