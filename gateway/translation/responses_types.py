"""OpenAI's Responses wire types, as far as the gateway reads or writes them.

Source: https://platform.openai.com/docs/api-reference/responses. Unknown fields are ignored, as OpenAI's SDKs send
extras; known ones are checked for type and range. Every optional field takes ``null``. Items and tools are read one by
one (``responses_items.py``, ``responses_tools.py``), as of those the API has more kinds than a Letta agent has use for.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from gateway.translation.openai_types import RefusalPart, StreamOptions, TextPart, Tokens

MAX_ID: Final = 512
"""Characters of an id that a client names."""

# Requests ------------------------------------------------------------------------------------------------------------


class InputText(Struct, tag_field="type", tag="input_text"):
    """A piece of what the client says."""

    text: str


class OutputTextSaid(Struct, tag_field="type", tag="output_text"):
    """A piece of what the agent said before; annotations and log probabilities are the client's affair."""

    text: str


class InputImage(Struct, tag_field="type", tag="input_image"):
    """An image: an https URL or a data URL; Letta holds no files of OpenAI's."""

    image_url: str | None = None
    file_id: str | None = None


class InputFile(Struct, tag_field="type", tag="input_file"):
    """A file: Letta takes none in a message."""


class InputAudio(Struct, tag_field="type", tag="input_audio"):
    """Audio: Letta takes none."""


ContentPart: TypeAlias = InputText | OutputTextSaid | TextPart | RefusalPart | InputImage | InputFile | InputAudio


class MessageItem(Struct):
    """A message of anybody's; its ``type`` may be absent."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]


class FunctionCallItem(Struct):
    """A call of a client's function that the agent made: the arguments are JSON in a string."""

    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class FunctionOutputItem(Struct):
    """What a client's function gave back."""

    call_id: str
    output: str | list[ContentPart]


class CustomCallItem(Struct):
    """A call of a client's custom tool that the agent made: the input is a text of any kind."""

    call_id: str
    name: str
    input: str


class LocalShellCallItem(Struct):
    """A call of OpenAI's shell tool that another model made."""

    call_id: str | None = None
    action: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))


class LocalShellOutputItem(Struct):
    """What that gave back; its id is the call's, where that does not stand by itself."""

    output: str
    id: str = ""
    call_id: str | None = None


class ItemReference(Struct):
    """An item of an earlier response, by its id: how the AI SDK repeats a stored response's items."""

    id: str


class IgnoredItem(Struct):
    """An item that says nothing to an agent: its own reasoning, its own tools' calls, other kinds of the API's."""


Item: TypeAlias = (
    MessageItem
    | FunctionCallItem
    | FunctionOutputItem
    | CustomCallItem
    | LocalShellCallItem
    | LocalShellOutputItem
    | ItemReference
    | IgnoredItem
)


class NamedFunctionTool(Struct, omit_defaults=True):
    """A tool of a choice."""

    type: str
    name: str | None = None


class ToolChoiceObject(Struct, omit_defaults=True):
    """A choice among tools: one function, or some tools of which the agent may call."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedFunctionTool] | None = None


class TextFormat(Struct, omit_defaults=True):
    """The shape asked of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw | UnsetType = UNSET
    strict: bool | None = None


class TextConfig(Struct, omit_defaults=True):
    """How the text is to be; the verbosity is the model's affair."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(Struct):
    """How the model is to reason: the agent's own configuration decides."""

    effort: str | None = None
    summary: str | None = None


class ConversationId(Struct):
    """A conversation, by its id."""

    id: Annotated[str, Meta(max_length=MAX_ID)]


MetadataKey: TypeAlias = Annotated[str, Meta(max_length=64)]
MetadataValue: TypeAlias = Annotated[str, Meta(max_length=512)]


