"""What a kind of database does for the gateway: transactions, statement by statement or in one go."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from sqlalchemy import Connection, CursorResult, Dialect, Executable

T = TypeVar("T")
Rows: TypeAlias = Sequence[Mapping[str, Any]] | Mapping[str, Any] | None


class Transaction(Protocol):
    """One transaction, which begins with what is first done in it."""

    @property
    def is_open(self) -> bool:
        """Tell whether it has begun and not ended."""
        ...

    async def execute(self, statement: Executable, rows: Rows) -> CursorResult[Any]:
        """Run a statement."""
        ...

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do all that is to be done in it, and commit."""
        ...

    async def commit(self) -> None:
        """Commit what was done."""
        ...

    async def end(self, *, is_spent: bool) -> None:
        """Roll back what is not committed, and give the connection back; one that is spent is closed."""
        ...


class Driver(Protocol):
    """A way to the database, which connects when it is first used."""

    @property
    def dialect(self) -> Dialect:
        """Which SQL is spoken."""
        ...

    def transaction(self, *, writes: bool) -> Transaction:
        """Return a new transaction."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...
