"""PostgreSQL's connections, by asyncpg."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, CursorResult, Dialect, Executable
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from gateway.storage.failures import NoPrimary
from gateway.storage.transactions import Rows

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")


class PostgresDriver:
    """Some connections, kept; ``patience`` is how many seconds one may take to be made."""

    def __init__(self, url: str, connections: int, patience: float) -> None:
        import asyncpg  # noqa: PLC0415 - 3 MiB that a gateway with a file of its own does without

        async def connected() -> "asyncpg.Connection[Any]":
            try:
                return await asyncpg.connect(url, timeout=patience)  # it knows every part of such a URL
            except asyncpg.TargetServerAttributeNotMatched as error:
                raise NoPrimary from error

        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connected,
            pool_size=connections,
            max_overflow=0,
            pool_pre_ping=True,  # a server that was restarted is not the next request's failure
            hide_parameters=True,
        )

    @property
    def dialect(self) -> Dialect:
        """Which SQL is spoken."""
        return self.engine.dialect

    def transaction(self, *, writes: bool) -> "PostgresTransaction":  # noqa: ARG002 - they are alike here
        """Return a new transaction, on a connection of its own."""
        return PostgresTransaction(self.engine)

    async def close(self) -> None:
        """Close the connections that nobody uses."""
        await self.engine.dispose()


class PostgresTransaction:
    """A transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._raw = engine.connect()
        self.is_open = False

    async def execute(self, statement: Executable, rows: Rows) -> CursorResult[Any]:
        """Run a statement."""
        await self._begin()
        return await self._raw.execute(statement, rows)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do all that is to be done in it, and commit."""
        await self._begin()
        found = await self._raw.run_sync(work)
        await self._raw.commit()
        return found

    async def commit(self) -> None:
        """Commit what was done."""
        if self.is_open:
            await self._raw.commit()

    async def end(self, *, is_spent: bool) -> None:
        """Roll back what is not committed, and give the connection back; one that is spent is closed."""
        if self.is_open:
            self.is_open = False
            if self._raw.sync_connection is None:
                return  # it never came to a connection
            if is_spent:
                await self._raw.invalidate()
            await self._raw.close()

    async def _begin(self) -> None:
        self.is_open = True  # before it is: a start that hangs may still come to a connection, to be given back
        if self._raw.sync_connection is None:
            await self._raw.start()
            await self._raw.begin()
