import asyncio
import sys

from sqlalchemy import text

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


async def test_file_that_is_up_to_date_is_opened_without_alembic(sqlite_file: SqliteFile) -> None:
    async with opened(sqlite_file):
        pass
    opening = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _OPEN, sqlite_file.path, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await opening.communicate()
    assert said.split() == [b"False"]


_OPEN = """
import asyncio, pathlib, sys
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database

async def main():
    database = await Database.open(SqliteFile(pathlib.Path(sys.argv[1])))
    await database.close()

asyncio.run(main())
print("alembic" in sys.modules)
"""
