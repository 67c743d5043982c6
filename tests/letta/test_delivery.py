import asyncio

import pytest

from gateway.letta.backend import always_ready
from gateway.letta.delivery import Delivery
from gateway.translation.agent_events import Batch, TextDelta

A: Batch = [TextDelta("a")]
B: Batch = [TextDelta("b")]


class Taker:
    """Takes batches, and is full after each where it is ``slow``."""

    def __init__(self, *, slow: bool = False) -> None:
        self.taken: list[Batch] = []
        self.emptied = asyncio.Event()
        self._slow = slow

    def take(self, batch: Batch) -> bool:
        self.taken.append(batch)
        return not self._slow

    async def ready(self) -> None:
        await self.emptied.wait()
        self.emptied.clear()


def assert_refused(delivery: Delivery) -> None:
    assert not delivery.hand(A)


def nothing() -> None:
    """Have nothing to hand on."""


async def test_batches_are_taken_by_the_call_until_the_end() -> None:
    delivery, taker = Delivery(), Taker()
    running = asyncio.get_running_loop().create_task(delivery.run(taker.take, always_ready, nothing))
    await asyncio.sleep(0)
    assert delivery.hand(A)
    assert delivery.hand(B)
    assert taker.taken == [A, B]
    delivery.end()
    assert not delivery.takes
    await running


async def test_what_came_before_is_handed_on_first() -> None:
    delivery, taker = Delivery(), Taker()
    before = [A, B]

    def hand_on() -> None:
        while before and delivery.hand(before.pop(0)):
            pass
        delivery.end()

    await delivery.run(taker.take, always_ready, hand_on)
    assert taker.taken == [A, B]


async def test_slow_taker_is_waited_for_and_then_asked_again() -> None:
    delivery, taker = Delivery(), Taker(slow=True)
    rounds = []
    running = asyncio.get_running_loop().create_task(
        delivery.run(taker.take, taker.ready, lambda: rounds.append(len(taker.taken)))
    )
    await asyncio.sleep(0)
    for batch in (A, B):
        assert not delivery.hand(batch)
        assert not delivery.takes
        await asyncio.sleep(0.01)
        assert not delivery.takes  # it is not ready
        taker.emptied.set()
        await asyncio.sleep(0.01)
        assert delivery.takes
    assert rounds == [0, 1, 2]
    delivery.end()
    await running


async def test_what_the_taker_raises_ends_the_delivery() -> None:
    delivery = Delivery()

    def take(_: Batch) -> bool:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await delivery.run(take, always_ready, lambda: assert_refused(delivery))
    assert not delivery.takes


async def test_failure_is_raised_once_and_for_the_first_error() -> None:
    delivery, taker = Delivery(), Taker()
    running = asyncio.get_running_loop().create_task(delivery.run(taker.take, always_ready, nothing))
    await asyncio.sleep(0)
    delivery.fail(KeyError("first"))
    delivery.fail(ValueError("second"))
    delivery.end()
    with pytest.raises(KeyError):
        await running


async def test_delivery_that_is_left_takes_nothing() -> None:
    delivery, taker = Delivery(), Taker()
    running = asyncio.get_running_loop().create_task(delivery.run(taker.take, always_ready, nothing))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not delivery.takes
    delivery.fail(KeyError("nobody waits"))
    delivery.end()
