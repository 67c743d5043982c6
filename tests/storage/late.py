"""A database that is made when it is first used: most tests of a whole gateway never use it."""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from sqlalchemy import text

from gateway.storage import database_file, opening
from gateway.storage.address import SqliteFile
from gateway.storage.engine import Database, StorageLimits

_FIRST: Final[list[bytes]] = []
"""The file of an empty database with the schema, once there is one."""


class LateDatabase(Database):
    """A ``Database`` in a folder of its own, opened by its first transaction."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"gateway-db-{uuid.uuid4().hex}"
        super().__init__(SqliteFile(self._folder / "gateway.db"), StorageLimits())
        self._is_made = False

    async def _take_place(self) -> None:
        await super()._take_place()
        if not self._is_made:
            assert isinstance(self._address, SqliteFile)
            database_file.prepare(self._address.path)  # not in a thread: some tests leave none free
            await self._get_schema(self._address)
            self._is_made = True

    async def _get_schema(self, file: SqliteFile) -> None:
        """Take the schema from the database that was made first: migrations take a tenth of a second."""
        if not _FIRST:
            await opening.migrate(self._driver, file)
            checkpoint = self._driver.transaction(writes=False)
            await checkpoint.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"), None)
            _FIRST.append(file.path.read_bytes())
        else:
            file.path.write_bytes(_FIRST[0])

    async def close(self) -> None:
        """Close it, and remove its folder."""
        await super().close()
        if self._is_made:
            shutil.rmtree(self._folder)
            self._is_made = False


@contextlib.asynccontextmanager
async def late_database() -> AsyncIterator[LateDatabase]:
    """Have one for as long as the context."""
    database = LateDatabase()
    try:
        yield database
    finally:
        await database.close()
