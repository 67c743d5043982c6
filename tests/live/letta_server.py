"""What the live tests ask of a real Letta server, whichever kind it is: one code path tries the gateway on both."""

import contextlib
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

Kind: TypeAlias = Literal["v1", "app_server"]


class Agent(msgspec.Struct, frozen=True):
    """An agent as the server knows it."""

    id: str
    name: str


class LettaServer(Protocol):
    """A server that can be stopped and started again on the same port and state."""

    @property
    def kind(self) -> Kind:
        """Which of the two it is, for what they truly do differently."""
        ...

    @property
    def base_url(self) -> str:
        """What LETTA_BASE_URL is set to."""
        ...

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        ...

    def kill(self) -> None:
        """Kill the server as `kill -9` does; `start` brings it back."""
        ...

    def freeze(self) -> None:
        """Stop the server without ending it: connections stay open, nothing is answered."""
        ...

    def thaw(self) -> None:
        """Let a frozen server go on."""
        ...

    def create_agent(self, name: str | None = None) -> Agent:
        """Create an agent on the demo model."""
        ...

    def crowd(self, names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """Have many more agents, which are listed, and need not be able to answer."""
        ...

    def counted(self, agent_id: str) -> tuple[int, int]:
        """Return the prompt and completion tokens of all steps that an agent has taken, as the server keeps them."""
        ...

    def delete_agent(self, agent_id: str) -> None:
        """Delete an agent, if it is there."""
        ...
