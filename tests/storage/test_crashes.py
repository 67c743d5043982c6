"""A gateway that is killed in the midst of writing, as ``kill -9`` or the kernel do."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select, text

from gateway.storage.address import SqliteFile
from gateway.storage.tables import waiting_calls
from tests.storage.databases import opened

ROUNDS = 30
ROOT = Path(__file__).parents[2]


async def test_killed_at_any_moment_keeps_what_was_acknowledged_and_nothing_by_halves(tmp_path: Path) -> None:
    path, acks = tmp_path / "gateway.db", tmp_path / "acks"
    command: list[str | Path] = [sys.executable, "-m", "tests.storage.crashing_writer", path, acks, str(ROUNDS)]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr
    acknowledged = acks.read_text().split()
    assert "damaged" not in acknowledged
    assert len({name.split("-")[0] for name in acknowledged}) >= ROUNDS * 2 // 3
    async with opened(SqliteFile(path)) as database, database.read() as connection:
        assert (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() == ["ok"]
        found = set((await connection.execute(select(waiting_calls.c.call_id))).scalars())
    assert {f"{name}-{half}" for name in acknowledged for half in "ab"} <= found
    assert {call_id[:-1] + "a" for call_id in found} == {call_id[:-1] + "a" for call_id in found if call_id[-1] == "a"}
    assert len(found) % 2 == 0
    assert len(found) <= 2 * (len(acknowledged) + ROUNDS), "at most one per crash was written and not acknowledged"


async def test_disk_that_fails_to_sync_acknowledges_nothing(tmp_path: Path) -> None:
    path, acks = tmp_path / "gateway.db", tmp_path / "acks"
    async with opened(SqliteFile(path)):
        pass
    strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync")
    inject = (*strace, "-e", "inject=fsync,fdatasync:error=EIO:when=20+")
    if await asyncio.to_thread(lambda: not can_run(*inject, "true")):
        pytest.skip("strace cannot be used here")
    command: list[str | Path] = [*inject, sys.executable, "-m", "tests.storage.crashing_writer", path, acks]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    )
    assert done.stdout.splitlines()[-1:] == ["I/O error"], done.stderr
    acknowledged = acks.read_text().split()
    assert acknowledged
    async with opened(SqliteFile(path)) as database, database.read() as connection:
        assert (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() == ["ok"]
        found = set((await connection.execute(select(waiting_calls.c.call_id))).scalars())
    assert {f"{name}-{half}" for name in acknowledged for half in "ab"} <= found


def can_run(*command: str) -> bool:
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False
