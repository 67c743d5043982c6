import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from gateway.conversations.directory import Directory, Pinned, RecentPins
from gateway.conversations.divergence import DIGEST
from gateway.errors import StorageUnavailable, ThreadLost
from gateway.storage.address import Address, PostgresServer, SqliteFile
from gateway.storage.engine import Database
from gateway.storage.tables import pins
from tests.storage.databases import opened
from tests.storage.texts import HOSTILE, UNSTORABLE, storable

ONE, TWO, THREE = (bytes([number]) * 16 for number in (1, 2, 3))
PINNED = Pinned("conv-1", (ONE, TWO), b"instructions", is_settled=False)


@pytest.fixture
def directory(database: Database) -> Directory:
    return Directory(database, now=lambda: 7.25)


@pytest.fixture
async def fresh(database: Database) -> Directory:
    """The same database, by a gateway that remembers nothing."""
    return Directory(database)


async def test_chat_that_is_not_known(directory: Directory) -> None:
    assert await directory.find("owner", "agent-1", "chat") is None


@pytest.mark.parametrize(
    "pinned",
    [
        PINNED,
        Pinned("conv-1"),
        Pinned("conv-1", (THREE, ONE, ONE), b"", is_settled=True),
        Pinned("conv-1", tuple(number.to_bytes(16, "big") for number in range(5_000))),
    ],
)
async def test_pinned_chat_is_found_as_it_was_pinned(directory: Directory, fresh: Directory, pinned: Pinned) -> None:
    assert await directory.pin("owner", "agent-1", "chat", pinned) is None
    assert await directory.find("owner", "agent-1", "chat") == pinned
    assert await fresh.find("owner", "agent-1", "chat") == pinned
    assert await fresh.find("owner", "agent-1", "chat") == pinned


async def test_pin_survives_a_restart(address: Address) -> None:
    async with opened(address) as database:
        await Directory(database).pin("owner", "agent-1", "chat", PINNED)
    async with opened(address) as database:
        assert await Directory(database).find("owner", "agent-1", "chat") == PINNED


async def test_each_part_of_the_key_counts(directory: Directory, fresh: Directory) -> None:
    keys = list(itertools.product(("owner", "other"), ("agent-1", "agent-2"), ("chat", "chat2")))
    for number, key in enumerate(keys):
        await directory.pin(*key, Pinned(f"conv-{number}"))
    for where in (directory, fresh):
        found = [await where.find(*key) for key in keys]
        assert found == [Pinned(f"conv-{number}") for number in range(len(keys))]


async def test_other_conversation_in_its_place_is_told(directory: Directory, fresh: Directory) -> None:
    assert await directory.pin("owner", "agent-1", "chat", Pinned("conv-1")) is None
    assert await directory.pin("owner", "agent-1", "chat", Pinned("conv-1", (ONE,))) is None, "the same one"
    assert await directory.pin("owner", "agent-1", "chat", Pinned("conv-2")) == "conv-1"
    assert await fresh.find("owner", "agent-1", "chat") == Pinned("conv-2")


async def test_unpinned_chat_is_not_known_any_more(directory: Directory, fresh: Directory) -> None:
    await directory.pin("owner", "agent-1", "chat", Pinned("conv-1"))
    await directory.pin("other", "agent-1", "chat", Pinned("conv-2"))
    assert await directory.unpin("owner", "agent-1", "chat") == "conv-1"
    assert await directory.unpin("owner", "agent-1", "chat") is None
    for where in (directory, fresh):
        assert await where.find("owner", "agent-1", "chat") is None
        assert await where.find("other", "agent-1", "chat") == Pinned("conv-2")


async def test_agent_that_is_no_more_takes_its_chats_with_it(directory: Directory, fresh: Directory) -> None:
    for owner, agent_id in itertools.product(("owner", "other"), ("agent-1", "agent-2")):
        await directory.pin(owner, agent_id, "chat", Pinned("conv"))
    await directory.forget_agent("agent-1")
    for where, owner in itertools.product((directory, fresh), ("owner", "other")):
        assert await where.find(owner, "agent-1", "chat") is None
        assert await where.find(owner, "agent-2", "chat") == Pinned("conv")


async def test_time_of_the_pin_is_kept(directory: Directory, database: Database) -> None:
    await directory.pin("owner", "agent-1", "chat", PINNED)
    async with database.read() as connection:
        assert (await connection.execute(select(pins.c.pinned_at))).scalar_one() == 7.25


