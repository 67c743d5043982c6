"""OpenAI's chat completion request -> what is said to the agent.

The agent keeps the memory, so only the newest user message goes to it; the transcript before it is checked and left
alone. What a Letta agent cannot do is refused by name, never dropped in silence.
"""

import binascii
import ipaddress
import re
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import msgspec

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import AgentTurn, ImageData, ImageUrl, Part, Text
from gateway.translation.openai_types import (
    AssistantMessage,
    AudioPart,
    ChatCompletionRequest,
    DeveloperMessage,
    FilePart,
    FunctionMessage,
    ImagePart,
    Message,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
    UserPart,
)

MAX_MODEL_LENGTH: Final = 512
MAX_SHOWN: Final = 200
"""Characters of the request that an error message may show."""
IMAGE_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})

_COMMON_NAMES: Final = {"image/jpg": "image/jpeg"}

_DECODER: Final = msgspec.json.Decoder(ChatCompletionRequest)
_NO_CHOICE: Final = (None, "none", "auto")


def decode(body: bytes) -> ChatCompletionRequest:
    """Return the typed request of a body that is known to be JSON.

    Raises ``InvalidRequest`` with the path of the first field that is missing or wrong.
    """
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except RecursionError:
        raise InvalidRequest("The request's body is nested too deeply: flatten it.", code="invalid_json") from None


def turn_content(request: ChatCompletionRequest) -> tuple[Part, ...]:
    """Return what the newest user message says to the agent.

    Raises ``InvalidRequest`` or ``UnsupportedParameter``, naming the field.
    """
    _refuse_unsupported(request)
    index, message = _newest_user_message(request.messages)
    return _content(message, f"messages[{index}].content")


def agent_turn(agent_id: str, content: tuple[Part, ...]) -> AgentTurn:
    """Address what is said to an agent's own thread."""
    return AgentTurn(agent_id=agent_id, content=content)


# What cannot be done -------------------------------------------------------------------------------------------------

_REFUSED: Final[tuple[tuple[str, Callable[[ChatCompletionRequest], bool], str], ...]] = (
    ("n", lambda r: (r.n or 1) > 1, "An agent gives one answer: send n=1 or leave it out."),
    ("logprobs", lambda r: bool(r.logprobs), "Letta reports no log probabilities: leave logprobs out."),
    ("top_logprobs", lambda r: bool(r.top_logprobs), "Letta reports no log probabilities: leave top_logprobs out."),
    ("stop", lambda r: bool(r.stop), "Letta takes no stop sequences: leave stop out."),
    (
        "response_format",
        lambda r: r.response_format is not None and r.response_format.type != "text",
        "Structured output is not supported: ask for it in the message, and leave response_format out.",
    ),
    ("tools", lambda r: bool(r.tools), "Tools of the client are not supported yet: leave tools out."),
    ("tool_choice", lambda r: r.tool_choice not in _NO_CHOICE, "There are no tools to choose: leave tool_choice out."),
    ("functions", lambda r: bool(r.functions), "Functions of the client are not supported yet: leave functions out."),
    ("function_call", lambda r: r.function_call not in _NO_CHOICE, "There are no functions: leave function_call out."),
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


# Messages ------------------------------------------------------------------------------------------------------------


def _newest_user_message(messages: list[Message]) -> tuple[int, UserMessage]:
    if not messages:
        raise InvalidRequest("'messages' is empty: send at least one message of role 'user'.", param="messages")
    for index, message in enumerate(messages):
        _check_role(message, index)
    newest = messages[-1]
    if not isinstance(newest, UserMessage):
        raise InvalidRequest(
            "The last message must be of role 'user': it is what the agent answers.",
            param=f"messages[{len(messages) - 1}].role",
        )
    return len(messages) - 1, newest


def _check_role(message: Message, index: int) -> None:
    match message:
        case SystemMessage() | DeveloperMessage():
            raise UnsupportedParameter(
                "System and developer messages are not supported yet: the agent's own persona and memory instruct it. "
                "Leave them out.",
                param=f"messages[{index}].role",
            )
        case ToolMessage() | FunctionMessage():
            raise UnsupportedParameter(
                "Tool results are not supported yet, as tools of the client are not: leave them out.",
                param=f"messages[{index}].role",
            )
        case UserMessage() | AssistantMessage():
            return


def _content(message: UserMessage, path: str) -> tuple[Part, ...]:
    if isinstance(message.content, str):
        return (Text(_text(message.content, path)),)
    if not message.content:
        raise InvalidRequest(f"'{path}' has no parts: send text or an image.", param=path)
    parts = [
        _part(part, f"{path}[{index}]")
        for index, part in enumerate(message.content)
        if not (isinstance(part, TextPart) and not part.text.strip())  # chat pages send one beside an image
    ]
    if not parts:
        raise InvalidRequest(f"'{path}' has no text and no image: an agent is not asked nothing.", param=path)
    return tuple(parts)


def _part(part: UserPart, path: str) -> Part:
    match part:
        case TextPart(text=text):
            return Text(_text(text, f"{path}.text"))
        case ImagePart(image_url=image):
            return _image(image.url, f"{path}.image_url.url")
        case AudioPart():
            raise UnsupportedParameter(f"'{path}': Letta takes no audio. Send text or images.", param=path)
        case FilePart():
            raise UnsupportedParameter(f"'{path}': Letta takes no files here. Send text or images.", param=path)


def _text(text: str, path: str) -> str:
    if not text.strip():
        raise InvalidRequest(f"'{path}' is empty: an agent is not asked nothing.", param=path)
    if "\0" in text:
        raise InvalidRequest(f"'{path}' contains a NUL character, which cannot be stored: remove it.", param=path)
    return text


# Images --------------------------------------------------------------------------------------------------------------


def _image(url: str, path: str) -> ImageData | ImageUrl:
    if url.startswith("data:"):
        return _inline_image(url, path)
    if not _is_public_https(url):
        raise InvalidRequest(
            f"Invalid '{path}': expected a data: URL with base64 data, or a public https: URL.",
            param=path,
            code="invalid_image_url",
        )
    return ImageUrl(url)


def _inline_image(url: str, path: str) -> ImageData:
    header, comma, data = url[len("data:") :].partition(",")
    media_type, _, encoding = header.partition(";")
    media_type = _COMMON_NAMES.get(media_type.strip().lower(), media_type.strip().lower())
    if not comma or encoding.strip().lower() != "base64" or media_type not in IMAGE_TYPES:
        raise InvalidRequest(
            f"Invalid '{path}': expected data:<type>;base64,<data> with a type of {', '.join(sorted(IMAGE_TYPES))}.",
            param=path,
            code="invalid_image_format",
        )
    try:
        empty = not binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError):
        empty = True
    if empty:
        raise InvalidRequest(f"Invalid '{path}': the data is not base64.", param=path, code="invalid_base64")
    return ImageData(media_type, data)


