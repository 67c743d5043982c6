"""Insert or replace in one statement: the same SQL on both databases, by two names in SQLAlchemy."""

from functools import cache

from sqlalchemy import Dialect, Table
from sqlalchemy.dialects import postgresql, sqlite


def insert_into(dialect: Dialect, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Return an insert that can be told what to do with a row that is there already."""
    return _insert_into(dialect.name, table)


def upsert(dialect: Dialect, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Return an insert that replaces the row of the same primary key."""
    return _upsert(dialect.name, table)


def _insert_into(dialect: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


@cache  # making the statement takes as long as running it
def _upsert(dialect: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    insert = _insert_into(dialect, table)
    return insert.on_conflict_do_update(
        index_elements=list(table.primary_key),
        set_={column.name: insert.excluded[column.name] for column in table.columns if not column.primary_key},
    )
