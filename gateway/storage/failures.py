"""What goes wrong with a database -> why it cannot be used: one table for both kinds, and no text of theirs.

What is not in the table is a bug of ours and stays what it is: a broken constraint, a wrong statement.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gateway.errors import StorageUnavailable


class StorageFailed(Exception):
    """The database cannot be opened; the message says why in one line, for the operator.

    ``passes`` tells that it may be opened later, without anybody changing the settings or the database.
    """

    def __init__(self, message: str, *, passes: bool = False) -> None:
        self.passes = passes
        super().__init__(message)


class NoPrimary(ConnectionError):
    """None of the servers that a URL names is of the kind that it asks for."""


BUSY: Final = "busy"
CLOSED: Final = "closed"
CONFLICT: Final = "in conflict"
DAMAGED: Final = "damaged"
FULL: Final = "full"
GONE: Final = "gone"
LOCKED: Final = "locked"
READ_ONLY: Final = "read-only"
REFUSED: Final = "login refused"
SLOW: Final = "slow"
STOPPED: Final = "stopped"
UNREACHABLE: Final = "unreachable"

# https://www.sqlite.org/rescode.html: primary codes.
_SQLITE: Final = {
    sqlite3.SQLITE_PERM: READ_ONLY,
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_NOMEM: "out of memory",
    sqlite3.SQLITE_READONLY: READ_ONLY,
    sqlite3.SQLITE_INTERRUPT: SLOW,
    sqlite3.SQLITE_IOERR: "I/O error",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_CANTOPEN: GONE,
    sqlite3.SQLITE_NOTADB: DAMAGED,
}

# https://www.postgresql.org/docs/current/errcodes-appendix.html: codes, or what they begin with.
_POSTGRES: Final = {
    "08": UNREACHABLE,
    "25006": READ_ONLY,
    "28": REFUSED,
    "3D": GONE,
    "40": CONFLICT,
    "42501": REFUSED,
    "53": FULL,
    "55P03": LOCKED,
    "57": STOPPED,
    "58": "I/O error",
    "XX": DAMAGED,
}

_KINDS: Final[dict[type[Exception], str]] = {
    TimeoutError: SLOW,
    PoolTimeout: SLOW,
    NoPrimary: READ_ONLY,  # before what it is one of
    OSError: UNREACHABLE,
}

PASSING: Final = frozenset({CONFLICT, FULL, READ_ONLY, SLOW, STOPPED, UNREACHABLE})
"""What a server may be of for a while: it starts, is replaced, or cannot be reached. Not what is locked: who waits to
change a table makes all others wait behind."""


def reason_of(error: BaseException) -> str | None:
    """Say in a word or two why the database cannot be used; None where the error is not the database's state."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, sqlite3.Error):
        code = getattr(original, "sqlite_errorcode", None)
        if code is not None:
            return _SQLITE.get(code & 0xFF)
    sqlstate = getattr(original, "sqlstate", None)
    if isinstance(sqlstate, str):
        return next((reason for code, reason in _POSTGRES.items() if sqlstate.startswith(code)), None)
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return UNREACHABLE
    return next((reason for kind, reason in _KINDS.items() if isinstance(original, kind)), None)


@contextmanager
def translated() -> Iterator[None]:
    """Raise ``StorageUnavailable`` for what the table knows."""
    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        raise StorageUnavailable(reason) from error
