"""Writes until it is killed: ``python -m tests.storage.crashing_writer FILE ACKS [ROUNDS]``.

What is in the file ACKS was acknowledged. Each round is a fork, so that what takes long, the imports, is done once.
Without rounds it is not killed: it says why the database cannot be used any more, and ends.
"""

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

from sqlalchemy import text

from gateway.conversations.tool_calls import WaitingCall, WaitingCalls
from gateway.errors import StorageUnavailable
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database


def _write_all(path: Path, acks_path: Path, round_number: int) -> None:
    acks = os.open(acks_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        asyncio.run(_write(path, acks, round_number))
    except StorageUnavailable as error:
        print(error.reason, flush=True)


async def _write(path: Path, acks: int, round_number: int) -> None:
    database = await Database.open(SqliteFile(path))
    async with database.read() as connection:
        if (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() != ["ok"]:
            os.write(acks, b"damaged\n")
    calls = WaitingCalls(database)
    for number in itertools.count():
        name = f"{round_number}-{number}"
        await calls.record([_call(f"{name}-a"), _call(f"{name}-b")])
        os.write(acks, f"{name}\n".encode())


def _call(call_id: str) -> WaitingCall:
    return WaitingCall(
        call_id=call_id,
        owner="owner",
        agent_id="agent-1",
        conversation_id=None,
        chat="chat " * 100,
        is_ephemeral=False,
        name="search",
        asked_at=1.5,
    )


def _crash(path: Path, acks_path: Path, round_number: int, chance: random.Random) -> None:
    child = os.fork()
    if not child:
        _write_all(path, acks_path, round_number)
        os._exit(1)
    before = acks_path.stat().st_size if acks_path.exists() else 0
    while round_number % 3 and (not acks_path.exists() or acks_path.stat().st_size == before):
        time.sleep(0.001)  # two of three crash while writing, one while starting
    time.sleep(chance.random() * 0.04)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        raise RuntimeError(f"round {round_number} ended by itself: {status}")


def _main(path: Path, acks_path: Path, *rounds: str) -> None:
    if not rounds:
        _write_all(path, acks_path, 0)
        os._exit(0)  # the database is not closed: that would sync, too
    chance = random.Random(1)
    for number in range(int(rounds[0])):
        _crash(path, acks_path, number, chance)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
