"""OpenAI's chat completion request -> what is asked of the agent.

The whole transcript is read, and whether its news go to the agent's own thread or into a conversation is decided
elsewhere. What a Letta agent cannot do is refused by name, never dropped in silence.
"""

from collections.abc import Callable
from typing import Final, Literal

import msgspec

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation import content
from gateway.translation.agent_turn import (
    AgentSaid,
    Call,
    ClientTool,
    Instructed,
    Part,
    Said,
    Text,
    ToolResult,
    UserSaid,
)
from gateway.translation.ask import GO_ON, Ask, Named, OutputSchema, ToolChoice, can_go_on
from gateway.translation.field_errors import decoded
from gateway.translation.openai_types import (
    AssistantMessage,
    AudioPart,
    ChatCompletionRequest,
    DeveloperMessage,
    FilePart,
    FunctionMessage,
    ImagePart,
    Message,
    NamedFunction,
    NamedTool,
    RefusalPart,
    ResponseFormat,
    SaidFunction,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
    UserPart,
)
from gateway.translation.tools import check_choice, check_name, check_schema, client_tools

MAX_MODEL_LENGTH: Final = 512
MOST_MESSAGES: Final = 10_000

_DECODER: Final = msgspec.json.Decoder(ChatCompletionRequest)


def decode(body: bytes) -> ChatCompletionRequest:
    """Return the typed request of a body that is known to be JSON.

    Raises ``InvalidRequest`` with the path of the first field that is missing or wrong.
    """
    return decoded(_DECODER, body)


def ask_of(request: ChatCompletionRequest) -> Ask:
    """Return what is asked; raises ``InvalidRequest`` or ``UnsupportedParameter``, naming the field."""
    _refuse_unsupported(request)
    tools, choice = _tools(request)
    options = request.stream_options
    return Ask(
        model=request.model,
        transcript=_transcript(request.messages),
        tools=tools,
        tool_choice=choice,
        parallel_calls=request.parallel_tool_calls is not False and not _is_legacy(request),
        output=_output(request.response_format),
        chat=(request.metadata or {}).get("chat_id"),
        task=(request.metadata or {}).get("task"),
        is_legacy=_is_legacy(request),
        is_stream=bool(request.stream),
        wants_usage=bool(options and options.include_usage),
    )


# What cannot be done -------------------------------------------------------------------------------------------------

_REFUSED: Final[tuple[tuple[str, Callable[[ChatCompletionRequest], bool], str], ...]] = (
    ("n", lambda r: (r.n or 1) > 1, "An agent gives one answer: send n=1 or leave it out."),
    ("logprobs", lambda r: bool(r.logprobs), "Letta reports no log probabilities: leave logprobs out."),
    ("top_logprobs", lambda r: bool(r.top_logprobs), "Letta reports no log probabilities: leave top_logprobs out."),
    ("stop", lambda r: bool(r.stop), "Letta takes no stop sequences: leave stop out."),
    (
        "modalities",
        lambda r: r.modalities is not None and r.modalities != ["text"],
        "An agent answers in text: leave modalities out.",
    ),
    ("audio", lambda r: r.audio is not None, "An agent answers in text: leave audio out."),
    ("prediction", lambda r: r.prediction is not None, "Letta takes no predicted output: leave prediction out."),
    (
        "web_search_options",
        lambda r: r.web_search_options is not None,
        "The agent's own tools decide about web search: leave web_search_options out.",
    ),
)


def _refuse_unsupported(request: ChatCompletionRequest) -> None:
    for name, is_set, advice in _REFUSED:
        if is_set(request):
            raise UnsupportedParameter(f"Unsupported parameter: '{name}'. {advice}", param=name)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is true.", param="stream_options"
        )
    if not request.model or len(request.model) > MAX_MODEL_LENGTH:
        raise InvalidRequest("'model' must be the name or id of an agent. GET /v1/models lists them.", param="model")


# Tools ---------------------------------------------------------------------------------------------------------------


def _tools(request: ChatCompletionRequest) -> tuple[tuple[ClientTool, ...], ToolChoice]:
    if (request.functions or request.function_call) and not request.tools:
        functions = client_tools(request.functions or (), "functions", inside="")
        choice = _function_choice(request.function_call)
        check_choice(choice, functions, "function_call", "functions")
        return functions, choice
    tools = client_tools([tool.function for tool in request.tools or ()], "tools")
    choice = _choice(request.tool_choice)
    check_choice(choice, tools, "tool_choice")
    return tools, choice


def _is_legacy(request: ChatCompletionRequest) -> bool:
    return bool(request.functions) and not request.tools


def _choice(choice: Literal["auto", "none", "required"] | NamedTool | None) -> ToolChoice:
    match choice:
        case NamedTool(function=function):
            return Named(function.name)
        case "none" | "auto" | "required":
            return choice
        case _:
            return "auto"


def _function_choice(choice: Literal["auto", "none"] | NamedFunction | None) -> ToolChoice:
    match choice:
        case NamedFunction(name=name):
            return Named(name)
        case "none":
            return "none"
        case _:
            return "auto"


