from sqlalchemy import delete, insert, select, text

from gateway.conversations.directory import Directory, Pinned
from gateway.storage.address import Address
from gateway.storage.migrations.versions import v0004_fences as migration
from gateway.storage.migrations.versions import v0005_operator_page as later
from gateway.storage.migrations.versions import v0006_users_of_elsewhere as newest
from gateway.storage.tables import pins
from tests.storage.databases import opened

BEFORE = {
    "owner": "owner",
    "agent_id": "agent-1",
    "chat": "chat",
    "conversation_id": "conv-1",
    "seen": b"",
    "instructions": None,
    "is_settled": True,
    "pinned_at": 1.5,
}


async def test_pins_of_before_are_there_and_may_be_written(address: Address) -> None:
    async with opened(address) as database, database.write() as connection:
        for table in (*later.TABLES, *newest.TABLES):
            await connection.execute(text(f"DROP TABLE {table}"))
        await connection.execute(text("ALTER TABLE pins DROP COLUMN fence"))
        await connection.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": "0003"})
        columns = ", ".join(BEFORE)
        values = ", ".join(f":{column}" for column in BEFORE)
        await connection.execute(text(f"INSERT INTO pins ({columns}) VALUES ({values})"), BEFORE)  # noqa: S608 - names of our own
    async with opened(address) as database:
        directory = Directory(database)
        assert await directory.find("owner", "agent-1", "chat") == Pinned("conv-1")
        await directory.pin("owner", "agent-1", "chat", Pinned("conv-2"), 7)
        async with database.read() as connection:
            assert (await connection.execute(select(pins.c.fence))).scalar_one() == 7
    assert migration.down_revision == "0003"


async def test_gateway_of_before_writes_on_the_new_schema(address: Address) -> None:
    """While gateways of one database are brought up to date one after the other."""
    async with opened(address) as database:
        for _ in range(2):
            async with database.write() as connection:
                await connection.execute(delete(pins))
                await connection.execute(insert(pins).values(BEFORE))
        async with database.read() as connection:
            assert (await connection.execute(select(pins.c.fence))).scalar_one() == 0
