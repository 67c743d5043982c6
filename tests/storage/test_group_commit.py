import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from gateway.errors import StorageUnavailable
from gateway.storage import failures
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database
from gateway.storage.group_commit import AT_ONCE, TRIES, GroupCommit
from gateway.storage.tables import instances
from gateway.storage.upsert import insert_into
from gateway.tasks import TaskSet
from tests.storage.databases import opened

BAD = "bad"
TWICE = "twice"


class Writer:
    """Writes names; ``batches`` are those that came together, ``gate`` holds up the next write where it is closed.

    ``conflicts`` is how many of the next transactions are taken back once all is written.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.tasks = TaskSet()
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        self.conflicts = 0
        self.commits: GroupCommit[str, int] = GroupCommit(database, self.tasks, self.write)

    def write(self, connection: Connection, entries: Sequence[str]) -> list[int]:
        self.batches.append(list(entries))
        insert = insert_into(connection.dialect, instances)
        rows = [{"id": entry, "seen_at": 1.0} for entry in entries]
        if TWICE in entries:
            rows += rows
        connection.execute(insert, rows)
        assert self.gate.wait(5)
        if self.conflicts:
            self.conflicts -= 1
            raise StorageUnavailable(failures.CONFLICT)
        if BAD in entries:
            raise ValueError(BAD)
        return [len(entry) for entry in entries]

    def submit(self, *entries: str) -> "list[asyncio.Task[int]]":
        loop = asyncio.get_running_loop()
        return [loop.create_task(self.commits.submit(entry)) for entry in entries]

    async def written(self) -> set[str]:
        async with self.database.read() as connection:
            return set((await connection.execute(select(instances.c.id))).scalars())


@pytest.fixture
async def writer(sqlite_file: SqliteFile) -> AsyncIterator[Writer]:
    async with opened(sqlite_file) as database:
        made = Writer(database)
        yield made
        await idle(made)


async def idle(made: Writer) -> None:
    async with asyncio.timeout(5):
        while len(made.tasks):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_answer_comes_once_it_is_committed(writer: Writer) -> None:
    assert await writer.commits.submit("anna") == 4
    assert await writer.written() == {"anna"}


async def test_what_comes_during_a_commit_goes_together_into_the_next(writer: Writer) -> None:
    writer.gate.clear()
    tasks = writer.submit("a")
    while not writer.batches:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.001)
    tasks += writer.submit("bb", "ccc", "dddd")
    await settled()
    assert not any(task.done() for task in tasks)
    writer.gate.set()
    assert await asyncio.gather(*tasks) == [1, 2, 3, 4]
    assert writer.batches == [["a"], ["bb", "ccc", "dddd"]]
    assert await writer.written() == {"a", "bb", "ccc", "dddd"}


async def test_batch_has_a_bound(writer: Writer) -> None:
    names = [f"{number}" for number in range(AT_ONCE * 2 + 1)]
    await asyncio.gather(*writer.submit(*names))
    assert max(map(len, writer.batches)) == AT_ONCE
    assert [name for batch in writer.batches for name in batch] == names


@pytest.mark.parametrize(("bad", "error"), [(BAD, ValueError), (TWICE, IntegrityError)])
async def test_entry_that_cannot_be_written_fails_alone(database: Database, bad: str, error: type[Exception]) -> None:
    writer = Writer(database)
    results = await asyncio.gather(*writer.submit("a", bad, "bb"), return_exceptions=True)
    assert results[0] == 1
    assert isinstance(results[1], error)
    assert results[2] == 2
    assert await writer.written() == {"a", "bb"}
    assert await writer.commits.submit("ccc") == 3
    await idle(writer)


async def test_submitter_that_leaves_before_its_batch_is_written_is_passed_over(writer: Writer) -> None:
    writer.gate.clear()
    first, second, third = writer.submit("a", "bb", "ccc")
    second.cancel()
    writer.gate.set()
    assert (await first, await third) == (1, 3)
    assert second.cancelled()
    assert await writer.written() == {"a", "ccc"}


async def test_submitter_that_leaves_meanwhile_takes_nobody_along(writer: Writer) -> None:
    writer.gate.clear()
    first, second = writer.submit("a", "bb")
    while not writer.batches:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.001)
    first.cancel()
    await settled()
    writer.gate.set()
    assert await second == 2
    assert await writer.written() == {"a", "bb"}


async def test_database_that_is_down_fails_all_at_once_and_each_for_itself(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file) as database:
        writer = Writer(database)
        moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
        errors = await asyncio.gather(*writer.submit("a", "bb"), return_exceptions=True)
        assert all(isinstance(error, StorageUnavailable) for error in errors)
        assert errors[0] is not errors[1], "each may be marked by who catches it"
        assert writer.batches == [["a", "bb"]], "nobody tries again for each"
        moved.rename(sqlite_file.path)
        assert await writer.commits.submit("ccc") == 3
        assert await writer.written() == {"ccc"}


async def test_transaction_that_was_taken_back_for_anothers_sake_is_begun_again(writer: Writer) -> None:
    writer.conflicts = TRIES - 1
    assert await asyncio.gather(*writer.submit("a", "bb")) == [1, 2]
    assert writer.batches == [["a", "bb"]] * TRIES
    assert await writer.written() == {"a", "bb"}


async def test_conflicts_without_end_are_told(writer: Writer) -> None:
    writer.conflicts = TRIES
    with pytest.raises(StorageUnavailable) as raised:
        await writer.commits.submit("a")
    assert raised.value.reason == failures.CONFLICT
    assert len(writer.batches) == TRIES
    assert await writer.written() == set()


async def test_end_of_the_tasks_leaves_nobody_waiting(writer: Writer) -> None:
    writer.gate.clear()
    tasks = writer.submit("a")
    while not writer.batches:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.001)
    tasks += writer.submit("bb")
    await settled()
    await writer.tasks.close(0)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, StorageUnavailable) for error in errors)
    assert await writer.written() == set()
