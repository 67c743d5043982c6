"""What a client asks, whatever API it came by: the one form that chat completions and responses are read into."""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from gateway.translation.agent_turn import AgentSaid, ClientTool, Said, Text, UserSaid

GO_ON: Final = UserSaid((Text("Continue your last answer from where it ended."),))
"""What an agent is told whose client sends a transcript that ends in its answer ("Continue Response" of Open WebUI's):
a model would go on writing that message, an agent answers somebody."""


class Named(msgspec.Struct, frozen=True):
    """The agent is to call this tool."""

    name: str


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | Named


class OutputSchema(msgspec.Struct, frozen=True):
    """The answer is to be JSON: of this schema, or any object where there is none."""

    name: str = "response"
    description: str = ""
    schema: msgspec.Raw | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request: the whole transcript as the client tells it, and how the answer is to be given.

    ``chat`` is the chat's identity where the body names one, ``task`` what a front end asks for itself.
    ``is_news`` tells that the transcript is not the whole: the chat's conversation holds what came before.
    ``is_stream`` and ``wants_usage`` are the answer's form.
    """

    model: str
    transcript: tuple[Said, ...]
    tools: tuple[ClientTool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_calls: bool = True
    output: OutputSchema | None = None
    chat: str | None = None
    task: str | None = None
    is_news: bool = False
    is_legacy: bool = False
    """Whether tools are called functions, have no ids, and are called one at a time: their names stand for the ids."""
    is_stream: bool = False
    wants_usage: bool = False

    @property
    def goes_on(self) -> bool:
        """Tell whether the answer goes on with the one before: for the client, both are one message."""
        return bool(self.transcript) and self.transcript[-1] is GO_ON


def can_go_on(transcript: Sequence[Said]) -> bool:
    """Tell whether a transcript ends in an answer to something, and in no call of a tool."""
    if len(transcript) <= 1 or not isinstance(last := transcript[-1], AgentSaid):
        return False
    return bool(last.text.strip()) and not last.calls and any(isinstance(said, UserSaid) for said in transcript)
