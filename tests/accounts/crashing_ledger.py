"""Takes turns until it is killed: ``python -m tests.accounts.crashing_ledger FILE ACKS ROUNDS [SEED]``.

What Letta saw, and what was acknowledged, is in the file ACKS: ``sent ID TOKENS`` before a turn is closed, ``begun ID``
and ``settled ID`` once the ledger said so, ``unsent ID`` before one is taken back. Each round is a fork, so that what
takes long, the imports, is done once; each begins with the reconciliation of what the one before left.
"""

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from sqlalchemy import text

from gateway.accounts.profiles import Budget
from gateway.errors import BudgetHeld
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.translation.agent_events import Usage
from tests.accounts.ledgers import House

CLIENTS = 6
USERS = ("anna", "ben", "local")


class Acks:
    """The file that outlives every crash: a line is one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


async def _run(path: Path, acks: Acks, round_number: int) -> None:
    database = await Database.open(SqliteFile(path))
    async with database.read() as connection:
        if (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() != ["ok"]:
            acks.note("damaged")
    house = House(database, name=f"round-{round_number}", now=time.time())
    house.letta.counts = sent_before(acks.path)
    await house.ledger.start()
    for user in USERS[:2]:
        if await house.profiles.find(user) is None:
            await house.user(user, Budget(10**12, "day"))
    await asyncio.gather(*(_client(house, acks, round_number, number) for number in range(CLIENTS)))


async def _client(house: House, acks: Acks, round_number: int, number: int) -> None:
    chance = random.Random(f"{round_number} {number}")
    while True:
        try:
            turn_id = await house.open(chance.choice(USERS))
        except BudgetHeld:  # as long as no turn of that user tells what one costs
            await asyncio.sleep(0.001)
            continue
        acks.note("begun", turn_id)
        if chance.random() < 0.1:
            acks.note("unsent", turn_id)
            await house.ledger.close(turn_id, None, "unsent")
            continue
        tokens = chance.randrange(1, 1_000)
        acks.note("sent", turn_id, tokens)
        await asyncio.sleep(chance.choice((0, 0, 0.002)))
        await house.ledger.close(turn_id, Usage(tokens, 1), "complete")
        acks.note("settled", turn_id)


def sent_before(path: Path) -> dict[str, Usage]:
    """Return what Letta saw of turns: it outlives the gateway."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {word[1]: Usage(int(word[2]), 1) for word in words if word[0] == "sent"}


def _crash(path: Path, acks: Acks, round_number: int, chance: random.Random) -> None:
    awaited = (b"", b"begun", b"settled", b"settled")[round_number % 4]  # one crashes while starting
    before = acks.path.read_bytes().count(awaited)
    child = os.fork()
    if not child:
        asyncio.run(_run(path, acks, round_number))
        os._exit(1)
    while awaited and acks.path.read_bytes().count(awaited) == before and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        raise RuntimeError(f"round {round_number} ended by itself: {status}")


def _main(path: Path, acks_path: Path, rounds: str, seed: str = "1") -> None:
    acks, chance = Acks(acks_path), random.Random(seed)
    for number in range(int(rounds)):
        _crash(path, acks, number, chance)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
