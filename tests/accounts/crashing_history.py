"""Keeps messages until it is killed: ``python -m tests.accounts.crashing_history FILE ACKS ROUNDS``.

What is in the file ACKS was acknowledged: ``ask-`` that a message stands, ``end-`` that its answer does.
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

from gateway.accounts.history import Ended, History, new_exchange
from gateway.accounts.instances import Instances
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database


async def _write(path: Path, acks_path: Path, round_number: int) -> None:
    acks = os.open(acks_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    database = await Database.open(SqliteFile(path))
    async with database.read() as connection:
        if (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() != ["ok"]:
            os.write(acks, b"damaged\n")
    history = History(database, Instances(database, f"round-{round_number}"))
    await history.reconcile()
    for number in itertools.count():
        name = f"{round_number}-{number}"
        exchange = new_exchange(f"user-{number % 3}")
        await history.begin(exchange, name)
        os.write(acks, f"ask-{name}\n".encode())
        await history.note_turn(exchange, f"turn-{name}")
        await history.end(exchange, Ended(status="complete", text=name, reasoning="Hm " * 1_000))
        os.write(acks, f"end-{name}\n".encode())


def _crash(path: Path, acks_path: Path, round_number: int, chance: random.Random) -> None:
    child = os.fork()
    if not child:
        asyncio.run(_write(path, acks_path, round_number))
        os._exit(1)
    before = acks_path.stat().st_size if acks_path.exists() else 0
    while round_number % 4 and (not acks_path.exists() or acks_path.stat().st_size == before):
        time.sleep(0.001)  # three of four crash while writing, one while starting
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        raise RuntimeError(f"round {round_number} ended by itself: {status}")


def _main(path: Path, acks_path: Path, rounds: int) -> None:
    chance = random.Random(5)
    for number in range(rounds):
        _crash(path, acks_path, number, chance)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
