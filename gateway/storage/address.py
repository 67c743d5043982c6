"""Where the database is: a SQLite file, or a PostgreSQL server."""

from pathlib import Path
from typing import Final, TypeAlias

import msgspec
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from gateway.storage.failures import StorageFailed

FILE_NAME: Final = "gateway.db"
_POSTGRES: Final = frozenset({"postgres", "postgresql", "postgresql+asyncpg"})
_SQLITE: Final = frozenset({"sqlite", "sqlite+aiosqlite"})
_WRONG: Final = (
    "LETTA_GATEWAY_DATABASE_URL is wrong: expected postgresql://user:password@host/database or sqlite:////path/to/file."
)


class SqliteFile(msgspec.Struct, frozen=True):
    """A file that one gateway has to itself."""

    path: Path

    @property
    def shown(self) -> str:
        """Say where it is."""
        return str(self.path)


class PostgresServer(msgspec.Struct, frozen=True):
    """A database on a server, by the URL that libpq and asyncpg read, ``?sslmode=`` and the like included."""

    url: str

    @property
    def shown(self) -> str:
        """Say where it is, without its password."""
        url = make_url(self.url)
        return f"{url.database or ''} of PostgreSQL at {url.host or url.query.get('host', 'its socket')}"

    def __repr__(self) -> str:
        """Show no password."""
        return "PostgresServer(url='***')"


Address: TypeAlias = SqliteFile | PostgresServer


def address_of(url: str, home: Path) -> Address:
    """Read LETTA_GATEWAY_DATABASE_URL; empty is a file in the gateway's home. Raises ``StorageFailed``."""
    if not url:
        return SqliteFile(home.expanduser().absolute() / FILE_NAME)
    scheme, separator, rest = url.partition("://")
    if separator and scheme in _POSTGRES:
        return PostgresServer(f"postgresql://{rest}")
    if separator and scheme in _SQLITE:
        return SqliteFile(_file(url))
    raise StorageFailed(_WRONG)


def _file(url: str) -> Path:
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        raise StorageFailed(_WRONG) from None
    if not parts.database or parts.database.startswith((":memory:", "file:")) or parts.host or parts.query:
        raise StorageFailed(_WRONG)
    return Path(parts.database).expanduser().absolute()