def _is_public_https(url: str) -> bool:
    """Tell whether Letta may be asked to fetch this: it fetches from where it runs, inside somebody's network.

    A name that resolves to a private address cannot be told from here; an address or a local name can.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        _ = parts.port
    except ValueError:
        return False
    if parts.scheme.lower() != "https" or parts.username is not None or not url.isprintable() or " " in url:
        return False
    try:
        return _is_public_address(ipaddress.ip_address(host))
    except ValueError:
        return _PUBLIC_NAME.fullmatch(host) is not None and host.rpartition(".")[2] not in _LOCAL_NAMES


# Names with a dot and a letter at the head of the last label: no local name, no address in disguise (0x7f.1), and no
# characters that one reader takes for another's dot, slash or digit.
_PUBLIC_NAME: Final = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z][a-z0-9-]*")
_LOCAL_NAMES: Final = frozenset({"local", "internal", "localhost", "localdomain"})


def _is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tell whether an address is everybody's, and hides no IPv4 address (mapped, NAT64 and the like are reserved)."""
    if isinstance(address, ipaddress.IPv6Address) and address.sixtofour is not None:
        return False
    return address.is_global and not address.is_reserved and not address.is_multicast


# Field errors --------------------------------------------------------------------------------------------------------


def _field_error(message: str) -> InvalidRequest:
    """Turn msgspec's ``... - at `$.a[0].b``` into OpenAI's wording, with the path as ``param``."""
    # The last one: what stands before it may quote the request.
    what, at, where = message.rpartition(" - at `$")
    if not at:
        what, where = message, ""
    path = where.rstrip("`").lstrip(".")
    if what.startswith("Object missing required field `"):
        field = what.rpartition("`")[0].rpartition("`")[2]
        name = f"{path}.{field}" if path else field
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    detail = what.replace("`", "'")[:MAX_SHOWN]
    name = path or "body"
    if ", got " in detail:
        return InvalidRequest(f"Invalid type for '{name}': {_lower(detail)}.", param=path or None, code="invalid_type")
    return InvalidRequest(f"Invalid value for '{name}': {_lower(detail)}.", param=path or None, code="invalid_value")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
