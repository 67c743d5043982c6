from typing import Final

import pytest

from gateway.accounts.identity.ended_sessions import EndedSessions
from gateway.storage.engine import Database
from gateway.storage.tables import ended_sessions
from tests.accounts.ledgers import rows_of

NOW: Final = 1_800_000_000.0


@pytest.fixture
def ended(database: Database) -> EndedSessions:
    return EndedSessions(database, 60.0, lambda: NOW)


async def test_session_that_nobody_ended(ended: EndedSessions) -> None:
    assert await ended.goes_on("ann", "one", 5.0)
    assert await ended.goes_on("ann", None, 5.0)
    assert await ended.goes_on("nul\0", "nul\0", 5.0)


async def test_session_that_ended_is_the_only_one(ended: EndedSessions) -> None:
    assert await ended.goes_on("ann", "one", 5.0)
    await ended.end("ann", "one")
    assert not await ended.goes_on("ann", "one", 5.0)
    assert await ended.goes_on("ann", "two", 5.0)
    assert await ended.goes_on("ann", None, 5.0)


async def test_user_whose_sessions_ended_can_begin_new_ones(ended: EndedSessions) -> None:
    await ended.end_all("ann", 100.7)
    assert not await ended.goes_on("ann", "one", 99)
    assert not await ended.goes_on("ann", None, 99)
    assert await ended.goes_on("ann", "new", 100)
    assert await ended.goes_on("bob", "one", 99)


async def test_what_ended_stays_so_after_a_restart_and_in_other_gateways(
    ended: EndedSessions, database: Database
) -> None:
    await ended.end("ann", "one")
    await ended.end_all("bob", 100.0)
    another = EndedSessions(database, 60.0, lambda: NOW)
    assert not await another.goes_on("ann", "one", 5.0)
    assert not await another.goes_on("bob", "two", 99.0)


async def test_what_no_token_can_hold_any_more_is_forgotten(ended: EndedSessions, database: Database) -> None:
    await ended.end("ann", "one")
    await ended.purge(NOW + 59)
    assert [row["id"] for row in await rows_of(database, ended_sessions)] == ["one"]
    await ended.purge(NOW + 60)
    assert await rows_of(database, ended_sessions) == []
