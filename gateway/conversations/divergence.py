"""What of a client's transcript a Letta conversation has not seen, or that the two have parted; pure.

A client sends its whole transcript each time. Where that begins with what the conversation holds, the rest is news.
Where it does not (a message edited, an answer asked for again, a chat that began elsewhere), the conversation holds a
branch that the client left.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

from gateway.translation.agent_turn import (
    AgentSaid,
    ImageData,
    ImageUrl,
    Instructed,
    Part,
    Said,
    Text,
    ToolResult,
    UserSaid,
)

DIGEST: Final = 16
"""Bytes of a message's digest."""
LEAST_OVERLAP: Final = 2
"""Messages by which a transcript that lost its beginning is recognised."""

_SHOWN: Final = (("<details", "</details>"), ("<think>", "</think>"))
"""What front ends put into an answer's text to show its reasoning and its tools."""


def spoken(transcript: Sequence[Said]) -> tuple[Said, ...]:
    """Return the transcript without instructions: those are compared as one text, and may change in mid-chat."""
    return tuple(said for said in transcript if not isinstance(said, Instructed))


def instructions(transcript: Sequence[Said]) -> str:
    """Return all instructions of a transcript as one text."""
    return "\n\n".join(said.text for said in transcript if isinstance(said, Instructed))


def digests(transcript: Sequence[Said]) -> tuple[bytes, ...]:
    """Return a digest of each message."""
    return tuple(digest(said) for said in transcript)


def digest(said: Said) -> bytes:
    """Return the digest of a message, the same for all that clients make of it.

    They trim and reflow an answer's text, write its calls' arguments anew and shorten old results.
    """
    made = hashlib.blake2b(digest_size=DIGEST)
    match said:
        case UserSaid(content=content):
            made.update(b"user")
            for part in content:
                made.update(_part(part))
        case AgentSaid(text=text, calls=calls):
            made.update(b"agent" + _encoded("".join(_unadorned(text).split())))
            for call in calls:
                made.update(_encoded(call.call_id))
        case ToolResult(call_id=call_id):
            made.update(b"result" + _encoded(call_id))
        case Instructed(text=text):
            made.update(b"instructed" + _encoded(text))
    return made.digest()


def unseen(seen: Sequence[bytes], transcript: Sequence[bytes]) -> int | None:
    """Return how many of a transcript's messages, from its beginning, a conversation holds; None where they parted."""
    if len(transcript) > len(seen) and tuple(transcript[: len(seen)]) == tuple(seen):
        return len(seen)
    # A client that is short of room drops what is oldest: then the transcript begins in the middle of what was said.
    if not seen or not transcript or transcript[0] == seen[0]:
        return None
    for overlap in range(min(len(seen), len(transcript) - 1), LEAST_OVERLAP - 1, -1):
        if tuple(transcript[:overlap]) == tuple(seen[-overlap:]):
            return overlap
    return None


def split(transcript: Sequence[Said]) -> int:
    """Return where the news begin: behind what the agent said last."""
    spoke = (index for index in reversed(range(len(transcript))) if isinstance(transcript[index], AgentSaid))
    return next(spoke, -1) + 1


def _unadorned(text: str) -> str:
    """Return an answer's text without what front ends put into it; a block that does not end is text."""
    for opening, closing in _SHOWN:
        kept, at = [], 0
        while (begin := text.find(opening, at)) >= 0 and (end := text.find(closing, begin)) >= 0:
            kept.append(text[at:begin])
            at = end + len(closing)
        text = "".join((*kept, text[at:]))
    return text


def _part(part: Part) -> bytes:
    match part:
        case Text(text=text):
            return b"text" + _encoded(text.strip())
        case ImageData(data=data):
            return b"data" + _encoded(data)
        case ImageUrl(url=url):
            return b"url" + _encoded(url)


def _encoded(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8) + data
