"""What the gateway asks of a Letta server, whichever kind it is."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

import msgspec

from gateway.errors import GatewayError
from gateway.translation.agent_events import Batch
from gateway.translation.agent_turn import AgentTurn, Overlay

Take: TypeAlias = Callable[[Batch], bool]
"""Takes one batch; False when it is not ready for the next one. What it raises ends the delivery."""
Ready: TypeAlias = Callable[[], Awaitable[None]]
"""Waits until the taker is ready again."""


class Agent(msgspec.Struct, frozen=True):
    """An agent, as far as the gateway cares; ``created`` is in seconds since the epoch."""

    id: str
    name: str
    created: int


class AgentDetails(msgspec.Struct, frozen=True):
    """What an agent is, for people who choose one; ``tools`` are the names of its own."""

    description: str | None
    model: str | None
    tools: tuple[str, ...]


class Capabilities(msgspec.Struct, frozen=True):
    """What a kind of Letta server can do beyond the rest."""

    overlays: bool
    """Whether an agent can be shown instructions for a turn that do not stay in its thread: ``put_on``."""


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
        """Send the turn; raises where Letta refuses it or does not answer in time.

        Calls that wait in the conversation and are not answered by the turn's returns are answered as superseded, and
        returns whose calls do not wait (any more) reach the agent in words: neither is an error.
        """
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

    @property
    def capabilities(self) -> Capabilities:
        """Tell what this kind of server can do."""
        ...

    async def agents(self) -> list[Agent]:
        """Return every agent."""
        ...

    async def find_agents(self, name_or_id: str) -> list[Agent]:
        """Return the agents of exactly this name, and the one of this id."""
        ...

    def turn(self, turn: AgentTurn) -> RunningTurn:
        """Return a turn that is yet to be opened.

        It ends with ``Stop("requires_approval")`` where the agent called tools of the client's; a later turn of the
        same conversation with their returns goes on from there.
        """
        ...

    async def new_conversation(self, agent_id: str) -> str:
        """Make a conversation of an agent's, apart from its own thread, and return its id."""
        ...

    async def delete_conversation(self, conversation_id: str) -> None:
        """Delete a conversation, whatever waits in it; one that is not there is no error."""
        ...

    async def details(self, agent_id: str) -> AgentDetails:
        """Return what an agent is; raises ``AgentGone``."""
        ...

    async def put_on(self, agent_id: str, overlay: Overlay) -> None:
        """Show an agent instructions in every turn until ``take_off``; only where ``capabilities`` say so."""
        ...

    async def take_off(self, agent_id: str) -> None:
        """Show an agent no overlay (any more)."""
        ...

    async def clean_up(self) -> None:
        """Remove what a gateway that was killed left on the server."""
        ...

    async def ping(self) -> None:
        """Ask whether the server answers; raises within some seconds where it does not."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


async def always_ready() -> None:
    """Be ready: for takers that are never full."""
