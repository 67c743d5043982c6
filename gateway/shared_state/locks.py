"""Whose turn it is on each thread: what the registry asks of whoever keeps that."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from gateway.errors import GatewayError


class Lease(msgspec.Struct, eq=False):
    """A thread that is a turn's own.

    ``fence`` grows from one lease of the thread to the next, whichever gateway has it: what a later one wrote, an
    earlier one must not replace; None where no other gateway writes. ``is_news`` tells that another gateway may have
    had the thread since this one did. ``on_lost`` is called where the thread is another gateway's all of a sudden, or
    may be: it ``is_lost`` from then on.
    """

    thread: str
    fence: int | None = None
    is_news: bool = False
    is_lost: bool = False
    on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        """Note that the thread is, or may be, another gateway's; tell once."""
        if not self.is_lost:
            self.is_lost = True
            if self.on_lost is not None:
                self.on_lost()


class ThreadLocks(Protocol):
    """Gives each thread to one turn at a time, first come, first served."""

    async def acquire(self, thread: str) -> Lease:
        """Wait for a thread; raises ``ConversationBusy`` where too many wait or the wait is too long.

        Where replicas share threads, also ``SharedStateUnavailable``, and ``HeldElsewhere`` for a thread on which a
        turn waits in another gateway.
        """
        ...

    async def check(self, lease: Lease) -> None:
        """See that a thread is still the lease's, before something is said on it.

        Raises ``ThreadLost`` where it is not, and ``SharedStateUnavailable`` where that cannot be seen.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Give a thread to whoever waits first."""
        ...

    async def is_taken(self, thread: str) -> bool:
        """Tell whether a turn has a thread; raises ``SharedStateUnavailable``."""
        ...

    def refuse_waiting(self, error: GatewayError) -> None:
        """End every wait with this error."""
        ...
