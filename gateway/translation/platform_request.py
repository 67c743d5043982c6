"""A platform message -> what is asked of the user's agent, and the text by which it is kept."""

from typing import Final

import msgspec

from gateway.translation.agent_turn import Text, UserSaid
from gateway.translation.ask import Ask
from gateway.translation.field_errors import decoded
from gateway.translation.openai_types import UserMessage
from gateway.translation.platform_types import ChatRequest
from gateway.translation.request import user_said

IMAGE: Final = "(an image)"
"""How an image stands in the history."""

_DECODER: Final = msgspec.json.Decoder(ChatRequest)


class ChatMessage(msgspec.Struct, frozen=True):
    """A user's message."""

    said: UserSaid
    is_stream: bool

    @property
    def text(self) -> str:
        """Return the message as it is kept: its texts, and that there were images."""
        return "\n".join(part.text if isinstance(part, Text) else IMAGE for part in self.said.content)

    def ask(self) -> Ask:
        """Return what is asked of the user's own agent, which is not named."""
        return Ask(model="", transcript=(self.said,), is_stream=self.is_stream)


def chat_message(body: bytes) -> ChatMessage:
    """Return the message of a body that is known to be JSON; raises ``InvalidRequest`` naming the field at fault."""
    request = decoded(_DECODER, body)
    said = user_said(UserMessage(request.message), "message")
    return ChatMessage(said, is_stream=request.stream is not False)
