"""Everything that a database holds, as whoever steals it reads it."""

import pytest
from sqlalchemy import make_url

from gateway.storage.address import Address, SqliteFile
from gateway.storage.tables import metadata
from tests.live.postgres import Postgres


def dump(address: Address, request: pytest.FixtureRequest) -> bytes:
    """Return the file with what lies beside it, or all rows of all tables, with bytes in hexadecimal."""
    if isinstance(address, SqliteFile):
        return b"\n".join(path.read_bytes() for path in address.path.parent.iterdir())
    server: Postgres = request.getfixturevalue("postgres")
    name = make_url(address.url).database or ""
    tables = metadata.tables
    return "\n".join(server.run(f"select whole::text from {table} whole", name) for table in tables).encode()  # noqa: S608
