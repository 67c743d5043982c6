import asyncio
import contextlib
from typing import Any

import pytest
from sqlalchemy import Column, func, insert, select, update

from gateway.accounts.agents import AgentConfig, PersonalAgents
from gateway.accounts.deletion import BELONGINGS, CREDENTIALS, FURTHER_PASSES, KEEP, PATIENCE, Deletion
from gateway.accounts.errors import DeletionUnfinished
from gateway.accounts.profiles import Profiles
from gateway.accounts.registration import Registration
from gateway.accounts.stopping import NoTurns, Stopping
from gateway.errors import StorageUnavailable
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import (
    changed_settings,
    deletions,
    ended_operator_sessions,
    instances,
    messages,
    metadata,
    refresh_tokens,
    sessions,
    user_profiles,
)
from gateway.tasks import TaskSet
from tests.accounts.faults import Fault, Faults, FaultyBackend, FaultyBilling, FaultyIdentity

NOW = 1_800_000_000.0


def some_value(column: Column[Any], user_id: str) -> str | bytes | int:
    values: dict[type, str | bytes | int] = {str: f"{user_id} {column.name}", bytes: user_id.encode()}
    return values.get(column.type.python_type, 1)


class World:
    """Two users with everything that a user may have; ``clock`` is what the gateways' clocks say."""

    def __init__(self, database: Database) -> None:
        self.faults = Faults()
        self.backend = FaultyBackend(self.faults)
        self.billing = FaultyBilling(self.faults)
        self.identity = FaultyIdentity(self.faults)
        self.database = database
        self.profiles = Profiles(database)
        self.clock = NOW
        self.forgotten: list[str] = []
        self.ann = ""
        self.bob = ""

    def agents(self) -> PersonalAgents:
        return PersonalAgents(
            backend=self.backend,
            profiles=self.profiles,
            billing=self.billing,
            database=self.database,
            config=AgentConfig(),
            stopping=Stopping(self.database, NoTurns),
            tasks=TaskSet(),
        )

    def deletion(self) -> Deletion:
        return Deletion(
            database=self.database,
            identity=self.identity,
            profiles=self.profiles,
            agents=self.agents(),
            billing=self.billing,
            stopping=Stopping(self.database, NoTurns),
            forget=self.forgotten.append,
            now=lambda: self.clock,
        )

    async def fill(self) -> None:
        registration = Registration(
            identity=self.identity,
            profiles=self.profiles,
            agents=self.agents(),
            deletion=self.deletion(),
            is_open=lambda: True,
        )
        for name in ("ann", "bob"):
            profile, _ = await registration.register(f"{name}@example.com", "correct horse", name, "192.0.2.1")
            assert profile is not None
            setattr(self, name, profile.id)
            await self.give_rows(profile.id)
        self.faults.taken.clear()

    async def give_rows(self, user_id: str) -> None:
        """Give a user a row in each table that may hold one."""
        async with self.database.write() as connection:
            for column in (*CREDENTIALS, sessions.c.user_id, *BELONGINGS):
                row = {one.name: some_value(one, user_id) for one in column.table.columns if one.name != "position"}
                await connection.execute(insert(column.table).values({**row, column.name: user_id}))
            await connection.execute(
                insert(refresh_tokens).values(hash=user_id.encode(), session_id=f"{user_id} id", issued_at=1.0)
            )

    async def rows_of(self, user_id: str) -> dict[str, int]:
        """Return how many rows of each table name the user in any way."""
        found = {}
        async with self.database.read() as connection:
            for table in metadata.sorted_tables:
                rows = (await connection.execute(select(table))).all()
                named = [row for row in rows if any(user_id in str(value) for value in row)]
                if named:
                    found[table.name] = len(named)
        return found


@pytest.fixture
async def world(database: Database) -> World:
    world = World(database)
    await world.fill()
    return world


NOT_OF_USERS = {changed_settings, ended_operator_sessions, instances}


