import asyncio
import inspect
import time

import limits
import pytest
from limits.aio.strategies import MovingWindowRateLimiter

from gateway.shared_state.limits import Limiter, RequestLimits, Windows, memory_limits
from gateway.shared_state.redis_limits import RedisLimits
from tests.shared_state.protocols import asked_of

TWO = limits.parse("2/minute")


@pytest.mark.parametrize("kind", [Limiter, RedisLimits])
def test_each_kind_has_the_whole_protocol(kind: type) -> None:
    for name, method in asked_of(RequestLimits).items():
        given = inspect.getattr_static(kind, name)
        assert inspect.iscoroutinefunction(given) == inspect.iscoroutinefunction(method), name
        assert list(inspect.signature(given).parameters) == list(inspect.signature(method).parameters), name


async def test_exactly_the_limit_at_once() -> None:
    held = memory_limits()
    taken = await asyncio.gather(*(held.take([(limits.parse("100/minute"), "ann")]) for _ in range(200)))
    assert sum(windows[-1].is_granted for windows in taken) == 100


async def test_how_a_window_stands() -> None:
    held = memory_limits()
    (first,) = await held.take([(TWO, "ann")])
    assert (first.is_granted, first.remaining, first.limit) == (True, 1, TWO)
    assert 0 < first.wait <= 60
    await held.take([(TWO, "ann")])
    (refused,) = await held.take([(TWO, "ann")])
    assert (refused.is_granted, refused.remaining) == (False, 0)


async def test_what_one_refuses_has_not_used_up_the_other() -> None:
    held = memory_limits()
    for _ in range(2):
        await held.take([(TWO, "ann")])
    for _ in range(3):
        assert not (await held.take([(TWO, "address"), (TWO, "ann")]))[-1].is_granted
    assert (await held.take([(TWO, "address")]))[-1].remaining == 1


# The windows ---------------------------------------------------------------------------------------------------------


async def test_many_clients_cost_no_more_than_few() -> None:
    limiter = MovingWindowRateLimiter(Windows())
    for number in range(5_000):
        await limiter.hit(TWO, str(number))
    started = time.process_time()
    for number in range(500):
        await limiter.hit(TWO, str(number))
        await limiter.get_window_stats(TWO, str(number))
        await asyncio.sleep(0)
    assert (time.process_time() - started) / 500 < 0.0002


async def test_clients_whose_window_is_over_are_forgotten() -> None:
    windows = Windows()
    for number in range(50):
        assert await windows.acquire_entry(str(number), 1, 1)
        assert not await windows.acquire_entry(str(number), 1, 1)
    assert await windows.acquire_entry("patient", 2, 60)
    await asyncio.sleep(1.05)
    windows._forget_at = 0.0
    assert await windows.acquire_entry("patient", 2, 60)
    assert set(windows.events) == {"patient"}
    assert len(windows.events["patient"]) == 2
    assert await windows.acquire_entry("0", 1, 1)


async def test_more_at_once_than_a_window_holds() -> None:
    windows = Windows()
    assert not await windows.acquire_entry("greedy", 2, 60, amount=3)
    assert await windows.acquire_entry("greedy", 2, 60, amount=2)
    assert not await windows.acquire_entry("greedy", 2, 60)
