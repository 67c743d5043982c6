import asyncio

import pytest

from gateway.conversations.chats import ChatTurn
from gateway.errors import GatewayError, ResponseCancelled, ShuttingDown, StorageUnavailable, TurnFailed
from gateway.handlers.keeping import AnswerEnd, Keeping
from gateway.tasks import TaskSet


class Notebook:
    """A keeper that notes what it is told; ``gates`` are waited for, ``failures`` raised, by the step."""

    name: str | None = None

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.failures: dict[str, GatewayError] = {}

    async def begin(self) -> None:
        await self._step("begin", "begin")

    async def opened(self, turn: ChatTurn) -> None:
        self.noted.append("opened")

    async def end(self, how: AnswerEnd, error: GatewayError | None) -> bytes:
        await self._step("end", f"{how} {error.code}" if error is not None else how)
        return b"kept"

    async def _step(self, step: str, note: str) -> None:
        if step in self.gates:
            await self.gates[step].wait()
        if step in self.failures:
            raise self.failures[step]
        self.noted.append(note)


class Work:
    """The work with a notebook, as whoever answers does it."""

    def __init__(self) -> None:
        self.tasks = TaskSet()
        self.notebook = Notebook()
        self.keeping = Keeping(self.notebook, self.tasks)

    async def settled(self) -> list[str]:
        async with asyncio.timeout(5):
            while len(self.tasks):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
        return self.notebook.noted


@pytest.fixture
def work() -> Work:
    return Work()


async def test_answer_that_is_whole(work: Work) -> None:
    await work.keeping.begin()
    assert await work.keeping.complete() == b"kept"
    work.keeping.leave()
    assert await work.settled() == ["begin", "complete"]


async def test_answer_that_nobody_keeps() -> None:
    tasks = TaskSet()
    keeping = Keeping(None, tasks)
    await keeping.begin()
    assert await keeping.complete() == b""
    await keeping.fail(TurnFailed(), is_unsent=False)
    keeping.leave()
    assert len(tasks) == 0


@pytest.mark.parametrize(
    ("error", "is_unsent", "noted"),
    [
        (TurnFailed(), False, "failed agent_run_failed"),
        (TurnFailed(), True, "unsent agent_run_failed"),
        (ShuttingDown(), False, "interrupted shutting_down"),
        (ResponseCancelled(), False, "cancelled response_cancelled"),
    ],
)
async def test_failure(work: Work, error: GatewayError, *, is_unsent: bool, noted: str) -> None:
    await work.keeping.begin()
    await work.keeping.fail(error, is_unsent=is_unsent)
    work.keeping.leave()
    assert await work.settled() == ["begin", noted]


async def test_client_that_leaves(work: Work) -> None:
    await work.keeping.begin()
    work.keeping.leave()
    work.keeping.leave()
    assert await work.settled() == ["begin", "interrupted"]


async def test_client_that_leaves_before_the_begin(work: Work) -> None:
    work.keeping.leave()
    assert await work.settled() == []


@pytest.mark.parametrize("step", ["begin", "end"])
async def test_client_that_leaves_in_the_midst_of_a_step(work: Work, step: str) -> None:
    work.notebook.gates[step] = gate = asyncio.Event()

    async def answer() -> None:
        try:
            await work.keeping.begin()
            await work.keeping.complete()
        finally:
            work.keeping.leave()

    answering = TaskSet().spawn(answer(), "answer")
    await asyncio.sleep(0.01)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    gate.set()
    assert await work.settled() == ["begin", "interrupted" if step == "begin" else "complete"]


async def test_begin_that_fails_may_be_tried_again(work: Work) -> None:
    work.notebook.failures["begin"] = StorageUnavailable("locked")
    with pytest.raises(StorageUnavailable) as caught:
        await work.keeping.begin()
    assert caught.value.should_retry is True
    await work.keeping.fail(caught.value, is_unsent=True)
    assert await work.settled() == ["unsent storage_unavailable"], "a commit that failed may have been one all the same"


async def test_answer_that_cannot_be_stored_is_not_asked_for_again(work: Work) -> None:
    work.notebook.failures["end"] = StorageUnavailable("full")
    await work.keeping.begin()
    with pytest.raises(StorageUnavailable) as caught:
        await work.keeping.complete()
    assert caught.value.should_retry is False
    await work.keeping.fail(caught.value, is_unsent=False)
    assert await work.settled() == ["begin"]


async def test_failure_that_cannot_be_stored_hides_no_other(work: Work) -> None:
    work.notebook.failures["end"] = StorageUnavailable("full")
    await work.keeping.begin()
    await work.keeping.fail(TurnFailed(), is_unsent=False)
    assert await work.settled() == ["begin"]
