import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Select, insert, select, text

from gateway.accounts import history as history_module
from gateway.accounts.errors import MessageNotFound
from gateway.accounts.history import PAGE, SIZES, Ended, Exchange, History, new_exchange
from gateway.accounts.instances import SILENT, Instances
from gateway.errors import IdempotencyConflict
from gateway.storage.address import Address, SqliteFile
from gateway.storage.engine import Database
from gateway.storage.tables import messages, turns
from gateway.translation.content import replaced
from gateway.translation.platform_types import HistoryPage, Message, MessageUsage, ToolActivity
from tests.storage.databases import opened
from tests.storage.late import late_database

ANN: Final = "00000000-0000-4000-8000-00000000000a"
BEN: Final = "00000000-0000-4000-8000-00000000000b"
NOBODYS: Final = "msg_" + "0" * 32
ROOT: Final = Path(__file__).parents[2]
DAY: Final = 86_400.0


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def history(database: Database) -> History:
    return history_of(database)


def history_of(database: Database, instance: str = "gateway-1", now: Callable[[], float] = time.time) -> History:
    return History(database, Instances(database, instance), now)


async def says(history: History, words: str = "Hello?", *, user: str = ANN) -> Exchange:
    exchange = new_exchange(user)
    await history.begin(exchange, words)
    return exchange


def answer(words: str = "Hello!", turn_id: str | None = None) -> Ended:
    return Ended(status="complete", text=words, turn_id=turn_id)


async def whole(history: History, user: str = ANN) -> list[Message]:
    return [message async for message in history.export(user)]


async def texts(history: History, user: str = ANN) -> list[str]:
    return [message.text for message in await whole(history, user)]


async def book(database: Database, turn_id: str, *, owner: str = ANN, status: str = "complete") -> None:
    row = {
        "id": turn_id,
        "owner": owner,
        "source": "platform",
        "agent_id": "agent-1",
        "instance": "gateway-1",
        "status": status,
        "model": "openai/gpt",
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "cached_tokens": 4,
        "reasoning_tokens": 1,
        "cost_micros": 1_234,
        "held_micros": 0,
        "started_at": 1.0,
    }
    async with database.write() as connection:
        await connection.execute(insert(turns), [row])


# A message and its answer --------------------------------------------------------------------------------------------


async def test_message_stands_with_the_place_of_its_answer(database: Database) -> None:
    clock = Clock()
    history = history_of(database, now=clock)
    exchange = new_exchange(ANN)
    question = await history.begin(exchange, "Hello?")
    assert question == Message(
        id=exchange.question_id,
        role="user",
        status="complete",
        text="Hello?",
        created_at=clock.time,
        ended_at=clock.time,
    )
    running = Message(id=exchange.answer_id, role="assistant", status="running", text="", created_at=clock.time)
    assert await whole(history) == [running, question]


async def test_answer_is_kept_as_it_ended_with_what_the_ledger_has(database: Database, history: History) -> None:
    exchange = await says(history)
    await history.note_turn(exchange, "turn-1")
    await book(database, "turn-1")
    activity = (ToolActivity("call-1", "search", "done"),)
    ended = Ended(status="failed", text="Hel", reasoning="Hm", activity=activity, error_code="x", turn_id="turn-1")
    kept = await history.end(exchange, ended)
    assert kept is not None
    assert kept.usage == MessageUsage(10, 2, 12, 4, 1, "0.001234", "openai/gpt")
    assert (kept.status, kept.text, kept.reasoning, kept.activity, kept.error_code) == (
        "failed",
        "Hel",
        "Hm",
        activity,
        "x",
    )
    assert kept.ended_at is not None
    assert (await whole(history))[0] == kept


@pytest.mark.parametrize(("owner", "status"), [(ANN, "running"), (BEN, "complete")], ids=["open", "another's"])
async def test_turn_that_tells_nothing(database: Database, history: History, owner: str, status: str) -> None:
    exchange = await says(history)
    await book(database, "turn-1", owner=owner, status=status)
    kept = await history.end(exchange, answer(turn_id="turn-1"))
    assert kept is not None
    assert kept.usage is None


async def test_turn_is_found_though_the_gateway_dies(database: Database) -> None:
    exchange = await says(history_of(database, "dead"))
    await history_of(database, "dead").note_turn(exchange, "turn-1")
    await book(database, "turn-1", status="interrupted")
    living = history_of(database, "living")
    if not database.is_shared:
        assert await living.reconcile() == 1
    assert (await whole(living))[0].usage is not None


