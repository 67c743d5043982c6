import asyncio
from collections.abc import Callable

import pytest

from gateway.errors import ConversationBusy, ShuttingDown
from gateway.metrics import Metrics
from gateway.shared_state.locks import Lease
from gateway.shared_state.memory import MemoryLocks


def locks(*, depth: int = 8, wait: float = 5.0) -> MemoryLocks:
    return MemoryLocks(depth=lambda: depth, wait=wait, metrics=Metrics())


def waiting(held: MemoryLocks) -> float:
    (sample,) = next(iter(held._metrics.waiting.collect())).samples
    return float(sample.value)


def asking(held: MemoryLocks, got: list[str], name: str) -> "asyncio.Task[None]":
    async def ask() -> None:
        await held.acquire("t")
        got.append(name)

    return asyncio.get_running_loop().create_task(ask())


async def until(so: Callable[[], object]) -> None:
    async with asyncio.timeout(2):
        while not so():  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0)


async def test_first_come_first_served() -> None:
    held, got = locks(), list[str]()
    await held.acquire("t")
    tasks = [asking(held, got, name) for name in "abc"]
    await until(lambda: waiting(held) == 3)
    for count in range(1, 4):
        held.release(Lease("t"))
        await until(lambda count=count: len(got) == count)  # type: ignore[misc]
    await asyncio.gather(*tasks)
    assert got == ["a", "b", "c"]
    assert await held.is_taken("t")
    held.release(Lease("t"))
    assert (await held.is_taken("t"), len(held), waiting(held)) == (False, 0, 0)


async def test_threads_do_not_wait_for_each_other() -> None:
    held = locks()
    for thread in "abc":
        await held.acquire(thread)
    assert len(held) == 3


async def test_too_many_wait() -> None:
    held, got = locks(depth=1), list[str]()
    await held.acquire("t")
    first = asking(held, got, "a")
    await until(lambda: waiting(held) == 1)
    with pytest.raises(ConversationBusy):
        await held.acquire("t")
    held.release(Lease("t"))
    await first


async def test_wait_that_is_too_long_leaves_no_place_behind() -> None:
    held = locks(wait=0.02)
    await held.acquire("t")
    with pytest.raises(ConversationBusy):
        await held.acquire("t")
    assert waiting(held) == 0
    held.release(Lease("t"))
    assert len(held) == 0


async def test_whoever_gives_up_at_the_hand_over_hands_on() -> None:
    held, got = locks(), list[str]()
    await held.acquire("t")
    leaves, stays = asking(held, got, "a"), asking(held, got, "b")
    await until(lambda: waiting(held) == 2)
    held.release(Lease("t"))
    leaves.cancel()
    await stays
    assert got == ["b"]


async def test_waits_are_refused() -> None:
    held, got = locks(), list[str]()
    await held.acquire("t")
    task = asking(held, got, "a")
    await until(lambda: waiting(held) == 1)
    held.refuse_waiting(ShuttingDown())
    with pytest.raises(ShuttingDown):
        await task
    assert await held.is_taken("t"), "whoever has it goes on"
