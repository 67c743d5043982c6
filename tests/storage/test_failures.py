import sqlite3

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gateway.errors import StorageUnavailable
from gateway.storage.failures import NoPrimary, reason_of, translated


def of_sqlite(code: int) -> DBAPIError:
    error = sqlite3.OperationalError("secret")
    error.sqlite_errorcode = code
    return DBAPIError("SELECT", None, error)


class OfPostgres(Exception):
    def __init__(self, sqlstate: str) -> None:
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (sqlite3.SQLITE_BUSY, "locked"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "locked"),
        (sqlite3.SQLITE_LOCKED, "locked"),
        (sqlite3.SQLITE_FULL, "full"),
        (sqlite3.SQLITE_READONLY, "read-only"),
        (sqlite3.SQLITE_READONLY_DBMOVED, "read-only"),
        (sqlite3.SQLITE_IOERR, "I/O error"),
        (sqlite3.SQLITE_IOERR_FSYNC, "I/O error"),
        (sqlite3.SQLITE_CANTOPEN, "gone"),
        (sqlite3.SQLITE_CORRUPT, "damaged"),
        (sqlite3.SQLITE_NOTADB, "damaged"),
        (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, None),
        (sqlite3.SQLITE_ERROR, None),
        (sqlite3.SQLITE_MISMATCH, None),
    ],
)
def test_sqlite(code: int, reason: str | None) -> None:
    assert reason_of(of_sqlite(code)) == reason


@pytest.mark.parametrize(
    ("sqlstate", "reason"),
    [
        ("08006", "unreachable"),
        ("25006", "read-only"),
        ("28P01", "login refused"),
        ("3D000", "gone"),
        ("40001", "in conflict"),
        ("40P01", "in conflict"),
        ("42501", "login refused"),
        ("53100", "full"),
        ("53300", "full"),
        ("55P03", "locked"),
        ("57014", "stopped"),
        ("57P01", "stopped"),
        ("58030", "I/O error"),
        ("XX001", "damaged"),
        ("23505", None),
        ("42P01", None),
        ("22021", None),
    ],
)
def test_postgresql(sqlstate: str, reason: str | None) -> None:
    assert reason_of(OfPostgres(sqlstate)) == reason
    assert reason_of(DBAPIError("SELECT", None, OfPostgres(sqlstate))) == reason


def test_codes_of_the_driver_are_those_of_the_table() -> None:
    assert reason_of(asyncpg.TooManyConnectionsError("x")) == "full"
    assert reason_of(asyncpg.CannotConnectNowError("x")) == "stopped"
    assert reason_of(asyncpg.InvalidPasswordError("x")) == "login refused"
    assert reason_of(asyncpg.UniqueViolationError("x")) is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(), "unreachable"),
        (NoPrimary(), "read-only"),
        (TimeoutError(), "slow"),
        (PoolTimeout(), "slow"),
        (DBAPIError("SELECT", None, Exception(), connection_invalidated=True), "unreachable"),
        (DBAPIError("SELECT", None, Exception()), None),
        (ValueError(), None),
    ],
)
def test_other_errors(error: Exception, reason: str | None) -> None:
    assert reason_of(error) == reason


def test_state_of_the_database_is_a_503_without_its_text() -> None:
    with pytest.raises(StorageUnavailable) as raised, translated():
        raise of_sqlite(sqlite3.SQLITE_FULL)
    assert raised.value.reason == "full"
    assert raised.value.status == 503
    assert raised.value.headers() == {"Retry-After": "2"}
    assert "secret" not in raised.value.message


def test_bug_stays_what_it_is() -> None:
    error = of_sqlite(sqlite3.SQLITE_CONSTRAINT)
    with pytest.raises(DBAPIError) as raised, translated():
        raise error
    assert raised.value is error
