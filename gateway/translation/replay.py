"""A transcript -> what an agent that has not seen it is told: messages in their roles, or one text for all of them.

Letta takes calls and results only from its own runs, so those of a transcript become words.
"""

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from gateway.translation.agent_turn import (
    AgentSaid,
    Call,
    Instructed,
    Part,
    Said,
    Text,
    ToolResult,
    UserSaid,
)

Replayed: TypeAlias = UserSaid | AgentSaid | Instructed
"""A message without calls or results of its own."""

_SPEAKERS: Final[dict[type[Replayed], str]] = {UserSaid: "user", AgentSaid: "assistant", Instructed: "system"}


def as_messages(history: Sequence[Said]) -> tuple[Replayed, ...]:
    """Return the messages of a transcript, without empty ones: calls in the assistant's words, results in a user's."""
    names = {call.call_id: call.name for said in history if isinstance(said, AgentSaid) for call in said.calls}
    replayed = (_replayed(said, names) for said in history)
    return tuple(said for said in replayed if not _is_empty(said))


def as_text(history: Sequence[Said]) -> str:
    """Return a transcript as one text, each message between tags that name who said it; images are only mentioned."""
    return "\n".join(
        f"<{_SPEAKERS[type(said)]}>\n{_text(said)}\n</{_SPEAKERS[type(said)]}>" for said in as_messages(history)
    )


def result_in_words(result: ToolResult, name: str | None = None) -> str:
    """Return a tool's result as a sentence, for an agent that does not wait for it."""
    what = "Result" if result.succeeded else "Error"
    return f"{what} of the tool {name or f'call {result.call_id}'}: {result.text}"


def _replayed(said: Said, names: Mapping[str, str]) -> Replayed:
    match said:
        case AgentSaid(text=text, calls=calls):
            return AgentSaid("\n".join((*((text,) if text else ()), *(_call_in_words(call) for call in calls))))
        case ToolResult(call_id=call_id):
            return UserSaid((Text(result_in_words(said, names.get(call_id))),))
        case _:
            return said


def _call_in_words(call: Call) -> str:
    return f"(Called the tool {call.name} with {call.arguments})"


def _is_empty(said: Replayed) -> bool:
    return not (said.content if isinstance(said, UserSaid) else said.text)


def _text(said: Replayed) -> str:
    return "\n".join(_part_text(part) for part in said.content) if isinstance(said, UserSaid) else said.text


def _part_text(part: Part) -> str:
    return part.text if isinstance(part, Text) else "(an image)"
