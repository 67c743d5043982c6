import asyncio
import time
from functools import partial

from gateway.server.turnstile import PER_ROUND, Turnstile


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


async def test_alone_nobody_waits() -> None:
    turnstile = Turnstile(2)
    for _ in range(5):
        assert turnstile.enters()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_crowd_comes_in_a_few_at_a_time_in_the_order_of_its_coming() -> None:
    turnstile, came, now = Turnstile(3), list[tuple[int, int]](), 0

    def act(number: int) -> None:
        came.append((number, now))

    for number in range(20):
        if turnstile.enters():
            act(number)
        else:
            turnstile.wait(partial(act, number))
    assert len(came) == 3
    while len(came) < 20:
        now += 1
        await asyncio.sleep(0)
    assert [number for number, _ in came] == list(range(20))
    assert max(sum(at == when for _, at in came) for when in range(now + 1)) <= 3


async def test_newcomer_stands_behind_those_who_wait() -> None:
    turnstile, came = Turnstile(1), list[str]()
    assert turnstile.enters()
    turnstile.wait(partial(came.append, "first"))
    turnstile.wait(partial(came.append, "second"))
    await asyncio.sleep(0)
    assert not turnstile.enters()
    turnstile.wait(partial(came.append, "newcomer"))
    for _ in range(4):
        await asyncio.sleep(0)
    assert came == ["first", "second", "newcomer"]


async def test_what_is_under_way_goes_on_between_the_rounds_of_a_crowd() -> None:
    turnstile, gaps, left = Turnstile(), list[float](), 100

    def act() -> None:
        nonlocal left
        busy(0.002)
        left -= 1

    for _ in range(left):
        turnstile.wait(act)
    assert not turnstile.enters()
    before = time.perf_counter()
    while left:
        await asyncio.sleep(0)
        gaps.append(time.perf_counter() - before)
        before = time.perf_counter()
    assert len(gaps) >= 100 // PER_ROUND
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.05


async def test_quiet_turnstile_costs_the_loop_nothing() -> None:
    turnstile = Turnstile()
    assert turnstile.enters()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not turnstile._is_turning


async def test_one_that_fails_holds_nobody_up() -> None:
    turnstile, came, told = Turnstile(1), list[str](), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    def fails() -> None:
        raise ZeroDivisionError

    assert turnstile.enters()
    turnstile.wait(fails)
    turnstile.wait(partial(came.append, "next"))
    for _ in range(4):
        await asyncio.sleep(0)
    assert came == ["next"]
    assert [type(error) for error in told] == [ZeroDivisionError]