def test_every_table_that_says_whose_a_row_is_is_known() -> None:
    """A new table without its line here would keep what a user left."""
    told = {column.table for column in (*CREDENTIALS, *BELONGINGS)}
    others = {deletions, refresh_tokens, sessions, user_profiles, *NOT_OF_USERS}
    assert told | others == set(metadata.sorted_tables)
    for table in metadata.sorted_tables:
        if table not in others:
            assert {"owner", "user_id", "id"} & set(table.columns.keys())


async def test_nothing_is_left_but_the_note(world: World) -> None:
    before = await world.rows_of(world.bob)
    await world.deletion().delete(world.ann)
    assert await world.rows_of(world.ann) == {"deletions": 1}
    assert world.billing.accounts == {world.bob}
    assert list(world.identity.users) == ["bob@example.com"]
    assert [agent.tags[1].rpartition(":")[2] for agent in world.backend.listed] == [world.bob]
    assert world.backend.gone_providers == [f"provider-{world.ann}"]
    assert world.forgotten == [world.ann]
    assert await world.rows_of(world.bob) == before, "another user's stays as it is"
    assert len(before) == len(metadata.tables) - len({deletions, *NOT_OF_USERS})


@pytest.mark.parametrize("step", range(3))
async def test_step_that_fails_holds_up_no_other(world: World, step: int) -> None:
    """Whoever has a token or a key of the user's is out all the same, and what the gateway keeps is gone."""
    world.faults.at = (0, 1, 4)[step]
    with pytest.raises(DeletionUnfinished):
        await world.deletion().delete(world.ann)
    assert await world.rows_of(world.ann) == {"deletions": 1, "user_profiles": 1}
    profile = await world.profiles.find(world.ann)
    assert profile is not None
    assert profile.is_blocked, "an access token of elsewhere lets nobody in"
    left = (len(world.identity.users) == 2, len(world.backend.listed) == 2, len(world.billing.accounts) == 2)
    assert left == tuple(number == step for number in range(3))


async def test_crash_at_once_leaves_nobody_in(world: World) -> None:
    world.faults.at, world.faults.fault = 0, "hangs before"
    await interrupted(world)
    left = await world.rows_of(world.ann)
    assert not {"sessions", "refresh_tokens", "user_keys", "passwords"} & set(left)
    assert {"user_profiles", "messages", "deletions"} <= set(left)


STEPS = ("delete identity", "find", "delete", "delete provider", "close account")


async def test_steps_are_these(world: World) -> None:
    await world.deletion().delete(world.ann)
    assert tuple(world.faults.taken) == STEPS


@pytest.mark.parametrize("fault", ["fails before", "fails after", "hangs before", "hangs after"])
@pytest.mark.parametrize("step", range(len(STEPS)))
async def test_sweep_finishes_what_stopped_anywhere(world: World, step: int, fault: Fault) -> None:
    world.faults.at, world.faults.fault = step, fault
    await interrupted(world)
    assert "user_profiles" in await world.rows_of(world.ann)
    world.clock += PATIENCE + 1
    await world.deletion().sweep(world.clock)
    assert await world.rows_of(world.ann) == {"deletions": 1}
    assert (len(world.backend.listed), world.billing.accounts) == (1, {world.bob})


async def interrupted(world: World) -> None:
    loop = asyncio.get_running_loop()
    working = loop.create_task(world.deletion().delete(world.ann))
    hanging = loop.create_task(world.faults.hanging.wait())
    await asyncio.wait({working, hanging}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, hanging):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError, DeletionUnfinished):
        await working


@pytest.mark.parametrize("step", range(len(STEPS)))
async def test_next_try_finishes_too(world: World, step: int) -> None:
    world.faults.at = step
    with pytest.raises(DeletionUnfinished):
        await world.deletion().delete(world.ann)
    await world.deletion().delete(world.ann)
    assert await world.rows_of(world.ann) == {"deletions": 1}


async def test_sweep_leaves_alone_what_has_just_begun(world: World) -> None:
    world.faults.at = 0
    with pytest.raises(DeletionUnfinished):
        await world.deletion().delete(world.ann)
    taken = len(world.faults.taken)
    await world.deletion().sweep(world.clock + 1)
    assert len(world.faults.taken) == taken


