"""B13: slow heads, slow bodies and slow readers at nginx, by slowhttptest; others are served as ever meanwhile."""

import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from tests.bench import targets
from tests.bench.processes import raise_file_limit
from tests.server.wire import Connection
from tests.services.nginx import PROXY, Nginx, nginx

A_SECOND: Final = 30
"""How many connections the attacker opens: few, as it is their patience that is tried here."""
ELSEWHERE: Final = "127.0.0.2"
"""Where an ordinary client asks from."""
PROBES: Final = 3
"""Connections by which slowhttptest looks how the server fares."""
ASKED: Final = targets.Asking(0, "events=2 interval=0 delay=0", stream=False)
ROUND: Final = 50
NOISE: Final = 0.02
"""Seconds that the scheduler of a busy machine costs now and then; a p99 below them says nothing."""


class Attack(msgspec.Struct, frozen=True):
    """What slowhttptest does to which path, how many connections it opens, how long each may last, and is tried."""

    path: str
    options: tuple[str, ...]
    connections: int
    bound: float
    """Seconds after which nginx has closed a connection."""
    are_held: bool = True

    @property
    def over(self) -> float:
        """Return after how many seconds the last connection is closed."""
        return self.connections / A_SECOND + self.bound


ATTACKS: Final = {
    "heads": Attack("/v1/models", ("-H", "-i", "2"), 300, 12),
    "bodies": Attack("/v1/models", ("-B", "-i", "2", "-s", "8192", "-x", "10"), 300, 4, are_held=False),
    "readers": Attack("/api/v1/openapi.json", ("-X", "-w", "1", "-y", "1", "-n", "5", "-z", "1"), 90, 64),
}


class Ordinary:
    """A client who asks again and again, from another address than the attackers."""

    def __init__(self, running: Nginx, asked: bytes) -> None:
        self._running = running
        self._asked = asked
        self.seconds: list[float] = []

    async def ask_for(self, seconds: float) -> None:
        """Ask on a kept connection, as long as nginx keeps it; what is not answered well ends the test."""
        over = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < over:
            async with self._running.connect(ELSEWHERE) as connection:
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


@contextlib.asynccontextmanager
async def site(folder: Path) -> AsyncIterator[tuple[Nginx, bytes]]:
    """Run nginx before a whole gateway; also yields the request of an ordinary client."""
    raise_file_limit()
    with targets.upstream(1) as letta, targets.gateway(letta.port) as gateway:
        async with nginx(folder, gateway.port) as running:
            yield running, gateway.request(ASKED)


@contextlib.asynccontextmanager
async def attacking(running: Nginx, attack: Attack, folder: Path) -> AsyncIterator[None]:
    """Run slowhttptest for as long as the context."""
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", "19"),  # what the attacker's own machine bears is not the server's
        *("slowhttptest", "-c", str(attack.connections), "-r", str(A_SECOND), "-p", "3", "-l", "600"),
        *("-u", f"https://{PROXY}:{running.port}{attack.path}", *attack.options),
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


def held(running: Nginx) -> int:
    """Return how many connections nginx's side holds open to the attacker."""
    here, attacker, established = f":{running.port:04X}", "0100007F:", "01"  # as the kernel writes them
    rows = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return len([1 for row in rows if row[0].endswith(here) and row[1].startswith(attacker) and row[2] == established])


async def watch(running: Nginx, attack: Attack) -> list[int]:
    """Return how many connections were held, now and then, until the last one must be closed."""
    started = asyncio.get_running_loop().time()
    found = []
    while asyncio.get_running_loop().time() - started < attack.over:
        await asyncio.sleep(4)
        found.append(held(running))
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
async def test_slow(tmp_path: Path, attack: Attack) -> None:
    """Each connection is closed in its time, and the p99 of an ordinary client less than doubles."""
    async with site(tmp_path) as (running, asked):
        quiet, busy = Ordinary(running, asked), Ordinary(running, asked)
        await quiet.ask_for(6)
        async with attacking(running, attack, tmp_path), asyncio.TaskGroup() as group:
            group.create_task(busy.ask_for(attack.over))
            counts = await watch(running, attack)
        await quiet.ask_for(6)  # what the machine does otherwise may have changed
        tried = len([line for line in running.requests if line["client"] == PROXY])
    print(
        f"held {counts}; {tried} answers; p99 {quiet.p99() * 1e3:.1f} ms in quiet, {busy.p99() * 1e3:.1f} ms in attack"
    )
    assert counts[-1] <= PROBES, counts
    if attack.are_held:
        assert max(counts) > attack.connections / 2, "it was an attack"
    else:
        assert tried > attack.connections / 2
        assert max(counts) < attack.connections / 2
    assert busy.p99() < max(2 * quiet.p99(), NOISE)
