"""What goes out to Letta's REST API, and the rows of its listing that are read."""

import datetime as dt
from typing import Final

import msgspec

from gateway.letta.backend import Agent
from gateway.translation.agent_turn import AgentTurn, ImageData, ImageUrl, Part, Text

_encode: Final = msgspec.json.Encoder().encode


class TextContent(msgspec.Struct, tag_field="type", tag="text"):
    """Letta's text part."""

    text: str


class Base64Source(msgspec.Struct, tag_field="type", tag="base64"):
    """Inline image data."""

    media_type: str
    data: str


class UrlSource(msgspec.Struct, tag_field="type", tag="url"):
    """An image that Letta fetches."""

    url: str


class ImageContent(msgspec.Struct, tag_field="type", tag="image"):
    """Letta's image part."""

    source: Base64Source | UrlSource


class OutgoingMessage(msgspec.Struct):
    """A user message: a string, or parts."""

    role: str
    content: str | list[TextContent | ImageContent]


class TurnBody(msgspec.Struct):
    """The body of a turn."""

    messages: list[OutgoingMessage]
    stream_tokens: bool = True
    include_pings: bool = True


def turn_body(turn: AgentTurn) -> bytes:
    """Return the JSON body of a turn."""
    return _encode(TurnBody([OutgoingMessage("user", content_of(turn))]))


def content_of(turn: AgentTurn) -> str | list[TextContent | ImageContent]:
    """Return what the user says, as both servers take it: a single text plain, as Letta's own clients send it."""
    match turn.content:
        case (Text(text=text),):
            return text
        case parts:
            return [_content(part) for part in parts]


def _content(part: Part) -> TextContent | ImageContent:
    match part:
        case Text(text=text):
            return TextContent(text)
        case ImageData(media_type=media_type, data=data):
            return ImageContent(Base64Source(media_type, data))
        case ImageUrl(url=url):
            return ImageContent(UrlSource(url))


class AgentRow(msgspec.Struct):
    """An agent as Letta lists it: of some fifty fields, those that are used."""

    id: str
    name: str
    created_at: dt.datetime | None = None

    def agent(self) -> Agent:
        """Return the agent; 0 stands for a time that Letta does not tell."""
        return Agent(self.id, self.name, int(self.created_at.timestamp()) if self.created_at else 0)


class Health(msgspec.Struct):
    """The answer of ``/v1/health/``."""

    version: str
    status: str


decode_agents: Final = msgspec.json.Decoder(list[AgentRow]).decode
decode_agent: Final = msgspec.json.Decoder(AgentRow).decode
decode_health: Final = msgspec.json.Decoder(Health).decode
