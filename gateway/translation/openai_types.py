"""OpenAI's Chat Completions and Models wire types, as far as the gateway reads or writes them.

Source: https://platform.openai.com/docs/api-reference/chat. Unknown fields are ignored, as OpenAI's SDKs send extras;
known ones are checked for type and range. Every optional field takes ``null``.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from gateway.translation.tools import FunctionSpec

# Requests ------------------------------------------------------------------------------------------------------------


class TextPart(Struct, tag_field="type", tag="text"):
    """A piece of text."""

    text: str


class ImageUrlBody(Struct):
    """Where an image is: an https URL or a data URL; ``detail`` is the model's affair."""

    url: str
    detail: str | None = None


class ImagePart(Struct, tag_field="type", tag="image_url"):
    """An image."""

    image_url: ImageUrlBody


class AudioPart(Struct, tag_field="type", tag="input_audio"):
    """Audio: Letta takes none."""


class FilePart(Struct, tag_field="type", tag="file"):
    """A file: Letta takes none in a message."""


class RefusalPart(Struct, tag_field="type", tag="refusal"):
    """An earlier refusal of the assistant."""

    refusal: str


UserPart: TypeAlias = TextPart | ImagePart | AudioPart | FilePart
AssistantPart: TypeAlias = TextPart | RefusalPart


class SystemMessage(Struct, tag_field="role", tag="system"):
    """The client's instructions."""

    content: str | list[TextPart]


class DeveloperMessage(Struct, tag_field="role", tag="developer"):
    """The client's instructions, by their newer name."""

    content: str | list[TextPart]


class UserMessage(Struct, tag_field="role", tag="user"):
    """What the user says."""

    content: str | list[UserPart]


class SaidFunction(Struct):
    """A function call that the agent made: the arguments are JSON in a string."""

    name: str
    arguments: str = ""


class SaidCall(Struct):
    """A tool call that the agent made."""

    id: str
    function: SaidFunction


class AssistantMessage(Struct, tag_field="role", tag="assistant"):
    """What the agent said before: content is null, empty or absent beside tool calls."""

    content: str | list[AssistantPart] | None = None
    tool_calls: list[SaidCall] | None = None
    function_call: SaidFunction | None = None


class ToolMessage(Struct, tag_field="role", tag="tool"):
    """The result of a tool call; null and absent: it gave nothing."""

    tool_call_id: str
    content: str | list[UserPart] | None = None


class FunctionMessage(Struct, tag_field="role", tag="function"):
    """The result of a legacy function call."""

    name: str
    content: str | None = None


Message: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


class StreamOptions(Struct):
    """What a stream carries beside its deltas."""

    include_usage: bool | None = None


class JsonSchema(Struct):
    """The schema asked of the answer."""

    name: str
    description: str | None = None
    schema: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))
    strict: bool | None = None


class ResponseFormat(Struct):
    """The shape asked of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FunctionTool(Struct):
    """A tool of the client's."""

    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(Struct):
    """The function to be called."""

    name: str


class NamedTool(Struct):
    """The tool to be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Tokens: TypeAlias = Annotated[int, Meta(ge=1)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]


class ChatCompletionRequest(Struct):
    """The body of ``POST /v1/chat/completions``; ``translation/request.py`` says what becomes of each field."""

    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    functions: list[FunctionSpec] | None = None
    function_call: Literal["auto", "none"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None

    # Refused where set: a Letta agent cannot do it, or not yet.
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stop: str | list[str] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    # Accepted and ignored: the agent's own configuration decides.
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: int | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# Answers -------------------------------------------------------------------------------------------------------------

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class PromptTokensDetails(Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    """What the completion's tokens were spent on."""

    reasoning_tokens: int


class CompletionUsage(Struct, frozen=True):
    """Token counts; the details stand only where Letta reports them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class FunctionFragment(Struct, frozen=True, omit_defaults=True):
    """A piece of a function call: the name once, the arguments as a string."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallFragment(Struct, frozen=True, omit_defaults=True):
    """A piece of a tool call: ``index`` always, as clients fail without it; ``id`` once, as SDKs join what repeats."""

    index: int
    id: str | UnsetType = UNSET
    function: FunctionFragment = FunctionFragment()
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, frozen=True, omit_defaults=True):
    """What a chunk adds; reasoning goes out under both names that clients read."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallFragment] | UnsetType = UNSET
    function_call: FunctionFragment | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """The one choice of a chunk."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Struct, frozen=True):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | UnsetType | None = UNSET


class FunctionCall(Struct, frozen=True):
    """A whole function call."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """A whole tool call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Struct, frozen=True):
    """The whole answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class Choice(Struct, frozen=True):
    """The one choice of an answer."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(Struct, frozen=True):
    """The answer to a request that does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage


class LettaAgent(Struct, frozen=True):
    """What a model is on Letta; ``tools`` are the agent's own."""

    agent_id: str
    description: str | None
    model: str | None
    tools: tuple[str, ...]


class Model(Struct, frozen=True):
    """An agent, as a model; ``letta`` is told of one that is asked for alone."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    letta: LettaAgent | UnsetType = UNSET


class ModelList(Struct, frozen=True):
    """All agents, as models."""

    object: Literal["list"]
    data: list[Model]
