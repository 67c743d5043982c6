import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from gateway.storage.engine import Database

USER = (
    "INSERT INTO user_profiles (id, email, name, metadata, letta_agent_id, is_blocked, created_at, updated_at) "
    "VALUES (:id, :email, '', '{}', :agent, false, 1.5, 1.5)"
)


async def add(database: Database, user_id: str, email: str, agent: str | None = None) -> None:
    async with database.write() as connection:
        await connection.execute(text(USER), [{"id": user_id, "email": email, "agent": agent}])


@pytest.mark.parametrize(
    ("user_id", "email", "agent"), [("a", "c@x", None), ("b", "a@x", None), ("b", "b@x", "agent-1")]
)
async def test_id_email_and_agent_are_one_users_alone(
    database: Database, user_id: str, email: str, agent: str | None
) -> None:
    await add(database, "a", "a@x", "agent-1")
    with pytest.raises(IntegrityError):
        await add(database, user_id, email, agent)
    await add(database, "b", "b@x")
    await add(database, "c", "c@x")


async def test_messages_count_up_by_themselves(database: Database) -> None:
    insert = (
        "INSERT INTO messages (id, user_id, instance, role, status, text, reasoning, activity, created_at) "
        "VALUES (:id, 'u', 'i', 'user', 'complete', '', '', '[]', 1.5)"
    )
    async with database.write() as connection:
        await connection.execute(text(insert), [{"id": name} for name in "abc"])
    async with database.read() as connection:
        rows = (await connection.execute(text("SELECT id FROM messages ORDER BY position"))).scalars().all()
    assert rows == ["a", "b", "c"]


async def test_sums_of_money_may_be_large(database: Database) -> None:
    billions = 9_000_000_000_000_000_000
    async with database.write() as connection:
        insert = text("INSERT INTO spending VALUES ('o', 'total', :spent, 0)")
        await connection.execute(insert, [{"spent": billions}])
    async with database.read() as connection:
        assert (await connection.execute(text("SELECT spent_micros FROM spending"))).scalar_one() == billions
