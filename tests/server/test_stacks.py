import asyncio
import os
import signal
import sys
from pathlib import Path

from gateway.server.stacks import SIGNAL, tasks_told, told_when_asked
from tests.server.subprocesses import gateway_process
from tests.server.upstream import Upstream
from tests.server.wire import until

STUCK = """
import asyncio, time
from gateway.server.stacks import told_when_asked

async def stands_still():
    with told_when_asked():
        print("now", flush=True)
        time.sleep(30)

asyncio.run(stands_still())
"""


async def _wait(gate: asyncio.Event) -> None:
    await gate.wait()


async def test_tasks_are_counted_by_where_they_wait() -> None:
    gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(_wait(gate))
        await asyncio.sleep(0)
        told = tasks_told()
        gate.set()
    assert told.startswith("4 tasks:\n")
    assert '     3 _wait: File "' in told
    assert "locks.py" in told


async def test_gateway_that_serves_says_where_it_is_and_goes_on() -> None:
    async with Upstream() as letta, gateway_process(letta.url) as gateway:
        gateway.signal(SIGNAL)
        await until(lambda: " tasks:\n" in gateway.errors)
        assert (await gateway.ask("GET", "/health")).status == 200
        assert "Current thread 0x" in gateway.errors
        assert "/gateway/server/serve.py" in gateway.errors


async def test_loop_that_stands_still_is_told_of_too() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        STUCK,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert await process.stdout.readline() == b"now\n"
        process.send_signal(SIGNAL)
        async with asyncio.timeout(5):
            assert b"most recent call first" in await process.stderr.readline()
            assert b"in stands_still" in await process.stderr.readline()
    finally:
        process.kill()
        await process.wait()


async def test_signal_is_given_back() -> None:
    before = signal.getsignal(SIGNAL)
    with told_when_asked():
        assert signal.getsignal(SIGNAL) != before
    assert signal.getsignal(SIGNAL) in (before, signal.SIG_DFL)
