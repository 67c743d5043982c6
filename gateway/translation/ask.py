"""What a client asks, whatever API it came by: the one form that chat completions and responses are read into."""

from typing import Literal, TypeAlias

import msgspec

from gateway.translation.agent_turn import ClientTool, Said


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