def _output(wanted: ResponseFormat | None) -> OutputSchema | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return OutputSchema()
    described = wanted.json_schema
    if described is None:
        raise InvalidRequest(
            "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    path = "response_format.json_schema"
    check_name(described.name, f"{path}.name")
    description = content.storable(described.description or "", f"{path}.description")
    schema = bytes(described.schema)
    if schema.strip() == b"null":
        return OutputSchema(described.name, description)
    check_schema(described.schema, f"{path}.schema")
    return OutputSchema(described.name, description, msgspec.Raw(schema))


# Messages ------------------------------------------------------------------------------------------------------------


def _transcript(messages: list[Message]) -> tuple[Said, ...]:
    if not messages:
        raise InvalidRequest("'messages' is empty: send at least one message of role 'user'.", param="messages")
    if len(messages) > MOST_MESSAGES:
        raise InvalidRequest(f"'messages' has more than {MOST_MESSAGES} items: send fewer.", param="messages")
    last = _last_said(messages)
    transcript: list[Said] = []
    has_news = False
    for index, message in enumerate(messages):
        said = _said(message, f"messages[{index}]", is_news=index > last)
        if said is not None:
            transcript.append(said)
            has_news = has_news or (index > last and isinstance(said, UserSaid | ToolResult))
    if not has_news and last == len(messages) - 1 and can_go_on(transcript):
        transcript.append(GO_ON)
    elif not has_news:
        raise InvalidRequest(
            "The last message must be of role 'user' or 'tool', which the agent answers, or an answer's text with "
            "which it goes on.",
            param=f"messages[{len(messages) - 1}].role",
        )
    return tuple(transcript)


def _last_said(messages: list[Message]) -> int:
    """Return where the assistant spoke last: what comes behind it is news to the agent; -1 where it never did."""
    spoken = (index for index in reversed(range(len(messages))) if isinstance(messages[index], AssistantMessage))
    return next(spoken, -1)


def _said(message: Message, path: str, *, is_news: bool) -> Said | None:
    match message:
        case UserMessage():
            return _user(message, f"{path}.content", is_news=is_news)
        case AssistantMessage():
            return _assistant(message, path)
        case SystemMessage(content=instructions) | DeveloperMessage(content=instructions):
            text = _joined(instructions, f"{path}.content")
            return Instructed(text) if text.strip() else None
        case ToolMessage(tool_call_id=call_id, content=result):
            return ToolResult(_call_id(call_id, f"{path}.tool_call_id"), _result(result))
        case FunctionMessage(name=name, content=result):
            return ToolResult(_call_id(name, f"{path}.name"), content.replaced(result or ""))


def _user(message: UserMessage, path: str, *, is_news: bool) -> UserSaid | None:
    return user_said(message, path) if is_news or _says_something(message.content) else None


def _says_something(said: str | list[UserPart]) -> bool:
    if isinstance(said, str):
        return bool(said.strip())
    return not all(isinstance(part, TextPart) and not part.text.strip() for part in said)


def user_said(message: UserMessage, path: str) -> UserSaid:
    """Return what a user says; raises ``InvalidRequest`` or ``UnsupportedParameter``, naming the field."""
    if isinstance(message.content, str):
        return UserSaid((Text(content.text(message.content, path)),))
    if not message.content:
        raise InvalidRequest(f"'{path}' has no parts: send text or an image.", param=path)
    parts = tuple(
        _part(part, f"{path}[{index}]")
        for index, part in enumerate(message.content)
        if not (isinstance(part, TextPart) and not part.text.strip())  # chat pages send one beside an image
    )
    if not parts:
        raise InvalidRequest(f"'{path}' has no text and no image: an agent is not asked nothing.", param=path)
    return UserSaid(parts)


def _part(part: UserPart, path: str) -> Part:
    match part:
        case TextPart(text=text):
            return Text(content.text(text, f"{path}.text"))
        case ImagePart(image_url=image):
            return content.image(image.url, f"{path}.image_url.url")
        case AudioPart():
            raise UnsupportedParameter(f"'{path}': Letta takes no audio. Send text or images.", param=path)
        case FilePart():
            raise UnsupportedParameter(f"'{path}': Letta takes no files here. Send text or images.", param=path)


def _assistant(message: AssistantMessage, path: str) -> AgentSaid:
    calls = [
        _call(call.id, call.function, f"{path}.tool_calls[{index}].id", f"{path}.tool_calls[{index}].function")
        for index, call in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        legacy = message.function_call
        calls.append(_call(legacy.name, legacy, f"{path}.function_call.name", f"{path}.function_call"))
    said = message.content
    if said is None or isinstance(said, str):
        return AgentSaid(content.replaced(said or ""), tuple(calls))
    texts = [part.refusal if isinstance(part, RefusalPart) else part.text for part in said]
    return AgentSaid(content.replaced("\n\n".join(texts)), tuple(calls))


def _call(call_id: str, function: SaidFunction, id_path: str, path: str) -> Call:
    return Call(
        _call_id(call_id, id_path),
        content.storable(function.name, f"{path}.name"),
        content.replaced(function.arguments),
    )


def _result(said: str | list[UserPart] | None) -> str:
    """Return a result's text."""
    if said is None or isinstance(said, str):
        return content.replaced(said or "")
    texts = [part.text if isinstance(part, TextPart) else content.LEFT_OUT for part in said]
    return content.replaced("\n\n".join(texts))


def _joined(said: str | list[TextPart], path: str) -> str:
    text = said if isinstance(said, str) else "\n\n".join(part.text for part in said)
    return content.storable(text, path)


def _call_id(call_id: str, path: str) -> str:
    if not call_id or len(call_id) > MAX_MODEL_LENGTH:
        raise InvalidRequest(f"Invalid '{path}': expected the id of a tool call.", param=path)
    return content.storable(call_id, path)
