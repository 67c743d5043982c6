"""What is said to an agent in one turn, whatever API it came by."""

from typing import TypeAlias

import msgspec


class Text(msgspec.Struct, frozen=True, tag=True):
    """A piece of the user's text."""

    text: str


class ImageData(msgspec.Struct, frozen=True, tag=True):
    """An image sent inline: base64 data of the media type named."""

    media_type: str
    data: str


class ImageUrl(msgspec.Struct, frozen=True, tag=True):
    """An image that Letta fetches: an https URL."""

    url: str


Part: TypeAlias = Text | ImageData | ImageUrl


class UserSaid(msgspec.Struct, frozen=True, tag=True):
    """A message of the user's."""

    content: tuple[Part, ...]


class Call(msgspec.Struct, frozen=True):
    """A call of a client's tool that the agent made; ``arguments`` are the JSON text that it wrote."""

    call_id: str
    name: str
    arguments: str


class AgentSaid(msgspec.Struct, frozen=True, tag=True):
    """A message of the agent's: its text, and the calls that it made with it."""

    text: str
    calls: tuple[Call, ...] = ()


class ToolResult(msgspec.Struct, frozen=True, tag=True):
    """What the client's tool gave back for a call."""

    call_id: str
    text: str
    succeeded: bool = True


class Instructed(msgspec.Struct, frozen=True, tag=True):
    """A message of the client's developer or operator: a system message."""

    text: str


Said: TypeAlias = UserSaid | AgentSaid | ToolResult | Instructed
"""One message of a transcript."""


class ClientTool(msgspec.Struct, frozen=True):
    """A tool that the client executes; ``parameters`` is its JSON Schema, an object, as JSON."""

    name: str
    description: str
    parameters: msgspec.Raw


class AgentTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one agent.

    ``returns`` answer calls that wait in the conversation; calls that wait there and are not among them are answered
    as superseded. ``history`` is what the agent is to take as said before, in a conversation that has not seen it;
    ``news`` is what it answers: at least one message, unless there are returns. ``overlay`` are instructions that hold
    for this turn alone and stay nowhere; only on the agent's own thread, of a server that takes them.
    """

    agent_id: str
    conversation_id: str | None = None
    """None for the agent's own thread."""
    mark: str | None = None
    """A name by which Letta may be asked for this turn later; unique."""
    history: tuple[Said, ...] = ()
    news: tuple[UserSaid | Instructed, ...] = ()
    returns: tuple[ToolResult, ...] = ()
    tools: tuple[ClientTool, ...] = ()
    overlay: str = ""

    @property
    def thread(self) -> str:
        """Name what takes one turn at a time."""
        return self.conversation_id or self.agent_id
