import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from gateway.errors import StorageUnavailable
from gateway.storage import steps as module
from gateway.storage.steps import Steps
from gateway.tasks import TaskSet


@pytest.fixture
async def tasks() -> AsyncIterator[TaskSet]:
    made = TaskSet()
    yield made
    await made.close(1)


@pytest.fixture
def steps(tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Steps on PostgreSQL."""
    monkeypatch.setattr(module, "_TO_STOP", 0.05)
    return Steps(tasks, 0.1, may_cancel=True)


@pytest.fixture
def patient(tasks: TaskSet) -> Steps:
    """Steps on SQLite."""
    return Steps(tasks, 0.1, may_cancel=False)


async def test_value_comes_back(steps: Steps) -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await steps.run(work()) == 7


async def test_bug_comes_back_as_it_is(steps: Steps) -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await steps.run(work())


async def test_state_of_the_database_is_translated(steps: Steps) -> None:
    async def work() -> None:
        raise ConnectionResetError

    with pytest.raises(StorageUnavailable) as raised:
        await steps.run(work())
    assert raised.value.reason == "unreachable"


async def test_work_goes_on_to_its_end_when_the_caller_is_cancelled(steps: Steps) -> None:
    done = asyncio.Event()
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()
        done.set()

    caller = asyncio.get_running_loop().create_task(steps.run(work()))
    for _ in range(3):
        await asyncio.sleep(0.005)
        caller.cancel()
        await asyncio.sleep(0.005)
        assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done.is_set()


async def test_work_that_does_not_end_is_cancelled_at_the_deadline(steps: Steps) -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    begin = time.monotonic()
    with pytest.raises(StorageUnavailable) as raised:
        await steps.run(work())
    assert raised.value.reason == "slow"
    assert cancelled.is_set()
    assert 0.09 < time.monotonic() - begin < 1


async def test_work_that_closes_politely_first_is_told_twice(steps: Steps) -> None:
    told = 0

    async def work() -> None:
        nonlocal told
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                told += 1
        raise asyncio.CancelledError

    with pytest.raises(StorageUnavailable):
        await steps.run(work())
    assert told == 2


async def test_work_that_cannot_be_stopped_does_not_hold_the_caller(steps: Steps) -> None:
    may_end = asyncio.Event()

    async def work() -> None:
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                continue

    begin = time.monotonic()
    with pytest.raises(StorageUnavailable):
        await steps.run(work())
    assert time.monotonic() - begin < 1
    may_end.set()


async def test_caller_cancelled_while_the_work_is_stuck(steps: Steps) -> None:
    caller = asyncio.get_running_loop().create_task(steps.run(asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    caller.cancel()
    begin = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert time.monotonic() - begin < 1


async def test_work_that_nobody_may_cancel_goes_on_and_is_waited_for(patient: Steps, tasks: TaskSet) -> None:
    happened: list[str] = []
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()
        happened.append("work")

    async def leave() -> None:
        happened.append("left")

    with pytest.raises(StorageUnavailable) as raised:
        await patient.run(work())
    assert raised.value.reason == "slow"
    with pytest.raises(StorageUnavailable):
        await patient.run(leave())
    await patient.end(leave())
    assert happened == []
    may_end.set()
    await tasks.close(1)
    assert happened == ["work", "left"]


async def test_last_step(patient: Steps) -> None:
    happened: list[str] = []

    async def leave() -> None:
        happened.append("left")

    await patient.end(leave())
    assert happened == ["left"]
