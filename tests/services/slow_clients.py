"""Slow heads, slow bodies and slow readers by slowhttptest, and an ordinary client who is served meanwhile (B13)."""

import asyncio
import contextlib
import re
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from tests.server.wire import Connection

ATTACKER: Final = "127.0.0.1"
ELSEWHERE: Final = "127.0.0.2"
"""Where an ordinary client asks from."""
PROBES: Final = 10
"""Connections by which slowhttptest looks how the server fares, one a second."""
ROUND: Final = 50
NOISE: Final = 0.02
"""Seconds that the scheduler of a busy machine costs now and then; a p99 below them says nothing."""

Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]


class Attack(msgspec.Struct, frozen=True):
    """What slowhttptest does to which path, how many connections it opens each second, and how long one may last."""

    path: str
    options: tuple[str, ...]
    connections: int
    bound: float
    """Seconds after which the server has closed a connection."""
    held: tuple[int, int]
    """How many are held at most: as many as tell that it was an attack, and no more than are let in."""
    a_second: int = 30
    has_key: bool = False

    @property
    def over(self) -> float:
        """Return after how many seconds the last connection is closed."""
        return self.connections / self.a_second + self.bound


class Ordinary:
    """A client who asks again and again, from another address than the attackers."""

    def __init__(self, connect: Connect, asked: bytes) -> None:
        self._connect = connect
        self._asked = asked
        self.seconds: list[float] = []

    async def ask_for(self, seconds: float) -> None:
        """Ask on a kept connection, as long as the server keeps it; what is not answered well ends the test."""
        over = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < over:
            async with self._connect() as connection:
                await self._ask_on(connection, over)

    async def _ask_on(self, connection: Connection, over: float) -> None:
        now = asyncio.get_running_loop().time
        is_open = True
        while is_open and now() < over:
            started = now()
            await connection.send(self._asked)
            answer = await connection.answer()
            assert answer.status == 200, answer
            self.seconds.append(now() - started)
            is_open = answer.header("connection") != "close"
            await asyncio.sleep(0.004)

    def p99(self) -> float:
        """Return the middle one of the p99s of rounds: one bad moment of the machine is not the attack's."""
        rounds = [self.seconds[at : at + ROUND] for at in range(0, len(self.seconds) - ROUND + 1, ROUND)]
        assert rounds, self.seconds
        return statistics.median(statistics.quantiles(one, n=100, method="inclusive")[-1] for one in rounds)


async def withstood(origin: str, attack: Attack, connect: Connect, asked: bytes, folder: Path) -> None:
    """See that each connection of an attack is closed in its time, and others' p99 less than doubles.

    ``asked`` is what an ordinary client asks for, with a key.
    """
    port = int(origin.rpartition(":")[2])
    quiet, busy = Ordinary(connect, asked), Ordinary(connect, asked)
    await quiet.ask_for(6)
    async with attacking(origin, attack, key_of(asked), folder), asyncio.TaskGroup() as group:
        group.create_task(busy.ask_for(attack.over))
        counts = await watch(port, attack)
    await quiet.ask_for(6)  # what the machine does otherwise may have changed
    print(f"held {counts}; p99 {quiet.p99() * 1e3:.1f} ms in quiet, {busy.p99() * 1e3:.1f} ms in attack")
    least, most = attack.held
    assert least <= max(counts) <= most + PROBES, counts
    assert counts[-1] <= PROBES, counts
    assert busy.p99() < max(2 * quiet.p99(), NOISE)


def key_of(asked: bytes) -> str:
    """Return the key that a request carries."""
    found = re.search(rb"(?im)^authorization: bearer (\S+)\r$", asked)
    assert found, asked
    return found[1].decode()


@contextlib.asynccontextmanager
async def attacking(origin: str, attack: Attack, key: str, folder: Path) -> AsyncIterator[None]:
    """Run slowhttptest for as long as the context."""
    # It has no option for a header of one's own, and writes what it is given as it is.
    keyed = ("-m", f"*/*\r\nX-Api-Key: {key}") if attack.has_key else ()
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", "19"),  # what the attacker's own machine bears is not the server's
        *("slowhttptest", "-c", str(attack.connections), "-r", str(attack.a_second), "-p", "3", "-l", "600"),
        *("-u", f"{origin}{attack.path}", *attack.options, *keyed),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def held(port: int) -> int:
    """Return how many connections a server's side holds open to the attacker."""
    here, attacker, established = f":{port:04X}", "0100007F:", "01"  # as the kernel writes them
    rows = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return len([1 for row in rows if row[0].endswith(here) and row[1].startswith(attacker) and row[2] == established])


async def watch(port: int, attack: Attack) -> list[int]:
    """Return how many connections were held, now and then, until the last one must be closed."""
    started = asyncio.get_running_loop().time()
    found = []
    while asyncio.get_running_loop().time() - started < attack.over:
        await asyncio.sleep(2)
        found.append(held(port))
    return found
