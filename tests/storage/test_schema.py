import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from gateway.storage import connections, schema
from gateway.storage.address import Address, PostgresServer
from gateway.storage.engine import Database, revision
from gateway.storage.failures import StorageFailed
from gateway.storage.tables import metadata
from tests.storage.databases import opened


async def in_sync(address: Address) -> list[str]:
    """Return the names of the tables, of a schema that is what ``tables.py`` says."""

    def compare(connection: Connection) -> list[str]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        return sorted(inspect(connection).get_table_names())

    engine = connections.connect(address, connections=1, patience=1)
    try:
        async with engine.connect() as raw:
            return await raw.run_sync(compare)
    finally:
        await engine.dispose()


async def test_empty_database_gets_the_schema(address: Address) -> None:
    assert await revision(address) is None
    async with opened(address):
        pass
    assert await revision(address) == schema.newest()
    assert await in_sync(address) == sorted([*metadata.tables, "alembic_version"])


async def test_schema_that_is_there_stays_with_what_it_holds(address: Address) -> None:
    async with opened(address) as database, database.write() as connection:
        await connection.execute(text("INSERT INTO outcomes VALUES ('o', 'k', 'r', 200, 't', 'b', 1.5)"))
    for _ in range(2):
        async with opened(address) as database, database.read() as connection:
            assert (await connection.execute(text("SELECT owner, ended_at FROM outcomes"))).one() == ("o", 1.5)


async def test_newer_schema_is_refused_and_left_alone(address: Address) -> None:
    async with opened(address) as database, database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageFailed, match="schema 9999 was made by a newer gateway"):
        await Database.open(address)
    assert await revision(address) == "9999"


async def test_migration_that_fails_leaves_nothing(address: Address) -> None:
    """A table of the same name stands in the way of the last step."""
    engine = connections.connect(address, connections=1, patience=1)
    if not isinstance(address, PostgresServer):
        await asyncio.to_thread(connections.prepare, address.path)
    async with engine.begin() as raw:
        await raw.execute(text("CREATE TABLE responses (id INTEGER)"))
    await engine.dispose()
    with pytest.raises(Exception, match="already exists"):
        await Database.open(address)
    engine = connections.connect(address, connections=1, patience=1)
    async with engine.connect() as raw:
        assert await raw.run_sync(lambda connection: inspect(connection).get_table_names()) == ["responses"]
    await engine.dispose()


@pytest.mark.live
async def test_gateways_that_start_at_once_on_one_database(postgres_address: PostgresServer) -> None:
    databases = await asyncio.gather(*(Database.open(postgres_address) for _ in range(4)))
    for database in databases:
        await database.close()
    assert await revision(postgres_address) == schema.newest()
