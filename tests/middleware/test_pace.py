import asyncio
import time

import pytest

from middleware.pace import Turnstile


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


async def test_alone_nobody_waits() -> None:
    turnstile = Turnstile(2)
    entering = turnstile.enter()
    with pytest.raises(StopIteration):
        entering.send(None)


async def test_crowd_comes_in_a_few_at_a_time_in_the_order_of_its_coming() -> None:
    turnstile, rounds, now = Turnstile(3), [], 0

    async def come(number: int) -> None:
        await turnstile.enter()
        rounds.append((number, now))

    guests = [asyncio.get_running_loop().create_task(come(number)) for number in range(20)]
    while not all(guest.done() for guest in guests):
        await asyncio.sleep(0)
        now += 1
    assert [number for number, _ in rounds] == list(range(20))
    assert max(sum(at == when for _, at in rounds) for when in range(now)) <= 3


async def test_who_goes_away_takes_no_place() -> None:
    turnstile, came = Turnstile(1), []

    async def come(number: int) -> None:
        await turnstile.enter()
        came.append(number)

    guests = [asyncio.get_running_loop().create_task(come(number)) for number in range(5)]
    await asyncio.sleep(0)
    guests[2].cancel()
    await asyncio.gather(*guests, return_exceptions=True)
    assert came == [0, 1, 3, 4]


async def test_what_is_under_way_goes_on_between_the_rounds_of_a_crowd() -> None:
    turnstile, gaps = Turnstile(), []

    async def guest() -> None:
        await turnstile.enter()
        busy(0.002)

    guests = [asyncio.get_running_loop().create_task(guest()) for _ in range(100)]
    before = time.perf_counter()
    while not all(one.done() for one in guests):
        await asyncio.sleep(0)
        gaps.append(time.perf_counter() - before)
        before = time.perf_counter()
    assert len(gaps) > 20
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.05


async def test_quiet_turnstile_costs_the_loop_nothing() -> None:
    turnstile = Turnstile()
    await turnstile.enter()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not turnstile._is_turning
