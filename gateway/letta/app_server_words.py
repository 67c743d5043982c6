"""What goes into a user's message to the App Server, which hands nothing else on to the model.

What a client's system prompt or transcript says is put there as this server puts its own: between ``system-reminder``
tags (letta 0.34.12).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from gateway.letta.wire import ImageContent, TextContent, content_of_parts
from gateway.translation.agent_turn import AgentTurn, Instructed, Part, Text, ToolResult, UserSaid
from gateway.translation.replay import as_text, result_in_words

MOST_RESULT: Final = 31_000
"""Characters of a result; the server cuts one off after 32,000 UTF-16 units (letta 0.34.12)."""
GOES_ON: Final = "\n[The rest of this result is in the next message.]"


def said_to_agent(
    turn: AgentTurn,
    results: Sequence[ToolResult] = (),
    names: Mapping[str, str] | None = None,
    rests: Sequence[ToolResult] = (),
) -> str | list[TextContent | ImageContent]:
    """Return the content of a turn's message; empty where there is nothing to say.

    ``results`` are those that no call waits for, ``rests`` what did not fit into others, ``names`` the tools of their
    calls, as far as they are known.
    """
    return content_of_parts(tuple(_parts(turn, results, names or {}, rests)))


def cut(result: ToolResult) -> tuple[ToolResult, ToolResult | None]:
    """Return as much of a result as the server takes, and the rest of it."""
    text = result.text
    most = MOST_RESULT if text.isascii() else MOST_RESULT // 2  # a character may take two units
    if len(text) <= most:
        return result, None
    return (
        msgspec.structs.replace(result, text=text[:most] + GOES_ON),
        msgspec.structs.replace(result, text=text[most:]),
    )


def _parts(
    turn: AgentTurn, results: Sequence[ToolResult], names: Mapping[str, str], rests: Sequence[ToolResult]
) -> Iterator[Part]:
    if turn.history:
        yield _reminder(f"The conversation so far:\n{as_text(turn.history)}")
    for result in results:
        yield Text(result_in_words(result, names.get(result.call_id)))
    for rest in rests:
        name = names.get(rest.call_id)
        yield Text(f"The rest of the result of the tool {name or f'call {rest.call_id}'}:\n{rest.text}")
    for said in turn.news:
        match said:
            case UserSaid(content=parts):
                yield from parts
            case Instructed(text=text):
                yield _reminder(text)


def _reminder(text: str) -> Text:
    return Text(f"<system-reminder>\n{text}\n</system-reminder>")
