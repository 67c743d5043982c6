"""Whose turn it is on each thread: what the registry asks of whoever keeps that."""

from typing import Protocol

from gateway.errors import GatewayError


class ThreadLocks(Protocol):
    """Gives each thread to one turn at a time, first come, first served."""

    async def acquire(self, thread: str) -> None:
        """Wait for a thread; raises ``ConversationBusy`` where too many wait or the wait is too long."""
        ...

    def release(self, thread: str) -> None:
        """Give a thread to whoever waits first."""
        ...

    def is_taken(self, thread: str) -> bool:
        """Tell whether a turn has a thread."""
        ...

    def refuse_waiting(self, error: GatewayError) -> None:
        """End every wait with this error."""
        ...
