"""How a database is connected to, by its kind."""

from gateway.storage.address import Address, PostgresServer
from gateway.storage.sqlite_driver import SqliteDriver
from gateway.storage.transactions import Driver


def connect(address: Address, *, connections: int, patience: float) -> Driver:
    """Return a way to the database, which connects when it is first used.

    ``patience`` is how many seconds PostgreSQL may take to connect, and SQLite to wait for a lock.
    """
    if isinstance(address, PostgresServer):
        from gateway.storage.postgres_driver import PostgresDriver  # noqa: PLC0415 - not loaded where it is not used

        return PostgresDriver(address.url, connections, patience)
    return SqliteDriver(address.path, patience)
