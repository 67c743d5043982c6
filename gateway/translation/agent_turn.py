"""What is said to an agent in one turn, whatever API it came by."""

from typing import TypeAlias

import msgspec


class Text(msgspec.Struct, frozen=True):
    """A piece of the user's text."""

    text: str


class ImageData(msgspec.Struct, frozen=True):
    """An image sent inline: base64 data of the media type named."""

    media_type: str
    data: str


class ImageUrl(msgspec.Struct, frozen=True):
    """An image that Letta fetches: an https URL."""

    url: str


Part: TypeAlias = Text | ImageData | ImageUrl


class AgentTurn(msgspec.Struct, frozen=True):
    """One user message for one agent, on the agent's own thread."""

    agent_id: str
    content: tuple[Part, ...]

    @property
    def thread(self) -> str:
        """Name what takes one turn at a time."""
        return self.agent_id