async def test_sweep_that_fails_goes_on_with_the_next_user(world: World) -> None:
    for user_id in (world.ann, world.bob):
        world.faults.at = len(world.faults.taken)
        with pytest.raises(DeletionUnfinished):
            await world.deletion().delete(user_id)
        world.clock += 1
    world.faults.at = len(world.faults.taken)
    await world.deletion().sweep(world.clock + PATIENCE + 1)
    assert "user_profiles" in await world.rows_of(world.ann)
    assert await world.rows_of(world.bob) == {"deletions": 1}


async def test_note_stays_for_eight_days_and_takes_along_what_came_late(world: World) -> None:
    deletion = world.deletion()
    await deletion.delete(world.ann)
    assert await deletion.is_deleted(world.ann)
    await world.give_rows(world.ann)  # a request that was under way
    world.clock += KEEP - 1
    await deletion.sweep(world.clock)
    assert await deletion.is_deleted(world.ann)
    world.clock += 2
    await deletion.sweep(world.clock)
    assert await world.rows_of(world.ann) == {}
    assert not await deletion.is_deleted(world.ann)


async def test_what_came_late_goes_with_the_next_sweeps(world: World) -> None:
    deletion = world.deletion()
    await deletion.delete(world.ann)
    for _ in range(FURTHER_PASSES):
        await world.give_rows(world.ann)  # a request that was under way
        await deletion.sweep(world.clock)
        assert await world.rows_of(world.ann) == {"deletions": 1}
    await deletion.sweep(world.clock)
    assert "user_profiles" in await world.rows_of(world.bob)


async def test_somebody_who_never_was(world: World) -> None:
    deletion = world.deletion()
    assert not await deletion.is_deleted("nobody")
    assert not await deletion.is_deleted("nul\0")
    await deletion.delete("nobody")
    assert len(await world.profiles.page(None, 10, None)) == 2


async def test_more_messages_than_one_transaction_takes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.accounts.history.DELETED", 3)
    async with world.database.write() as connection:
        await add_messages(connection, world.ann, 10)
    await world.deletion().delete(world.ann)
    async with world.database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(messages))).scalar_one() == 1
        assert (await connection.execute(select(sessions.c.user_id))).scalars().all() == [world.bob]


async def add_messages(connection: Connection, user_id: str, count: int) -> None:
    texts = {"instance": "i", "role": "user", "status": "complete", "text": "", "reasoning": "", "activity": "[]"}
    rows = [{"id": f"{user_id} {n}", "user_id": user_id, "created_at": 1.0, **texts} for n in range(count)]
    await connection.execute(insert(messages), rows)


async def test_session_that_is_refreshed_at_the_same_time(world: World) -> None:
    """A refresh holds the session and then writes its tokens: a deletion waits for it, and not it for the deletion."""
    async with asyncio.timeout(20), world.database.write() as connection:
        session = select(sessions.c.id).where(sessions.c.user_id == world.ann).with_for_update()
        (session_id,) = (await connection.execute(session)).scalars()
        deleting = asyncio.get_running_loop().create_task(world.deletion().delete(world.ann))
        await asyncio.sleep(0.3)
        assert not deleting.done()
        of_session = refresh_tokens.c.session_id == session_id
        used = await connection.execute(update(refresh_tokens).where(of_session).values(used_at=2.0))
        assert used.rowcount == 1
        await connection.execute(insert(refresh_tokens).values(hash=b"next", session_id=session_id, issued_at=2.0))
    await deleting
    assert await world.rows_of(world.ann) == {"deletions": 1}


async def test_commit_that_is_in_doubt_is_forgotten_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Deletion._begin

    async def lost(self: Deletion, user_id: str) -> None:
        await begin(self, user_id)
        raise StorageUnavailable

    monkeypatch.setattr(Deletion, "_begin", lost)
    with pytest.raises(StorageUnavailable):
        await world.deletion().delete(world.ann)
    assert world.forgotten == [world.ann]
