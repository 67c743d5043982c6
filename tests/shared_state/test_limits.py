import asyncio
import inspect
import time

import limits
import pytest

from gateway.shared_state.limits import FORGET, MemoryLimits, RequestLimits
from gateway.shared_state.redis_limits import RedisLimits
from tests.shared_state.protocols import asked_of

TWO = limits.parse("2/minute")


@pytest.mark.parametrize("kind", [MemoryLimits, RedisLimits])
def test_each_kind_has_the_whole_protocol(kind: type) -> None:
    for name, method in asked_of(RequestLimits).items():
        given = inspect.getattr_static(kind, name)
        assert inspect.iscoroutinefunction(given) == inspect.iscoroutinefunction(method), name
        assert list(inspect.signature(given).parameters) == list(inspect.signature(method).parameters), name


async def test_exactly_the_limit_at_once() -> None:
    held = MemoryLimits()
    taken = await asyncio.gather(*(held.take([(limits.parse("100/minute"), "ann")]) for _ in range(200)))
    assert sum(windows[-1].is_granted for windows in taken) == 100


async def test_how_a_window_stands() -> None:
    held = MemoryLimits()
    (first,) = await held.take([(TWO, "ann")])
    assert (first.is_granted, first.remaining, first.limit) == (True, 1, TWO)
    assert 0 < first.wait <= 60
    await held.take([(TWO, "ann")])
    (refused,) = await held.take([(TWO, "ann")])
    assert (refused.is_granted, refused.remaining) == (False, 0)


async def test_what_one_refuses_has_not_used_up_the_other() -> None:
    held = MemoryLimits()
    for _ in range(2):
        await held.take([(TWO, "ann")])
    for _ in range(3):
        assert not (await held.take([(TWO, "address"), (TWO, "ann")]))[-1].is_granted
    assert (await held.take([(TWO, "address")]))[-1].remaining == 1


# The windows ---------------------------------------------------------------------------------------------------------


async def test_time_of_day_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held, now = MemoryLimits(), time.time
    for _ in range(2):
        await held.take([(TWO, "ann")])
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    (refused,) = await held.take([(TWO, "ann")])
    assert 0 < refused.wait <= 60


async def test_place_is_free_again_when_its_time_is_over() -> None:
    now = 1_000.0
    held = MemoryLimits(lambda: now)
    await held.take([(TWO, "ann")])
    now += 20
    (second,) = await held.take([(TWO, "ann")])
    assert (second.remaining, second.wait) == (0, 40)
    now += 39
    (refused,) = await held.take([(TWO, "ann")])
    assert (refused.is_granted, refused.wait) == (False, 1)
    now += 1
    (third,) = await held.take([(TWO, "ann")])
    assert (third.is_granted, third.remaining, third.wait) == (True, 0, 20)


async def test_many_clients_cost_no_more_than_few() -> None:
    held = MemoryLimits()
    for number in range(5_000):
        await held.take([(TWO, str(number))])
    started = time.process_time()
    for number in range(500):
        await held.take([(TWO, str(number))])
        await asyncio.sleep(0)
    assert (time.process_time() - started) / 500 < 0.0001


async def test_clients_whose_window_is_over_are_forgotten() -> None:
    now = 1_000.0
    held = MemoryLimits(lambda: now)
    for number in range(50):
        await held.take([(limits.parse("1/second"), str(number))])
    await held.take([(TWO, "patient")])
    now += FORGET
    await held.take([(TWO, "patient")])
    assert len(held) == 1
    (third,) = await held.take([(TWO, "patient")])
    assert not third.is_granted