async def test_message_that_was_never_sent_is_kept_as_failed(history: History) -> None:
    exchange = await says(history, "never sent")
    await history.refuse(exchange, "upstream_unavailable")
    kept = await whole(history)
    assert [(message.role, message.status, message.error_code) for message in kept] == [
        ("assistant", "failed", "upstream_unavailable"),
        ("user", "failed", "upstream_unavailable"),
    ]
    assert await texts(history) == ["", "never sent"]


async def test_message_sent_again_by_its_key_takes_the_place_of_the_one_that_failed(history: History) -> None:
    for word in ("first", "second"):
        exchange = new_exchange(ANN, "key 1")
        await history.begin(exchange, f"hello, {word}")
        await history.refuse(exchange, "upstream_unavailable")
    await says(history, "something else")
    exchange = new_exchange(ANN, "key 1")
    await history.begin(exchange, "hello, third")
    await history.end(exchange, answer("hi"))
    assert await texts(history) == ["hi", "hello, third", "", "something else"]
    with pytest.raises(IdempotencyConflict):
        await history.begin(new_exchange(ANN, "key 1"), "hello, a day later")
    assert new_exchange("ben", "key 1").question_id != exchange.question_id


async def test_answer_to_a_deleted_message_is_not_kept(history: History) -> None:
    exchange = await says(history)
    await history.delete(ANN)
    await history.note_turn(exchange, "turn-1")
    assert await history.end(exchange, answer()) is None
    assert await whole(history) == []


async def test_ending_twice_is_ending_once(history: History) -> None:
    exchange = await says(history)
    assert await history.end(exchange, answer("one")) is not None
    assert await history.end(exchange, answer("one")) is not None
    assert await texts(history) == ["one", "Hello?"]


async def test_clock_that_steps_back_changes_no_order(database: Database) -> None:
    clock = Clock()
    history = history_of(database, now=clock)
    for number in range(4):
        clock.time -= DAY
        await history.end(await says(history, f"{number}?"), answer(f"{number}!"))
    assert await texts(history) == ["3!", "3?", "2!", "2?", "1!", "1?", "0!", "0?"]


# What databases do not take ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    ["a\0b", "\ud83d", "\u202e\u200b\ufeff", "'; DROP TABLE messages; --", "%_\\", "😀" * 250_000, "\x01\x7f\u2028"],
    ids=["NUL", "half a pair", "marks", "SQL", "wildcards", "1 MB", "controls"],
)
async def test_odd_text_is_kept(history: History, odd: str) -> None:
    exchange = await says(history, odd)
    activity = (ToolActivity("a\0b", replaced(odd)[:50], "done"),)
    await history.end(exchange, Ended(status="complete", text=odd, reasoning=odd, activity=activity))
    told, asked = await whole(history)
    assert told.text == told.reasoning == asked.text == replaced(odd)
    assert told.activity == activity


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(st.characters(codec=None), max_size=50), min_size=10, max_size=20))
async def test_any_text_is_kept(words: list[str]) -> None:
    async with late_database() as database:
        history = history_of(database)
        for text_ in words:
            await says(history, text_)
        kept = [message.text for message in await whole(history) if message.role == "user"]
        assert kept == [replaced(text_) for text_ in reversed(words)]


# Pages ---------------------------------------------------------------------------------------------------------------


async def pages(history: History, limit: int, user: str = ANN) -> list[HistoryPage]:
    found = [await history.page(user, None, limit)]
    while found[-1].next_cursor is not None:
        found.append(await history.page(user, found[-1].next_cursor, limit))
    return found


@pytest.mark.parametrize("limit", [1, 2, 3, 9, 10, 11, 100])
async def test_pages_are_the_history_newest_first(history: History, limit: int) -> None:
    for number in range(5):
        await history.end(await says(history, f"{number}?"), answer(f"{number}!"))
        await says(history, "Ben's", user=BEN)
    found = await pages(history, limit)
    assert [message.text for page in found for message in page.data] == [
        f"{number}{mark}" for number in reversed(range(5)) for mark in "!?"
    ]
    assert [len(page.data) for page in found[:-1]] == [limit] * (len(found) - 1)
    assert 0 < len(found[-1].data) <= limit


async def test_page_of_nothing(history: History) -> None:
    assert await history.page(ANN, None, 50) == HistoryPage([], None)


