import asyncio
import re
import sys

from sqlalchemy import Connection, create_engine, text

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
        assert statements(created) == statements(migrated)
        assert stamp.current(created) == stamp.current(migrated) == stamp.NEWEST


def statements(connection: Connection) -> dict[str, list[str]]:
    """Return by what each table and index was made, word by word."""
    made = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    return {name: re.findall(r"\w+|[^\w\s]", sql) for name, sql in made}


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
