"""Which schema a database has, without alembic, which changes it and takes 11 MiB and a tenth of a second to load."""

from typing import Final

from sqlalchemy import Connection, inspect, text

NEWEST: Final = "0003"
"""The revision that this gateway brings: the last of ``migrations/versions``."""


def current(connection: Connection) -> str | None:
    """Return the revision that the database is at; None where it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return None if found is None else str(found)