async def test_pages_stay_though_messages_come(history: History) -> None:
    for number in range(4):
        await says(history, f"{number}")
    first = await history.page(ANN, None, 3)
    assert first.next_cursor is not None
    await says(history, "new")
    second = await history.page(ANN, first.next_cursor, 100)
    seen = [message.id for message in (*first.data, *second.data)]
    assert len(seen) == len(set(seen)) == 8
    assert "new" not in {message.text for message in second.data}


@pytest.mark.parametrize("cursor", [NOBODYS, "", "'; --", "x" * 10_000, "a\0b", "\ud83d", "another's"])
async def test_cursor_that_is_none_of_the_users(history: History, cursor: str) -> None:
    await says(history)
    others = await says(history, user=BEN)
    with pytest.raises(MessageNotFound) as caught:
        await history.page(ANN, others.question_id if cursor == "another's" else cursor, 50)
    assert (caught.value.status, caught.value.param) == (404, "cursor")


async def test_page_of_long_messages_is_short(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MAX_PAGE", 100)
    for size in (10, 40, 200, 30, 30):
        exchange = await says(history, "a" * size)
        await history.end(exchange, answer(""))
    found = await pages(history, 50)
    assert [[len(message.text) for message in page.data if message.role == "user"] for page in found] == [
        [30, 30],
        [200],
        [40, 10],
    ]
    assert sum(len(page.data) for page in found) == 10


async def test_export_of_a_long_history(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "EXPORTED", 3)
    for number in range(5):
        await says(history, f"{number}")
    assert [text for text in await texts(history) if text] == ["4", "3", "2", "1", "0"]


async def test_export_of_what_is_deleted_meanwhile_ends(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "EXPORTED", 3)
    for _ in range(5):
        await says(history)
    found = []
    async for message in history.export(ANN):
        found.append(message)
        await history.delete(ANN)
    assert len(found) == 3


async def test_deletion_is_of_one_user(history: History) -> None:
    await says(history)
    await says(history, user=BEN)
    await history.delete(ANN)
    await history.delete("x" * 10_000)
    assert await whole(history) == []
    assert len(await whole(history, BEN)) == 2


async def test_deletion_of_a_long_history(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "DELETED", 3)
    for count in (1, 3, 4):
        for _ in range(count):
            await says(history)
        await history.delete(ANN)
        assert await whole(history) == []


# Gateways that died --------------------------------------------------------------------------------------------------


async def test_what_a_dead_gateway_left_is_interrupted(database: Database) -> None:
    clock, dead = Clock(), history_of(database, "dead")
    ended, running = await says(dead, "one"), await says(dead, "two")
    await dead.end(ended, answer("done"))
    if database.is_shared:
        await Instances(database, "dead").beat()
    living = History(database, Instances(database, "living", clock))
    mine = await says(living, "three")
    if database.is_shared:
        assert await living.reconcile() == 0, "it may be alive still"
        clock.time += SILENT
    assert await living.reconcile() == 1
    assert await living.reconcile() == 0
    status = {message.id: message.status for message in await whole(living)}
    assert (status[ended.answer_id], status[running.answer_id], status[mine.answer_id]) == (
        "complete",
        "interrupted",
        "running",
    )
    assert all(message.ended_at is not None for message in await whole(living) if message.status == "interrupted")


async def test_gateway_that_was_taken_for_dead_has_the_last_word(database: Database) -> None:
    slow = history_of(database, "slow")
    exchange = await says(slow)
    assert await history_of(database, "other").reconcile() == 1, "it never gave a sign of life"
    await slow.end(exchange, answer("Here I am"))
    last = (await whole(slow))[0]
    assert (last.status, last.text) == ("complete", "Here I am")


# Speed ---------------------------------------------------------------------------------------------------------------


async def test_page_is_read_by_its_index(database: Database, history: History) -> None:
    await book(database, "turn-1")
    await history.end(await says(history), answer(turn_id="turn-1"))
    place = {"user": ANN, "before": 7}
    for statement in (PAGE.params(**place, last=1), SIZES.params(**place, most=51)):
        plan = await plan_of(database, statement)
        assert "ix_messages_user_id_position" in plan
        assert "TEMP B-TREE" not in plan
        assert "Sort" not in plan
        assert "Seq Scan" not in plan
        assert "SCAN" not in plan


async def plan_of(database: Database, statement: Select[Any]) -> str:
    async with database.read() as connection:
        if database.is_shared:
            await connection.execute(text("SET LOCAL enable_seqscan = off"))
            await connection.execute(text("SET LOCAL enable_bitmapscan = off"))
        explain = "EXPLAIN" if database.is_shared else "EXPLAIN QUERY PLAN"
        compiled = str(statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True}))
        rows = await connection.execute(text(f"{explain} {compiled}".replace(":", "\\:")))
        return "\n".join(str(tuple(row)) for row in rows)


