"""The platform API's chat on the wire: what a user sends, what is told while their agent answers, what is kept."""

from typing import Final, Literal, TypeAlias

from msgspec import Struct

from gateway.translation.openai_types import UserPart

Role: TypeAlias = Literal["user", "assistant"]
MessageStatus: TypeAlias = Literal["running", "complete", "interrupted", "failed"]
"""How a message stands: ``interrupted`` where the client or the gateway went away before it was whole."""
ToolStatus: TypeAlias = Literal["running", "done", "failed"]

MICROS: Final = 1_000_000
"""Millionths of a US dollar in one."""


class ChatRequest(Struct):
    """The body of ``POST /api/v1/chat/message``; ``metadata`` is the client's own, and not kept."""

    message: str | list[UserPart]
    stream: bool | None = None
    metadata: dict[str, str] | None = None


class ToolActivity(Struct, frozen=True):
    """What became of one call of the agent's own tools; the data of ``event: tool``."""

    id: str
    name: str
    status: ToolStatus


class MessageUsage(Struct, frozen=True):
    """What an answer took, by the ledger; ``cost`` is in US dollars, as a decimal."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost: str
    model: str


class Message(Struct, frozen=True, kw_only=True):
    """One message of the history; times are UTC seconds, ``usage`` is there once the ledger has it."""

    id: str
    role: Role
    status: MessageStatus
    text: str
    reasoning: str = ""
    activity: tuple[ToolActivity, ...] = ()
    error_code: str | None = None
    created_at: float
    ended_at: float | None = None
    usage: MessageUsage | None = None


class ChatAnswer(Struct, frozen=True):
    """The answer to a message that is not streamed."""

    message: Message
    user_message: Message
    usage: MessageUsage | None


class HistoryPage(Struct, frozen=True):
    """Some messages, newest first; ``next_cursor`` is None on the last page."""

    data: list[Message]
    next_cursor: str | None


class Started(Struct, frozen=True):
    """The data of ``event: start``: under which names both messages are kept."""

    message_id: str
    user_message_id: str


class Piece(Struct, frozen=True):
    """The data of ``event: text`` and ``event: reasoning``."""

    delta: str


class TokenCounts(Struct, frozen=True):
    """The data of ``event: usage``; zeros where Letta reported nothing."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    reasoning_tokens: int


class Done(Struct, frozen=True):
    """The data of ``event: done``: the answer as it is kept."""

    message: Message


def dollars(micros: int) -> str:
    """Return millionths of a US dollar as a decimal number of dollars."""
    return f"{micros // MICROS}.{micros % MICROS:06d}"
