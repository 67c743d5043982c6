import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from sqlalchemy import insert, select

from gateway import keys
from gateway.accounts.history import Exchange, History
from gateway.accounts.instances import Instances
from gateway.accounts.usage import Days
from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import ScriptedBackend
from gateway.server.app import build_app
from gateway.server.lifecycle import LAG_PERIOD, STOOD_STILL
from gateway.server.listener import Listener
from gateway.storage.engine import Database
from gateway.storage.tables import instances, messages, turns
from gateway.translation.agent_events import Usage
from tests.server.recorded_logs import recorded_logs
from tests.server.running import FRIEND, serving, settings
from tests.storage.late import late_database


async def test_backend_is_closed_after_the_background_tasks() -> None:
    backend = ScriptedBackend()
    seen: list[bool] = []
    async with serving(backend=backend) as gateway:

        async def linger() -> None:
            await asyncio.sleep(0.05)
            seen.append(backend.closed)

        gateway.app[keys.TASKS].spawn(linger(), "linger")
        assert not backend.closed
    assert seen == [False]
    assert backend.closed


async def test_tasks_that_do_not_end_are_cancelled() -> None:
    async with serving() as gateway:
        task = gateway.app[keys.TASKS].spawn(asyncio.sleep(3_600), "sleep")
        started = time.monotonic()
    assert task.cancelled()
    assert time.monotonic() - started < 4


async def test_loop_that_stands_still_is_measured() -> None:
    async with serving() as gateway:
        await asyncio.sleep(0.01)
        time.sleep(LAG_PERIOD + 0.15)  # noqa: ASYNC251 - that is the point
        await asyncio.sleep(0.01)
        text = gateway.exposed()
    count = next(line for line in text.splitlines() if line.startswith("letta_gateway_event_loop_lag_seconds_count"))
    below = next(line for line in text.splitlines() if 'lag_seconds_bucket{le="0.1"}' in line)
    assert float(count.split()[1]) >= 1
    assert float(below.split()[1]) < float(count.split()[1])


async def test_loop_that_stands_still_for_long_is_in_the_log() -> None:
    with recorded_logs() as logs:
        async with serving():
            await asyncio.sleep(LAG_PERIOD + 0.1)
            time.sleep(STOOD_STILL + LAG_PERIOD + 0.1)  # noqa: ASYNC251 - that is the point
            await asyncio.sleep(0.05)
        said = [line for line in logs.lines if line["event"] == "event loop stood still"]
    assert [line["level"] for line in said] == ["warning"]
    assert STOOD_STILL <= said[0]["seconds"] < 2 * STOOD_STILL


# What dead gateways left ---------------------------------------------------------------------------------------------


async def leave_behind(database: Database) -> None:
    """Leave what a gateway leaves that was killed in the middle of a turn."""
    dead = Instances(database, "dead")
    await History(database, dead).begin(Exchange("ann", f"msg_{'1' * 32}", f"msg_{'2' * 32}"), "Hello?")
    row = {"id": "turn-1", "owner": "ann", "source": "platform", "agent_id": FRIEND.id, "instance": "dead"}
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_micros", "held_micros")
    async with database.write() as connection:
        insert_turn = insert(turns).values({**row, **dict.fromkeys(counts, 0), "status": "running", "model": ""})
        await connection.execute(insert_turn.values(started_at=1_800_000_000.0))


async def statuses(database: Database) -> tuple[str, str]:
    """Return how the answer and the turn stand."""
    async with database.read() as connection:
        answer = await connection.execute(select(messages.c.status).where(messages.c.role == "assistant"))
        turn = await connection.execute(select(turns.c.status))
        return answer.scalar_one(), turn.scalar_one()


async def test_start_settles_what_a_dead_gateway_left() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.spendings["turn-1"] = Usage(100, 20)
    async with late_database() as database:
        await leave_behind(database)
        async with serving_on(database, backend) as app:
            assert (await statuses(database))[0] == "interrupted", "before anything is served"
            async with asyncio.timeout(5):
                while await statuses(database) != ("interrupted", "interrupted"):  # noqa: ASYNC110 - seen from outside
                    await asyncio.sleep(0.01)
            report = await app[keys.USAGE].report("ann", Days("2027-01-15", "2027-01-15"))
    assert (report.totals.prompt_tokens, report.totals.completion_tokens, report.totals.turns) == (100, 20, 1)


async def test_letta_that_is_down_holds_up_no_start() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.down = UpstreamUnavailable()
    async with late_database() as database:
        await leave_behind(database)
        async with serving_on(database, backend):
            assert await statuses(database) == ("interrupted", "running")


async def test_gateway_signs_off_and_closes_what_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    async with late_database() as database:
        async with serving_on(database, ScriptedBackend()) as app:
            accounts, backend = app[keys.ACCOUNTS], app[keys.BACKEND]

            async def close() -> None:
                said.append("backend closed" if isinstance(backend, ScriptedBackend) and backend.closed else "first")

            monkeypatch.setattr(accounts, "close", close)
            async with database.read() as connection:
                assert len((await connection.execute(select(instances))).all()) == 1
        async with database.read() as connection:
            assert (await connection.execute(select(instances))).all() == []
    assert said == ["first"]


@contextlib.asynccontextmanager
async def serving_on(database: Database, backend: ScriptedBackend) -> AsyncIterator[web.Application]:
    """Serve on a database that is there already."""
    app = build_app(settings(), database, backend=backend)
    listener = Listener(app, "127.0.0.1", 0)
    await listener.start()
    try:
        yield app
    finally:
        await listener.stop()
