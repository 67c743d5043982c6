import asyncio
import sys

from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.engine.interfaces import ReflectedIndex

from gateway.storage import schema, stamp
from gateway.storage.address import Address, SqliteFile
from gateway.storage.engine import revision
from tests.storage.databases import opened


def test_newest_is_the_last_of_the_migrations() -> None:
    assert schema.newest() == stamp.NEWEST


async def test_stamp_of_a_database(address: Address) -> None:
    assert await revision(address) is None
    async with opened(address) as database, database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert await revision(address) == "0001"


def test_new_file_has_what_the_migrations_make() -> None:
    with create_engine("sqlite://").connect() as created, create_engine("sqlite://").connect() as migrated:
        assert stamp.is_new_file(created)
        stamp.create(created)
        assert not stamp.is_new_file(created)
        schema.upgrade(migrated)
        assert shape(created) == shape(migrated)
        assert stamp.current(created) == stamp.current(migrated) == stamp.NEWEST


def shape(connection: Connection) -> dict[str, object]:
    """Return what SQLite knows of each table: its columns with their types and defaults, its keys and indexes."""
    found = inspect(connection)
    return {
        table: (
            [{**column, "type": str(column["type"])} for column in found.get_columns(table)],
            found.get_pk_constraint(table),
            sorted(map(str, found.get_unique_constraints(table))),
            sorted(map(str, found.get_foreign_keys(table))),
            sorted(map(str, found.get_check_constraints(table))),
            sorted(map(_index, found.get_indexes(table))),
        )
        for table in found.get_table_names()
    }


def _index(index: ReflectedIndex) -> str:
    options = {name: str(value) for name, value in index.get("dialect_options", {}).items()}
    return str({**index, "dialect_options": options})


async def test_file_is_made_and_opened_again_without_alembic(sqlite_file: SqliteFile) -> None:
    for _ in range(2):
        opening = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _OPEN, sqlite_file.path, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await opening.communicate()
        assert said.split() == [b"False", b"False"]


_OPEN = """
import asyncio, pathlib, sys
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database

async def main():
    database = await Database.open(SqliteFile(pathlib.Path(sys.argv[1])))
    await database.close()

asyncio.run(main())
print("alembic" in sys.modules, "asyncpg" in sys.modules)
"""
