import asyncio

import pytest

from gateway.errors import ModelNotFound
from gateway.metrics import Metrics
from gateway.ui.traffic import KEPT, Traffic


def test_intervals_are_what_was_counted_by_the_second() -> None:
    metrics, clock = Metrics(), [1_000.0]
    traffic = Traffic(metrics, lambda: clock[0])
    assert traffic.intervals() == ()
    metrics.requests.labels("/v1/models", "GET", "200").inc(20)
    metrics.requests.labels("/ui/api/overview", "GET", "200").inc(1_000)
    for route in ("/v1/models/{model}",) * 5 + ("/ui/api/overview",) * 9:
        metrics.count_error(ModelNotFound("x"), route)
    metrics.chunks.inc(100)
    clock[0] += 10
    traffic.note()
    (interval,) = traffic.intervals()
    assert (interval.ended_at, interval.requests, interval.errors, interval.chunks) == (1_010.0, 2.0, 0.5, 10.0)


def test_five_minutes_are_kept_and_no_more() -> None:
    clock = [0.0]
    traffic = Traffic(Metrics(), lambda: clock[0])
    for _ in range(3 * KEPT):
        clock[0] += 5
        traffic.note()
    assert len(traffic.intervals()) == KEPT


def test_clock_that_is_put_back_makes_no_interval() -> None:
    clock = [100.0]
    traffic = Traffic(Metrics(), lambda: clock[0])
    clock[0] = 50.0
    traffic.note()
    assert traffic.intervals() == ()


async def test_it_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ui.traffic.PERIOD", 0.01)
    traffic = Traffic(Metrics())
    running = asyncio.get_running_loop().create_task(traffic.run())
    async with asyncio.timeout(5):
        while len(traffic.intervals()) < 3:  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.01)
    running.cancel()