# Text ----------------------------------------------------------------------------------------------------------------


async def test_names_that_look_alike_or_like_sql(directory: Directory, fresh: Directory) -> None:
    for number, name in enumerate(HOSTILE):
        await directory.pin(name, "agent-1", name, Pinned(f"conv-{number}"))
    for number, name in enumerate(HOSTILE):
        assert await fresh.find(name, "agent-1", name) == Pinned(f"conv-{number}")


@pytest.mark.parametrize("text", UNSTORABLE)
async def test_text_that_cannot_be_stored_is_refused_and_never_found(directory: Directory, text: str) -> None:
    for key in ((text, "agent-1", "chat"), ("owner", text, "chat"), ("owner", "agent-1", text)):
        with pytest.raises(ValueError, match="without NUL"):
            await directory.pin(*key, PINNED)
        assert await directory.find(*key) is None
        assert await directory.unpin(*key) is None
    with pytest.raises(ValueError, match="without NUL"):
        await directory.pin("owner", "agent-1", "chat", Pinned(text))
    await directory.forget_agent(text)


async def test_digest_of_another_length_is_refused(directory: Directory) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        await directory.pin("owner", "agent-1", "chat", Pinned("conv-1", (ONE, b"short")))
    assert await directory.find("owner", "agent-1", "chat") is None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.tuples(storable, storable, storable),
    pinned=st.builds(
        Pinned,
        conversation_id=storable,
        seen=st.lists(st.binary(min_size=16, max_size=16), max_size=5).map(tuple),
        instructions=st.none() | st.binary(max_size=20),
        is_settled=st.booleans(),
    ),
)
async def test_whatever_is_pinned_is_found(
    directory: Directory, fresh: Directory, key: tuple[str, str, str], pinned: Pinned
) -> None:
    await directory.pin(*key, pinned)
    assert await directory.find(*key) == pinned
    assert await Directory(fresh._database).find(*key) == pinned
    await directory.unpin(*key)


# What is held in memory ----------------------------------------------------------------------------------------------


@pytest.fixture
async def alone(sqlite_file: SqliteFile) -> AsyncIterator[Database]:
    async with opened(sqlite_file) as database:
        yield database


async def test_pin_that_failed_is_not_believed(alone: Database, sqlite_file: SqliteFile) -> None:
    directory = Directory(alone)
    await directory.pin("owner", "agent-1", "chat", Pinned("conv-1"))
    moved = sqlite_file.path.rename(sqlite_file.path.with_name("moved"))
    with pytest.raises(StorageUnavailable):
        await directory.pin("owner", "agent-1", "chat", Pinned("conv-2"))
    moved.rename(sqlite_file.path)
    assert await directory.find("owner", "agent-1", "chat") == Pinned("conv-1")


