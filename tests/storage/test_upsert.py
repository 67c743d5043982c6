from sqlalchemy import select

from gateway.storage.engine import Database
from gateway.storage.tables import outcomes
from gateway.storage.upsert import insert_into, upsert

ROW = {"owner": "o", "key": "k", "request": b"r", "status": 200, "content_type": "t", "body": b"1", "ended_at": 1.5}


async def test_row_that_is_there_is_replaced(database: Database) -> None:
    async with database.write() as connection:
        statement = upsert(connection.dialect, outcomes)
        await connection.execute(statement, [ROW, {**ROW, "key": "other"}])
        await connection.execute(statement, [{**ROW, "body": b"2"}, {**ROW, "body": b"3"}])
        rows = (await connection.execute(select(outcomes).order_by(outcomes.c.key))).mappings().all()
    assert [dict(row) for row in rows] == [{**ROW, "body": b"3"}, {**ROW, "key": "other"}]


async def test_row_that_is_there_stays(database: Database) -> None:
    async with database.write() as connection:
        statement = insert_into(connection.dialect, outcomes).on_conflict_do_nothing()
        await connection.execute(statement, [ROW])
        await connection.execute(statement, [{**ROW, "body": b"2"}])
        assert (await connection.execute(select(outcomes.c.body))).scalars().all() == [b"1"]
