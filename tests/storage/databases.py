"""Databases for tests: each kind in turn, a new one for each test; PostgreSQL's server is started once."""

import asyncio
import contextlib
import functools
import itertools
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import pytest
from sqlalchemy import Connection

from gateway.storage import connections, database_file
from gateway.storage.address import Address, PostgresServer, SqliteFile
from gateway.storage.engine import Database, StorageLimits
from tests.live.postgres import Postgres, running_postgres
from tests.live.setup_v1 import missing, state_folder

T = TypeVar("T")

QUICK: Final = StorageLimits(step=0.5, queue=0.5, lock=0.2, connections=4)
"""Limits for tests that run into them."""

_SERVER: Final = pytest.StashKey[Postgres]()
_NUMBERS: Final = itertools.count(1)


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Postgres:
    """One server for the whole session, however many folders use this fixture."""
    if _SERVER not in pytestconfig.stash:
        stack = contextlib.ExitStack()
        pytestconfig.add_cleanup(stack.close)
        pytestconfig.stash[_SERVER] = stack.enter_context(_server())
    return pytestconfig.stash[_SERVER]


@contextlib.contextmanager
def _server() -> Iterator[Postgres]:
    if problem := missing():
        raise RuntimeError(problem)
    with state_folder() as state, running_postgres(state, None) as server:
        yield server


def new_database(server: Postgres, template: str = "template1") -> PostgresServer:
    """Make a database; it is empty unless there is another template."""
    name = f"gateway_{next(_NUMBERS)}"
    server.run(f"create database {name} template {template}")
    return PostgresServer(server_uri(server, name))


def server_uri(server: Postgres, name: str) -> str:
    return f"postgresql://postgres@127.0.0.1:{server.port}/{name}?sslmode=disable"


@pytest.fixture
def empty_file(tmp_path: Path) -> SqliteFile:
    return SqliteFile(tmp_path / "home" / "gateway.db")


@pytest.fixture
def empty_server(postgres: Postgres) -> PostgresServer:
    return new_database(postgres)


# With the schema: migrations take longer than most tests -------------------------------------------------------------


def _migrated(address: Address) -> None:
    """Make the schema, in a thread: the caller's has an event loop of its own."""

    async def migrate() -> None:
        async with opened(address):
            pass

    thread = threading.Thread(target=lambda: asyncio.run(migrate()))
    thread.start()
    thread.join()


@functools.cache
def _schema_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = SqliteFile(Path(folder) / "gateway.db")
        _migrated(file)
        return file.path.read_bytes()


@functools.cache
def _schema_database(server: Postgres) -> str:
    server.run("create database gateway_schema")
    _migrated(PostgresServer(server_uri(server, "gateway_schema")))
    return "gateway_schema"


@pytest.fixture
def sqlite_file(tmp_path: Path) -> SqliteFile:
    file = SqliteFile(tmp_path / "home" / "gateway.db")
    database_file.prepare(file.path)
    file.path.write_bytes(_schema_file())
    return file


@pytest.fixture
def postgres_address(postgres: Postgres) -> PostgresServer:
    return new_database(postgres, _schema_database(postgres))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.live)])
def address(request: pytest.FixtureRequest) -> Address:
    """A database of each kind, with the schema unless a folder's conftest has it empty."""
    found: Address = request.getfixturevalue("sqlite_file" if request.param == "sqlite" else "postgres_address")
    return found


@pytest.fixture
async def database(address: Address) -> AsyncIterator[Database]:
    """An open database of each kind."""
    async with opened(address) as found:
        yield found


async def run(address: Address, work: Callable[[Connection], T]) -> T:
    """Do something in a database of which nothing is expected, and commit it."""
    driver = connections.connect(address, connections=1, patience=1)
    transaction = driver.transaction(writes=True)
    try:
        return await transaction.run(work)
    finally:
        await transaction.end(is_spent=False)
        await driver.close()


@contextlib.asynccontextmanager
async def opened(address: Address, limits: StorageLimits | None = None) -> AsyncIterator[Database]:
    found = await Database.open(address, limits)
    try:
        yield found
    finally:
        await found.close()
