"""Which schema a database has, and how a new file gets its own: without alembic, which takes 11 MiB to load."""

from typing import Final

from sqlalchemy import Connection, inspect, text

from gateway.storage.tables import metadata

NEWEST: Final = "0006"
"""The revision that this gateway brings: the last of ``migrations/versions``."""

# Alembic's own table, as it makes it.
_VERSIONS: Final = text(
    "CREATE TABLE alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
_STAMP: Final = text("INSERT INTO alembic_version VALUES (:revision)")


def current(connection: Connection) -> str | None:
    """Return the revision that the database is at; None where it has none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return None if found is None else str(found)


def is_new_file(connection: Connection) -> bool:
    """Tell whether this is SQLite, and nothing is in it."""
    return connection.dialect.name == "sqlite" and not inspect(connection).get_table_names()


def create(connection: Connection) -> None:
    """Make in an empty file what all migrations together make, and stamp it as they do.

    PostgreSQL is not for it: there the migrations also set rights on rows.
    """
    metadata.create_all(connection, checkfirst=False)
    connection.execute(_VERSIONS)
    connection.execute(_STAMP, {"revision": NEWEST})
