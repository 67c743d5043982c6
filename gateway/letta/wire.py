"""What goes out to Letta's REST API, and the rows of its listing that are read."""

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from gateway.letta.backend import Agent, AgentDetails
from gateway.letta.rest_bridge import TAG, ToolRow
from gateway.letta.rest_returns import NOTHING, Settled
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    ClientTool,
    ImageData,
    ImageUrl,
    Instructed,
    Part,
    Text,
    UserSaid,
)
from gateway.translation.replay import as_messages, as_text, result_in_words

OWN_THREAD: Final = "default"
"""What Letta calls an agent's own thread among its conversations."""

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
    """A message: a string, or parts; ``otid`` is a name that its sender gives it."""

    role: Literal["user", "assistant", "system"]
    content: str | list[TextContent | ImageContent]
    otid: str | UnsetType = UNSET


class Return(msgspec.Struct, tag_field="type", tag="tool"):
    """A result for a call that waits."""

    tool_call_id: str
    tool_return: str
    status: Literal["success", "error"]


class Refusal(msgspec.Struct, tag_field="type", tag="approval"):
    """A call that waits, refused."""

    tool_call_id: str
    reason: str
    approve: bool = False


class OutgoingReturns(msgspec.Struct, tag_field="type", tag="approval"):
    """What becomes of the calls that wait: Letta takes all of them, in the first message, or none.

    It has a message ``tool_return`` too, which is turned into this one, and older servers lack (letta 0.16.4, 0.16.8).
    """

    approvals: list[Return | Refusal]
    approve: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


Outgoing: TypeAlias = OutgoingMessage | OutgoingReturns


class OfferedTool(msgspec.Struct):
    """A tool that the client executes."""

    name: str
    description: str
    parameters: msgspec.Raw


class TurnBody(msgspec.Struct):
    """The body of a turn; ``streaming`` is asked for on a conversation only.

    ``override_system`` stands in the place of the agent's prompt, for this request alone.
    """

    messages: list[Outgoing]
    stream_tokens: bool = True
    include_pings: bool = True
    streaming: bool | UnsetType = UNSET
    client_tools: list[OfferedTool] | UnsetType = UNSET
    override_system: str | UnsetType = UNSET


def otid_of(mark: str, attempt: int | str = "") -> str:
    """Return what names the message of a turn, each time that it is sent; of no attempt, what they begin with.

    An App Server drops a message whose name it has seen within the hour, and V1 with Redis may do so too.
    """
    return f"{mark}.{attempt}"


def turn_body(
    turn: AgentTurn,
    settled: Settled = NOTHING,
    tools: Sequence[ClientTool] = (),
    *,
    is_legacy: bool = False,
    otid: str | None = None,
    prompt: str | None = None,
) -> bytes:
    """Return the JSON body of a turn that settles calls so, offers these tools, and names its last message.

    ``prompt`` is what the agent's own is replaced by.
    """
    said = list(_messages(turn, settled))
    if otid is not None and said:
        said[-1].otid = otid
    messages: list[Outgoing] = [*_returns(settled), *said]
    return _encode(
        TurnBody(
            [_refusal(turn, settled)] if is_legacy and settled.answers else messages,
            streaming=UNSET if turn.conversation_id is None else True,
            client_tools=[OfferedTool(tool.name, tool.description, tool.parameters) for tool in tools] or UNSET,
            override_system=UNSET if prompt is None else prompt,
        )
    )


def _returns(settled: Settled) -> Iterator[OutgoingReturns]:
    if settled.answers:
        yield OutgoingReturns(
            [Return(said.call_id, said.text, "success" if said.succeeded else "error") for said in settled.answers]
        )


def _messages(turn: AgentTurn, settled: Settled) -> Iterator[OutgoingMessage]:
    for said in (*as_messages(turn.history), *as_messages(settled.stale), *turn.news):
        match said:
            case UserSaid(content=parts):
                yield OutgoingMessage("user", content_of_parts(parts))
            case AgentSaid(text=text):
                yield OutgoingMessage("assistant", text)
            case Instructed(text=text):
                yield OutgoingMessage("system", text)


def _refusal(turn: AgentTurn, settled: Settled) -> OutgoingReturns:
    """Return all that is said as the reason of a refusal: legacy agents take no result, and no message beside it.

    They make one call at a time (letta 0.16.8, ``letta_agent_v2``).
    """
    answer, *others = settled.answers
    reason = "\n".join(
        (
            f"It was not denied: the client ran it. {result_in_words(answer)}",
            as_text((*turn.history, *others, *settled.stale, *turn.news)),
        )
    ).strip()
    return OutgoingReturns([Refusal(answer.call_id, reason)], approve=False, reason=reason)


def content_of(turn: AgentTurn) -> str | list[TextContent | ImageContent]:
    """Return what the user says, all of it in one message."""
    return content_of_parts(tuple(part for said in turn.news if isinstance(said, UserSaid) for part in said.content))


def content_of_parts(parts: Sequence[Part]) -> str | list[TextContent | ImageContent]:
    """Return content as both servers take it: a single text plain, as Letta's own clients send it."""
    match parts:
        case (Text(text=text),):
            return text
        case _:
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
    tags: list[str] | None = None
    model: str | None = None

    def agent(self) -> Agent:
        """Return the agent; 0 stands for a time that Letta does not tell."""
        created = int(self.created_at.timestamp()) if self.created_at else 0
        return Agent(self.id, self.name, created, tuple(self.tags or ()))


PRESENT_TYPES: Final = frozenset({"letta_v1_agent", "sleeptime_agent"})
"""Types whose turns ``LettaAgentV3`` runs (letta 0.16.8, ``agent_loop``)."""


class AgentProfile(msgspec.Struct):
    """What an agent is, with its tools."""

    agent_type: str | None = None
    description: str | None = None
    model: str | None = None
    tools: list[ToolRow] | None = None

    @property
    def own_tools(self) -> tuple[str, ...]:
        """Return the names of its tools, without those that stand for a client's."""
        return tuple(tool.name for tool in self.tools or () if TAG not in (tool.tags or ()))

    @property
    def is_legacy(self) -> bool:
        """Tell whether it is of a type from before client tools, parallel calls and conversations."""
        return self.agent_type is not None and self.agent_type not in PRESENT_TYPES

    def details(self) -> AgentDetails:
        """Return what the gateway tells of it."""
        return AgentDetails(self.description, self.model, self.own_tools)


class ConversationRow(msgspec.Struct):
    """A conversation."""

    id: str


class Health(msgspec.Struct):
    """The answer of ``/v1/health/``."""

    version: str
    status: str


decode_agents: Final = msgspec.json.Decoder(list[AgentRow]).decode
decode_agent: Final = msgspec.json.Decoder(AgentRow).decode
decode_profile: Final = msgspec.json.Decoder(AgentProfile).decode
decode_conversation: Final = msgspec.json.Decoder(ConversationRow).decode
decode_health: Final = msgspec.json.Decoder(Health).decode
