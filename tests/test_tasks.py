import asyncio
import gc
import weakref

import pytest
from structlog.testing import capture_logs

from gateway.errors import UpstreamUnavailable
from gateway.tasks import TaskSet


async def answer() -> int:
    await asyncio.sleep(0)
    return 7


async def fail(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


async def stubborn() -> None:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


async def test_task_is_named_kept_and_let_go() -> None:
    tasks = TaskSet()
    task = tasks.spawn(answer(), "answer")
    assert task.get_name() == "answer"
    assert len(tasks) == 1
    assert await task == 7
    await asyncio.sleep(0)
    assert len(tasks) == 0


async def test_task_that_nobody_else_holds_is_not_collected() -> None:
    tasks = TaskSet()
    gate = asyncio.Event()
    kept = weakref.ref(tasks.spawn(gate.wait(), "wait"))
    await asyncio.sleep(0)
    gc.collect()
    assert kept() is not None
    gate.set()
    await tasks.close(1)


async def test_bug_in_a_task_is_logged_once_with_its_traceback() -> None:
    tasks = TaskSet()
    error = ValueError("a bug")
    with capture_logs() as logs:
        tasks.spawn(fail(error), "buggy")
        await asyncio.sleep(0.01)
    assert logs == [{"event": "background task failed", "log_level": "error", "task": "buggy", "exc_info": error}]
    assert len(tasks) == 0


async def test_error_that_somebody_answers_is_no_bug() -> None:
    tasks = TaskSet()
    with capture_logs() as logs:
        task = tasks.spawn(fail(UpstreamUnavailable()), "list agents")
        with pytest.raises(UpstreamUnavailable):
            await task
        await asyncio.sleep(0)
    assert [(line["log_level"], line["code"], "exc_info" in line) for line in logs] == [
        ("debug", "upstream_unavailable", False)
    ]


async def test_cancelled_task_is_not_logged() -> None:
    tasks = TaskSet()
    with capture_logs() as logs:
        task = tasks.spawn(asyncio.sleep(60), "sleep")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.01)
    assert logs == []
    assert len(tasks) == 0


async def test_closing_with_nothing_to_wait_for() -> None:
    await TaskSet().close(60)


async def test_closing_waits_for_what_ends_in_time() -> None:
    tasks = TaskSet()
    task = tasks.spawn(asyncio.sleep(0.01, "done"), "short")
    await tasks.close(5)
    assert task.result() == "done"


async def test_closing_cancels_what_does_not() -> None:
    tasks = TaskSet()
    task = tasks.spawn(asyncio.sleep(60), "long")
    await tasks.close(0.01)
    assert task.cancelled()
    assert len(tasks) == 0


async def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = TaskSet()
    gate = asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await gate.wait()

    task = tasks.spawn(slow_to_end(), "slow")
    async with asyncio.timeout(3):
        await tasks.close(0)
    assert not task.done()
    gate.set()
    await asyncio.gather(task, return_exceptions=True)
