"""Opens turns, to be killed after they ended without the database: ``python -m tests.faults.killed_ledger URL``.

It says which turns it has opened, waits for a line, closes them, and says how many of them wait to be written.
"""

import asyncio
import sys
import time
from typing import Final

import structlog

from gateway.accounts.profiles import Budget
from gateway.storage.address import PostgresServer
from gateway.storage.engine import Database
from tests.accounts.ledgers import USED, House
from tests.storage.databases import QUICK

TURNS: Final = 5


async def _main(url: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    house = House(await Database.open(PostgresServer(url), QUICK), name="killed", now=time.time())
    await house.ledger.start()
    users = [await house.user(f"anna-{number}", Budget(10**12, "month")) for number in range(TURNS)]
    opened = [await house.open(user) for user in users]
    _say(*opened)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(house.ledger.close(turn_id, USED, "complete") for turn_id in opened))
    _say(house.ledger.backlog().turns)
    await asyncio.Event().wait()


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
