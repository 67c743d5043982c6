"""The schema's version: brought up to date at start, by one gateway at a time."""

from typing import Final

import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from gateway.storage.failures import StorageFailed
from gateway.storage.stamp import NEWEST, current

_log: Final = structlog.get_logger("gateway.storage")

_ONE_AT_A_TIME: Final = 7_011_873_451
"""A number of our own among PostgreSQL's advisory locks."""
_LOCK_WAIT: Final = text("SET LOCAL lock_timeout = '3s'")
"""Who waits to change a table makes all others wait behind: for less than one statement of theirs may take."""


def upgrade(connection: Connection) -> None:
    """Run the revisions that are missing, inside of the caller's transaction.

    One revision more than this gateway knows is left alone: it takes nothing away that this one needs, so that a
    gateway can be started again while newer ones replace it, and after a step back. Raises ``StorageFailed`` for a
    schema that is newer than that.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _ONE_AT_A_TIME})
        connection.execute(_LOCK_WAIT)
    config = _config(connection)
    found = current(connection)
    if found is None or found in {script.revision for script in _scripts(config).walk_revisions()}:
        command.upgrade(config, "head")
    elif found == _next(NEWEST):
        _log.warning("the schema is one revision newer than this gateway", schema=found, known=NEWEST)
    else:
        raise StorageFailed(
            f"the database's schema {found} was made by a newer gateway: run that version, or restore a backup."
        )


def _next(known: str) -> str:
    return f"{int(known) + 1:0{len(known)}}"


def newest() -> str | None:
    """Return the revision that this gateway brings."""
    return _scripts(_config(None)).get_current_head()


def _config(connection: Connection | None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "gateway.storage:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _scripts(config: Config) -> ScriptDirectory:
    return ScriptDirectory.from_config(config)
