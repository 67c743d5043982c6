"""What the gateway asks of a Letta server, whichever kind it is."""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

import msgspec

from gateway.errors import GatewayError
from gateway.translation.agent_events import Batch, Usage
from gateway.translation.agent_turn import AgentTurn

Take: TypeAlias = Callable[[Batch], bool]
"""Takes one batch; False when it is not ready for the next one. What it raises ends the delivery."""
Ready: TypeAlias = Callable[[], Awaitable[None]]
"""Waits until the taker is ready again."""

PERSONAL_TAG: Final = "letta-gateway:user"
"""What marks an agent that belongs to one user of the gateway: nobody finds it by its name or id."""


class Agent(msgspec.Struct, frozen=True):
    """An agent, as far as the gateway cares; ``created`` is in seconds since the epoch."""

    id: str
    name: str
    created: int
    tags: tuple[str, ...] = ()


class MemoryBlock(msgspec.Struct, frozen=True):
    """A piece of an agent's memory that is always before it; ``limit`` is in characters.

    ``is_read_only`` binds the agent, not who calls ``write_memory``.
    """

    label: str
    value: str
    description: str | None = None
    limit: int | None = None
    is_read_only: bool = False


class ModelProvider(msgspec.Struct, frozen=True):
    """An OpenAI-compatible server that answers for one agent, with a key of its own; ``base_url`` ends in ``/v1``."""

    name: str
    base_url: str
    api_key: str

    def __repr__(self) -> str:
        """Show no key."""
        return f"ModelProvider(name={self.name!r}, base_url={self.base_url!r}, api_key='***')"


class AgentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An agent that is to be made; None is what the server has as its default.

    ``tools`` are names of tools on the server: those it does not have are left out (an App Server's tools belong to
    its machine and not to agents: all are). ``tags`` find it again. With a ``provider``, ``model`` is a name there.
    """

    name: str
    model: str | None = None
    embedding: str | None = None
    tools: tuple[str, ...] = ()
    blocks: tuple[MemoryBlock, ...] = ()
    tags: tuple[str, ...] = ()
    provider: ModelProvider | None = None


class AgentDetails(msgspec.Struct, frozen=True):
    """What an agent is, for people who choose one; ``tools`` are the names of its own."""

    description: str | None
    model: str | None
    tools: tuple[str, ...]


class Capabilities(msgspec.Struct, frozen=True):
    """What a kind of Letta server can do beyond the rest."""

    providers: bool
    """Whether an agent can have a model provider of its own."""
    parks: bool = False
    """Whether a turn that waits for the client's tools waits in this process: no other gateway can go on with it."""


class SentTurn(msgspec.Struct, frozen=True):
    """A turn that was perhaps sent; ``mark`` is what ``AgentTurn.mark`` said.

    ``sent_at`` is in UTC seconds, of any moment from shortly before it was opened to then.
    """

    mark: str
    agent_id: str
    conversation_id: str | None
    sent_at: float


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

    async def usage(self) -> Usage | None:
        """Return what the turn took in all, as Letta counts it, once it has ended; None where Letta keeps no count.

        What its events said where those were whole; else Letta is asked. A step that did not come to its end counts
        for nothing: Letta keeps no count of it (letta 0.16.8, 0.34.12). Raises where Letta cannot say now: then
        ``spent`` is to be asked later.
        """
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

    @property
    def parked(self) -> int:
        """Return how many turns wait in this process for results of the client's tools: they end with it."""
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

    async def model(self, agent_id: str) -> str | None:
        """Return the handle of the model that an agent answers with, as it was lately; raises ``AgentGone``."""
        ...

    async def find_tagged(self, tag: str) -> list[Agent]:
        """Return the agents that have this tag."""
        ...

    async def create_agent(self, spec: AgentSpec) -> Agent:
        """Make an agent; raises ``UpstreamRejected`` where the server has no such model, or none at all.

        Raises ``UpstreamInvalid`` where the server would have somebody else's provider answer for it.
        """
        ...

    async def set_provider(self, agent_id: str, spec: AgentSpec) -> None:
        """Have an agent that is there be answered for as this one would be: by its provider, or by the server's own.

        One that is already is left as it is. Raises as ``create_agent`` does, and ``AgentGone``.
        """
        ...

    async def delete_agent(self, agent_id: str) -> None:
        """Delete an agent with its memory and conversations; one that is not there is no error.

        An App Server keeps on its disk (letta 0.34.12) the files of the memory, which are emptied, with their git
        history, a transcript and the conversations: no command deletes them.
        """
        ...

    async def delete_provider(self, name: str) -> None:
        """Have the server forget a model provider's key; one that is not there is no error.

        Agents that still have it are not answered for any more.
        """
        ...

    async def memory(self, agent_id: str) -> tuple[MemoryBlock, ...]:
        """Return an agent's memory, in the order of labels; raises ``AgentGone``.

        An App Server's memory is a tree of files: the blocks are those at its root, without the index, and have no
        limit; what is read-only there, the server does not tell.
        """
        ...

    async def write_memory(self, agent_id: str, label: str, value: str) -> MemoryBlock:
        """Replace the text of a memory block, for the agent to see in its next turn wherever that is.

        Raises ``AgentGone``, ``MemoryNotFound``, ``InvalidRequest`` where the text is longer than the block's limit,
        and ``UpstreamRejected``.
        """
        ...

    async def spent(self, turn: SentTurn) -> Usage | None:
        """Stop a turn that another process began, and return what it took as the server counts it.

        None where the server knows nothing of it (any more): it never got the turn, or keeps no count. Raises where
        the server cannot say now.
        """
        ...

    async def takes_overlays(self) -> bool:
        """Tell whether turns may have an ``AgentTurn.overlay``; raises where the server cannot be asked which it is."""
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
