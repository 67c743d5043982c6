import asyncio
import time

from gateway import keys
from gateway.letta.scripted import ScriptedBackend
from gateway.server.lifecycle import LAG_PERIOD
from tests.server.running import serving


async def test_backend_is_closed_after_the_background_tasks() -> None:
    backend = ScriptedBackend()
    seen: list[bool] = []
    async with serving(backend=backend) as gateway:

        async def linger() -> None:
            await asyncio.sleep(0.05)
            seen.append(backend.closed)

        gateway.app[keys.TASKS].spawn(linger(), "linger")
        assert not backend.closed
    assert seen == [False]
    assert backend.closed


async def test_tasks_that_do_not_end_are_cancelled() -> None:
    async with serving() as gateway:
        task = gateway.app[keys.TASKS].spawn(asyncio.sleep(3_600), "sleep")
        started = time.monotonic()
    assert task.cancelled()
    assert time.monotonic() - started < 4


async def test_loop_that_stands_still_is_measured() -> None:
    async with serving() as gateway:
        await asyncio.sleep(0.01)
        time.sleep(LAG_PERIOD + 0.15)  # noqa: ASYNC251 - that is the point
        await asyncio.sleep(0.01)
        text = gateway.exposed()
    count = next(line for line in text.splitlines() if line.startswith("letta_gateway_event_loop_lag_seconds_count"))
    below = next(line for line in text.splitlines() if 'lag_seconds_bucket{le="0.1"}' in line)
    assert float(count.split()[1]) >= 1
    assert float(below.split()[1]) < float(count.split()[1])
