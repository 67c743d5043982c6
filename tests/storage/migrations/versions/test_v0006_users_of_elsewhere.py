import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError

from gateway.storage.address import Address
from gateway.storage.migrations.versions import v0006_users_of_elsewhere as migration
from gateway.storage.tables import ended_sessions, metadata, user_profiles
from tests.storage.databases import opened

USER = {"name": "", "metadata": "{}", "is_blocked": False, "created_at": 1.0, "updated_at": 1.0}


async def test_database_of_before_takes_several_users_without_an_email(address: Address) -> None:
    async with opened(address) as database, database.write() as connection:
        await connection.execute(text("DROP TABLE ended_sessions"))
        await connection.execute(text("DROP INDEX ix_user_profiles_email"))
        await connection.execute(text("CREATE UNIQUE INDEX ix_user_profiles_email ON user_profiles (email)"))
        await connection.execute(insert(user_profiles), [{**USER, "id": "ann", "email": "ann@example.com"}])
        await connection.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": "0005"})
    async with opened(address) as database:
        async with database.write() as connection:
            await connection.execute(insert(user_profiles), [{**USER, "id": name, "email": ""} for name in ("b", "c")])
            row = {"id": "session", "user_id": "ann", "ended_at": 1.0, "expires_at": 2.0}
            await connection.execute(insert(ended_sessions), [row])
        with pytest.raises(IntegrityError):
            async with database.write() as connection:
                await connection.execute(insert(user_profiles), [{**USER, "id": "d", "email": "ann@example.com"}])
    assert migration.down_revision == "0005"
    assert set(migration.TABLES) <= set(metadata.tables)