class ResponsesRequest(Struct):
    """The body of ``POST /v1/responses``; ``translation/responses_request.py`` says what becomes of each field."""

    model: str
    input: str | list[msgspec.Raw]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    previous_response_id: Annotated[str, Meta(max_length=MAX_ID)] | None = None
    conversation: Annotated[str, Meta(max_length=MAX_ID)] | ConversationId | None = None
    store: bool | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None

    # Refused where set: a Letta agent cannot do it.
    background: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    prompt: Any = None

    # Accepted, echoed and ignored: the agent's own configuration decides.
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Tokens | None = None
    max_tool_calls: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# Answers: output items -----------------------------------------------------------------------------------------------

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    """What the agent says to the user."""

    id: str
    status: ItemStatus
    content: tuple[OutputText, ...]
    role: Literal["assistant"] = "assistant"


class SummaryText(Struct, frozen=True, tag_field="type", tag="summary_text"):
    """A piece of what the agent thinks."""

    text: str


class OutputReasoning(Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the agent thinks."""

    id: str
    status: ItemStatus
    summary: tuple[SummaryText, ...]
    encrypted_content: None = None


class OutputFunctionCall(Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call that the client is to execute; ``namespace`` stands where the tool came in one."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET


class OutputCustomCall(Struct, frozen=True, tag_field="type", tag="custom_tool_call"):
    """A call of a custom tool that the client is to execute."""

    id: str
    call_id: str
    name: str
    input: str
    status: ItemStatus


class ToolFailure(Struct, frozen=True, tag_field="type", tag="mcp_tool_execution_error"):
    """Why a tool that ran on Letta gave nothing back."""

    content: tuple[TextPart, ...]


class OutputMcpCall(Struct, frozen=True, tag_field="type", tag="mcp_call"):
    """A call that ran on Letta."""

    id: str
    name: str
    arguments: str
    status: ItemStatus
    error: ToolFailure | None = None
    output: str | None = None
    server_label: str = "letta"
    approval_request_id: None = None


OutputItem: TypeAlias = OutputMessage | OutputReasoning | OutputFunctionCall | OutputCustomCall | OutputMcpCall


# Answers: the response -----------------------------------------------------------------------------------------------


class InputTokensDetails(Struct, frozen=True):
    """Where the input's tokens came from; Letta reports none that went into a cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True):
    """What the output's tokens were spent on."""

    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    """Token counts; SDKs require the details, so zeros stand where Letta reports none."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


ErrorCode: TypeAlias = Literal["server_error", "rate_limit_exceeded", "insufficient_quota", "invalid_prompt"]
IncompleteReason: TypeAlias = Literal["max_output_tokens", "content_filter"]
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseError(Struct, frozen=True):
    """Why the response failed."""

    code: ErrorCode
    message: str


class IncompleteDetails(Struct, frozen=True):
    """Why the response is incomplete."""

    reason: IncompleteReason


class EchoedConversation(Struct, frozen=True):
    """The conversation of a response."""

    id: str


class Echo(Struct, frozen=True, kw_only=True):
    """What a response repeats of its request."""

    model: str
    instructions: str | None = None
    tools: tuple[msgspec.Raw, ...] = ()
    tool_choice: Literal["auto", "none", "required"] | ToolChoiceObject = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    previous_response_id: str | None = None
    conversation: EchoedConversation | None = None
    store: bool = True
    metadata: dict[str, str] | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    background: bool = False


class Response(Echo, frozen=True, kw_only=True):
    """The answer to a request, as far as it has come."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    output: tuple[OutputItem, ...] = ()
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None


class StreamEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a streamed answer: which fields stand is a matter of its ``type``; the number stands last."""

    type: str
    response: Response | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    summary_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | SummaryText | UnsetType = UNSET
    logprobs: tuple[()] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    sequence_number: int


class DeletedResponse(Struct, frozen=True):
    """What is left of a response that was deleted."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ResponseQuery(Struct):
    """The query of ``GET /v1/responses/{id}``; ``stream`` is refused."""

    stream: bool = False


class InputItemsQuery(Struct):
    """Which of a response's input items are wanted; ``after`` is the id of the one before them."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class InputItemList(Struct, frozen=True):
    """The items of a request, as ``GET /v1/responses/{id}/input_items`` lists them."""

    data: tuple[msgspec.Raw, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool = False
    object: Literal["list"] = "list"
