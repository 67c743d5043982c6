import asyncio
import time
from typing import Any

import pytest
import structlog.testing
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from gateway.storage import database_file, schema, stamp
from gateway.storage.address import Address, PostgresServer
from gateway.storage.engine import Database, revision
from gateway.storage.failures import StorageFailed
from gateway.storage.tables import metadata
from tests.live.postgres import Postgres
from tests.storage.databases import QUICK, new_database, opened, run


async def in_sync(address: Address) -> list[str]:
    """Return the names of the tables, of a schema that is what ``tables.py`` says."""

    def compare(connection: Connection) -> list[str]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        return sorted(inspect(connection).get_table_names())

    return await run(address, compare)


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


async def test_schema_of_the_next_gateway_is_used_and_left_alone(address: Address) -> None:
    """A gateway is started again while newer ones take its place, or after a step back from them."""
    following = f"{int(stamp.NEWEST) + 1:04}"
    async with opened(address) as database, database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = :next"), {"next": following})
        await connection.execute(text("INSERT INTO outcomes VALUES ('o', 'k', 'r', 200, 't', 'b', 1.5)"))
    with structlog.testing.capture_logs() as logs:
        async with opened(address) as database, database.read() as connection:
            assert (await connection.execute(text("SELECT owner FROM outcomes"))).scalar_one() == "o"
    assert [(line["schema"], line["known"]) for line in logs if "newer" in line["event"]] == [(following, stamp.NEWEST)]
    assert await revision(address) == following


async def test_migration_that_fails_leaves_nothing(address: Address) -> None:
    """A table of the same name stands in the way of the last step."""
    if not isinstance(address, PostgresServer):
        await asyncio.to_thread(database_file.prepare, address.path)
    await run(address, lambda connection: connection.execute(text("CREATE TABLE responses (id INTEGER)")))
    with pytest.raises(Exception, match="already exists"):
        await Database.open(address)
    assert await run(address, lambda connection: inspect(connection).get_table_names()) == ["responses"]


@pytest.mark.live
@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
async def test_gateways_that_start_at_once_on_one_database(postgres: Postgres, isolation: str) -> None:
    postgres_address = new_database(postgres)
    name = postgres_address.url.rpartition("/")[2].partition("?")[0]
    await asyncio.to_thread(postgres.run, f"alter database {name} set default_transaction_isolation = '{isolation}'")
    databases = await asyncio.gather(*(Database.open(postgres_address) for _ in range(4)))
    for database in databases:
        await database.close()
    assert await revision(postgres_address) == schema.newest()


# While gateways of one database are brought up to date one after the other -------------------------------------------


def before() -> str:
    """Return the revision that the gateway of before brought."""
    newest = schema._scripts(schema._config(None)).get_revision("head")
    assert isinstance(newest.down_revision, str)
    return newest.down_revision


def go_back(connection: Connection) -> None:
    """Make the schema of before, in a database that is empty."""
    command.upgrade(schema._config(connection), before())


def shape(connection: Connection) -> dict[str, dict[str, Any]]:
    """Return the columns of each table, by their names, and under no name what else it demands of a row."""
    found = inspect(connection)
    return {
        table: {
            **{column["name"]: column for column in found.get_columns(table)},
            "": [
                found.get_pk_constraint(table)["constrained_columns"],
                sorted(str(key["constrained_columns"]) for key in found.get_foreign_keys(table)),
                sorted(str(key["column_names"]) for key in found.get_unique_constraints(table)),
                sorted(str(index["column_names"]) for index in found.get_indexes(table) if index["unique"]),
                sorted(str(check["sqltext"]) for check in found.get_check_constraints(table)),
            ],
        }
        for table in found.get_table_names()
    }


async def test_what_the_gateway_of_before_reads_and_writes_is_still_right(address: Address) -> None:
    """It names the columns that it knows, and no others."""
    if not isinstance(address, PostgresServer):
        await asyncio.to_thread(database_file.prepare, address.path)

    def upgraded(connection: Connection) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        go_back(connection)
        before = shape(connection)
        schema.upgrade(connection)
        return before, shape(connection)

    old, new = await run(address, upgraded)
    assert await revision(address) == schema.newest()
    for table, columns in old.items():
        assert new[table][""] == columns[""], table
        for name in columns.keys() - {""}:
            assert str(new[table][name]["type"]) == str(columns[name]["type"]), (table, name)
            assert new[table][name]["nullable"] == columns[name]["nullable"], (table, name)
        for name in new[table].keys() - columns.keys():
            assert new[table][name]["nullable"] or new[table][name]["default"] is not None, (table, name)


@pytest.mark.live
async def test_backup_that_is_under_way_puts_off_the_new_gateway_and_not_the_others(
    postgres_address: PostgresServer,
) -> None:
    """A dump reads every table for as long as it takes; who waits to change one would hold up all who come after."""
    async with opened(postgres_address) as old:
        async with old.write() as connection:
            await connection.execute(text("ALTER TABLE pins DROP COLUMN fence"))
            await connection.execute(text("DROP TABLE changed_settings, ended_operator_sessions, ended_sessions"))
            await connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
        async with old.read() as backup:
            await backup.execute(text("SELECT * FROM pins"))
            starting = asyncio.get_running_loop().create_task(Database.open(postgres_address, QUICK))
            await asyncio.sleep(0.5)
            began = time.monotonic()
            async with old.read() as connection:
                await connection.execute(text("SELECT * FROM pins"))
            assert 0.5 < time.monotonic() - began < 4, "it waited behind the new gateway"
            with pytest.raises(StorageFailed, match="in somebody else's use"):
                await starting
        async with opened(postgres_address):
            assert await revision(postgres_address) == schema.newest()
