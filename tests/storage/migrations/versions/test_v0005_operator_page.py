from sqlalchemy import insert, select, text

from gateway.storage.address import Address
from gateway.storage.migrations.versions import v0005_operator_page as migration
from gateway.storage.migrations.versions import v0006_users_of_elsewhere as newest
from gateway.storage.tables import changed_settings, ended_operator_sessions, metadata
from tests.storage.databases import opened


async def test_tables_are_made_in_a_database_of_before(address: Address) -> None:
    async with opened(address) as database, database.write() as connection:
        for table in (*migration.TABLES, *newest.TABLES):
            await connection.execute(text(f"DROP TABLE {table}"))
        await connection.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": "0004"})
    async with opened(address) as database, database.write() as connection:
        await connection.execute(insert(changed_settings), [{"field": "f", "value": "v", "changed_at": 1.5}])
        await connection.execute(insert(ended_operator_sessions), [{"id": "s", "expires_at": 2.5}])
        assert (await connection.execute(select(changed_settings.c.value))).scalar_one() == "v"
    assert migration.down_revision == "0004"
    assert set(migration.TABLES) <= set(metadata.tables)