@pytest.mark.services
@pytest.mark.timeout(600)
async def test_page_among_a_million_messages_of_ten_thousand_users(address: Address) -> None:
    """A page is as fast as among the messages of 500 users; on a machine of today that is a few milliseconds."""
    users = [f"user-{number:08}" for number in range(10_000)]
    some = users[::20]
    await fill(address, some)
    among_few = await page_times(address, some)
    await fill(address, [user for user in users if user not in set(some)])
    among_all = await page_times(address, some)
    print(f"a page: p50 and p99 {among_all} ms; among the messages of {len(some)} users {among_few} ms")
    assert among_all[1] < max(20.0, 2.5 * among_few[1])


async def fill(address: Address, users: Sequence[str], each: int = 50) -> None:
    async with opened(address) as database:
        for number in range(each):
            rows = [row for user in users for row in seeded(user, number)]
            async with database.write() as connection:
                for start in range(0, len(rows), 2_000):
                    await connection.execute(insert(messages), rows[start : start + 2_000])
        for settle in ("ANALYZE messages", "CHECKPOINT") if database.is_shared else ():
            async with database.write() as connection:
                await connection.execute(text(settle))


async def page_times(address: Address, users: Sequence[str]) -> tuple[float, float]:
    """Return the median and the 99th percentile in milliseconds, of the round that others disturbed least."""
    async with opened(address) as database:  # anew, as closing settles SQLite's log
        history = history_of(database)
        rounds = [sorted([took async for took in read_pages(history, users)]) for _ in range(3)]
    p50, p99 = (round(min(took[len(took) * percent // 100] for took in rounds) * 1e3, 2) for percent in (50, 99))
    return p50, p99


async def read_pages(history: History, users: Sequence[str]) -> AsyncIterator[float]:
    """Read users' whole histories in two pages each, and yield how long each page took, in seconds."""
    for user in users:
        started = time.perf_counter()
        page = await history.page(user, None, 50)
        yield time.perf_counter() - started
        assert (len(page.data), page.data[0].id) == (50, f"msg_{user}-49-assistant")
        started = time.perf_counter()
        older = await history.page(user, page.next_cursor, 100)
        yield time.perf_counter() - started
        assert (len(older.data), older.next_cursor) == (50, None)


def seeded(user: str, number: int) -> list[dict[str, object]]:
    common = {"user_id": user, "instance": "i", "status": "complete", "activity": "[]", "created_at": float(number)}
    return [
        {**common, "id": f"msg_{user}-{number}-{role}", "role": role, "text": words, "reasoning": ""}
        for role, words in (("user", "What do you remember? " * 5), ("assistant", "This and that. " * 20))
    ]


# Crashes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=[pytest.mark.services, pytest.mark.timeout(300)])])
async def test_killed_at_any_moment_keeps_what_was_acknowledged(tmp_path: Path, rounds: int) -> None:
    path, acks = tmp_path / "gateway.db", tmp_path / "acks"
    command: list[str | Path] = [sys.executable, "-m", "tests.accounts.crashing_history", path, acks, str(rounds)]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr
    acknowledged = acks.read_text().split()
    assert "damaged" not in acknowledged
    assert len({name.split("-")[1] for name in acknowledged}) >= rounds // 2
    async with opened(SqliteFile(path)) as database:
        history = history_of(database, "afterwards")
        await history.reconcile()
        async with database.read() as connection:
            assert (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() == ["ok"]
            rows = (await connection.execute(select(messages.c.role, messages.c.status, messages.c.text))).all()
    asked = [row.text for row in rows if row.role == "user"]
    told = [row.text for row in rows if row.role == "assistant" and row.status == "complete"]
    assert len(asked) == len(set(asked)) == len(rows) // 2, "each message once, with the place of its answer"
    assert {name[4:] for name in acknowledged if name.startswith("ask-")} <= set(asked)
    assert {name[4:] for name in acknowledged if name.startswith("end-")} <= set(told)
    assert len(told) == len(set(told))
    assert {row.status for row in rows if row.role == "assistant"} <= {"complete", "interrupted"}
    assert len(asked) <= len([name for name in acknowledged if name.startswith("ask-")]) + rounds
