"""Which chat a request belongs to, as far as it says so; pure.

A chat's identity pins a Letta conversation. Front ends also ask on the side, for titles, tags and the like: those
requests carry the chat's identity too, and must not reach its conversation.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from gateway.translation.agent_turn import AgentSaid, Instructed, Text, UserSaid
from gateway.translation.ask import Ask

CHAT_HEADERS: Final = ("X-Letta-Chat-Key", "X-OpenWebUI-Chat-Id")
"""What names a chat, the first one that is there: Letta's own header, and Open WebUI's (among the headers of its
connection as ``{{CHAT_ID}}``, or with ``ENABLE_FORWARD_USER_INFO_HEADERS``)."""
TASK_HEADER: Final = "X-OpenWebUI-Task"
"""What Open WebUI asks for itself, where the headers of its connection have it as ``{{TASK}}``; empty otherwise."""
LONGEST_CHAT: Final = 256
"""Bytes of a chat's identity that is kept as it is; a longer one goes by its digest."""

_TASK_PROMPT: Final = re.compile(
    r"\s*(?:### Task:\s*(?:Generate a concise\b[^\n]{0,40}\btitle|Generate 1-3 broad tags|"
    r"Generate a detailed prompt for am? image|Suggest 3-5 relevant follow-up|Predict 3-5 useful messages|"
    r"Analyze the chat history to determine the necessity of generating search|You are an autocompletion system|"
    r"Summarize the conversation history that will be compacted)|"
    r"Your task is to reflect the speaker's likely facial expression|"
    r"You have been provided with a set of responses from various models to the latest user query|"
    r"Review the completed conversation turn and decide whether long-term memory should change)"
)
"""How Open WebUI begins the one message by which it asks for itself, up to 0.12.4: for titles, tags, pictures' prompts,
follow-ups (two wordings), searches, completions, summaries, emoji, one answer out of several, memories. What it puts
before a question with documents begins alike. Its templates can be changed and translated: the header is sure."""
_PICKS_TOOLS: Final = "Your task is to choose and return the correct tool(s) from the list of available tools"
"""What it instructs a model that is to name tools in text; the message beside it is a part of the chat's own."""


def chat_of(headers: Mapping[str, str], ask: Ask) -> str | None:
    """Return the identity of the chat, where a header or the body names one."""
    named = (headers.get(header, "").strip() for header in CHAT_HEADERS)
    chat = next(filter(None, named), "") or (ask.chat or "").strip()
    return _storable(chat) if chat else None


def _storable(chat: str) -> str:
    """Return an identity that databases take: what is long or odd in a header is some program's own affair."""
    data = chat.encode("utf-8", "surrogatepass")
    if len(data) <= LONGEST_CHAT and chat.isprintable():
        return chat
    return f"blake2b:{hashlib.blake2b(data, digest_size=32).hexdigest()}"


def is_background(headers: Mapping[str, str], ask: Ask) -> bool:
    """Tell whether a front end asks for itself, not for its user."""
    if headers.get(TASK_HEADER) or ask.task:
        return True
    if any(isinstance(said, AgentSaid) for said in ask.transcript):
        return False
    asked = [said for said in ask.transcript if isinstance(said, UserSaid)]
    if len(asked) != 1:
        return False
    if any(isinstance(said, Instructed) and _PICKS_TOOLS in said.text for said in ask.transcript):
        return True
    first = next((part.text for part in asked[0].content if isinstance(part, Text)), "")
    return _TASK_PROMPT.match(first) is not None