async def test_pins_finds_and_cancellations_at_once_agree_with_the_database(alone: Database) -> None:
    directory = Directory(alone)

    async def pin(number: int) -> None:
        await directory.pin("owner", "agent-1", f"chat-{number % 3}", Pinned(f"conv-{number}"))

    async def find(number: int) -> None:
        await directory.find("owner", "agent-1", f"chat-{number % 3}")

    for start in range(0, 60, 6):
        tasks = [
            asyncio.get_running_loop().create_task(work(number))
            for number in range(start, start + 6)
            for work in (pin, find)
        ]
        await asyncio.sleep(0.002)
        tasks[start % 7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number in range(3):
            key = ("owner", "agent-1", f"chat-{number}")
            assert await directory.find(*key) == await Directory(alone).find(*key)


async def test_memory_is_bounded(alone: Database) -> None:
    directory = Directory(alone)
    directory._recent = RecentPins(3)
    for number in range(10):
        await directory.pin("owner", "agent-1", f"chat-{number}", Pinned(f"conv-{number}"))
        await directory.find("owner", "agent-1", "chat-0")
    assert [key[2] for key in directory._recent._pins] == ["chat-8", "chat-9", "chat-0"]
    assert await directory.find("owner", "agent-1", "chat-1") == Pinned("conv-1")


async def test_what_another_gateway_may_have_changed_is_read_again(address: Address) -> None:
    async with opened(address) as database:
        here, elsewhere = Directory(database), Directory(database)
        await here.pin("owner", "agent-1", "chat", Pinned("conv-1"))
        await elsewhere.pin("owner", "agent-1", "chat", Pinned("conv-2"))
        assert await here.find("owner", "agent-1", "chat") == Pinned("conv-1")
        assert await here.find("owner", "agent-1", "chat", is_news=True) == Pinned("conv-2")
        assert await here.find("owner", "agent-1", "chat") == Pinned("conv-2")


async def test_gateway_that_lost_its_thread_does_not_write_over_what_came_after(address: Address) -> None:
    async with opened(address) as database:
        here, elsewhere = Directory(database), Directory(database)
        await here.pin("owner", "agent-1", "chat", Pinned("conv-1"), 7)
        await elsewhere.pin("owner", "agent-1", "chat", Pinned("conv-2"), 8)
        with pytest.raises(ThreadLost):
            await here.pin("owner", "agent-1", "chat", Pinned("conv-1", (b"x" * DIGEST,)), 7)
        assert await here.find("owner", "agent-1", "chat") == Pinned("conv-2")
        await elsewhere.pin("owner", "agent-1", "chat", Pinned("conv-3"), 8)
        await elsewhere.pin("owner", "agent-1", "chat", Pinned("conv-4"))
        assert await here.find("owner", "agent-1", "chat", is_news=True) == Pinned("conv-4")


async def test_gateway_that_lost_its_thread_does_not_forget_what_came_after(address: Address) -> None:
    async with opened(address) as database:
        here, elsewhere = Directory(database), Directory(database)
        await elsewhere.pin("owner", "agent-1", "chat", Pinned("conv-2"), 8)
        assert await here.unpin("owner", "agent-1", "chat", 7) is None
        assert await here.find("owner", "agent-1", "chat") == Pinned("conv-2")
        assert await elsewhere.unpin("owner", "agent-1", "chat", 8) == "conv-2"
        assert await here.find("owner", "agent-1", "chat", is_news=True) is None


@pytest.mark.live
async def test_gateways_that_share_a_database_see_each_others_pins(postgres_address: PostgresServer) -> None:
    async with opened(postgres_address) as one, opened(postgres_address) as other:
        first, second = Directory(one, remembers=False), Directory(other, remembers=False)
        await first.pin("owner", "agent-1", "chat", Pinned("conv-1"))
        assert await second.find("owner", "agent-1", "chat") == Pinned("conv-1")
        await second.pin("owner", "agent-1", "chat", Pinned("conv-2"))
        assert await first.find("owner", "agent-1", "chat") == Pinned("conv-2")


class Interleavings(RuleBasedStateMachine):
    """Reads and writes of one key whose steps fall in any order; ``stored`` is what the database holds."""

    key = ("owner", "agent-1", "chat")

    def __init__(self) -> None:
        super().__init__()
        self.recent = RecentPins(8)
        self.stored: Pinned | None = None
        self.numbers = itertools.count()
        self.reads: list[tuple[int, Pinned | None]] = []
        self.writes: list[int] = []
        self.committed: list[tuple[int, Pinned | None]] = []

    @rule()
    def read(self) -> None:
        self.reads.append((self.recent.ticket, self.stored))

    @rule()
    def read_ends(self) -> None:
        if self.reads:
            ticket, found = self.reads.pop(0)
            if found is not None:
                self.recent.found(self.key, found, ticket)

    @rule()
    def write_begins(self) -> None:
        self.writes.append(self.recent.begin(self.key))

    @rule(gone=st.booleans())
    def write_commits(self, gone: bool) -> None:  # noqa: FBT001 - drawn
        if self.writes:
            self.stored = None if gone else Pinned(f"conv-{next(self.numbers)}")
            self.committed.append((self.writes.pop(0), self.stored))

    @rule(last=st.booleans())
    def write_ends(self, last: bool) -> None:  # noqa: FBT001 - drawn
        if self.committed:
            ticket, pinned = self.committed.pop(-1 if last else 0)
            self.recent.end(self.key, pinned, ticket)

    @rule()
    def write_fails(self) -> None:
        if self.writes:
            self.recent.end(self.key, None, self.writes.pop(0))

    @invariant()
    def what_is_held_is_right_once_no_write_is_under_way(self) -> None:
        held: Any = self.recent._pins.get(self.key)
        assert held is None or held == self.stored or self.committed


def test_no_order_of_reads_and_writes_leaves_something_wrong_in_memory() -> None:
    run_state_machine_as_test(Interleavings, settings=settings(max_examples=200, stateful_step_count=25))
