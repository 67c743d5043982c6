"""What the gateway asks of a Letta server, whichever kind it is."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

import msgspec

from gateway.errors import GatewayError
from gateway.translation.agent_events import Batch
from gateway.translation.agent_turn import AgentTurn

Take: TypeAlias = Callable[[Batch], bool]
"""Takes one batch; False when it is not ready for the next one. What it raises ends the delivery."""
Ready: TypeAlias = Callable[[], Awaitable[None]]
"""Waits until the taker is ready again."""


class Agent(msgspec.Struct, frozen=True):
    """An agent, as far as the gateway cares; ``created`` is in seconds since the epoch."""

    id: str
    name: str
    created: int


class RunningTurn(Protocol):
    """A turn: open it, have its batches of events delivered (one batch per network read), settle it, close it.

    Leaving it before its end is two decisions of the caller's: ``cancel`` stops the run on Letta, ``drain`` lets it
    go on. ``close`` only frees what this process holds.
    """

    @property
    def ended(self) -> bool:
        """Tell whether Letta is done with the turn, or never had it: nothing is left to cancel."""
        ...

    async def open(self) -> None:
        """Send the turn; raises where Letta refuses it or does not answer in time."""
        ...

    async def deliver(self, take: Take, ready: Ready) -> None:
        """Hand every batch to ``take``, from where the stream stands to its end; wait for ``ready`` where it says so.

        Raises what ``take`` raises, and the error of a stream that broke; a failure that Letta tells of arrives as an
        event.
        """
        ...

    def abort(self, error: GatewayError) -> None:
        """End ``open`` or ``deliver`` with this error as soon as possible."""
        ...

    async def cancel(self) -> None:
        """Stop the run on Letta, and see it stopped, within some seconds."""
        ...

    async def drain(self) -> None:
        """Let the run go on to its end, unheard."""
        ...

    def close(self) -> None:
        """Free the connection."""
        ...


class AgentBackend(Protocol):
    """A Letta server. Every method raises only the tree of ``gateway/errors.py``."""

    async def agents(self) -> list[Agent]:
        """Return every agent."""
        ...

    async def find_agents(self, name_or_id: str) -> list[Agent]:
        """Return the agents of exactly this name, and the one of this id."""
        ...

    def turn(self, turn: AgentTurn) -> RunningTurn:
        """Return a turn that is yet to be opened."""
        ...

    async def ping(self) -> None:
        """Ask whether the server answers; raises within some seconds where it does not."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


async def always_ready() -> None:
    """Be ready: for takers that are never full."""
