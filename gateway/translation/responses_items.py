"""The Responses API's input items -> the transcript.

What the agent said comes as several items (texts, calls, reasoning) and is put together again: one message with its
calls, as chat completions have it. Items that say nothing to an agent are ignored, whatever they are: clients send
back whole histories, other providers' items among them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation import content
from gateway.translation.agent_turn import AgentSaid, Call, Instructed, Part, Said, Text, ToolResult, UserSaid
from gateway.translation.ask import GO_ON, can_go_on
from gateway.translation.openai_types import RefusalPart
from gateway.translation.responses_names import flat_name
from gateway.translation.responses_parts import read_part
from gateway.translation.responses_types import (
    MAX_ID,
    ContentPart,
    CustomCallItem,
    FunctionCallItem,
    FunctionOutputItem,
    IgnoredItem,
    InputAudio,
    InputFile,
    InputImage,
    Item,
    ItemReference,
    LocalShellCallItem,
    LocalShellOutputItem,
    MessageItem,
)

MOST_ITEMS: Final = 10_000
LOCAL_SHELL: Final = "local_shell"

NotText: TypeAlias = InputImage | InputFile | InputAudio


class _Kind(msgspec.Struct):
    type: str | None = None
    id: Any = None
    role: Any = None


_KIND: Final = msgspec.json.Decoder(_Kind)
_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_KINDS: Final[dict[str, msgspec.json.Decoder[Item]]] = {
    "message": msgspec.json.Decoder(MessageItem),
    "function_call": msgspec.json.Decoder(FunctionCallItem),
    "function_call_output": msgspec.json.Decoder(FunctionOutputItem),
    "custom_tool_call": msgspec.json.Decoder(CustomCallItem),
    "custom_tool_call_output": msgspec.json.Decoder(FunctionOutputItem),
    "local_shell_call": msgspec.json.Decoder(LocalShellCallItem),
    "local_shell_call_output": msgspec.json.Decoder(LocalShellOutputItem),
    "item_reference": msgspec.json.Decoder(ItemReference),
}
_IGNORED: Final = IgnoredItem()


def read_items(raws: Sequence[msgspec.Raw]) -> list[Item]:
    """Return the typed items of a request; raises ``InvalidRequest`` naming the field at fault."""
    if not raws:
        raise InvalidRequest("'input' is empty: send at least one message of role 'user'.", param="input")
    if len(raws) > MOST_ITEMS:
        raise InvalidRequest(f"'input' has more than {MOST_ITEMS} items: send fewer.", param="input")
    return [_read(raw, f"input[{index}]") for index, raw in enumerate(raws)]


def items_by_id(items: bytes) -> dict[str, Item]:
    """Return the items of a stored JSON array, an output or an input, by their ids: what references refer to."""
    known: dict[str, Item] = {}
    for raw in _ITEMS.decode(items):
        name = _KIND.decode(raw).id
        if isinstance(name, str):
            known[name] = _read(raw, "items")
    return known


def transcript(items: Sequence[Item], known: Mapping[str, Item]) -> tuple[Said, ...]:
    """Return what the items say, which must end with something for the agent to answer.

    ``known`` are the items of stored responses that references may mean. Raises ``InvalidRequest``, with OpenAI's
    wording for a reference to no such item.
    """
    items = [_resolved(item, known, f"input[{index}].id") for index, item in enumerate(items)]
    last = _last_said(items)
    said = [_said(item, f"input[{index}]", is_news=index > last) for index, item in enumerate(items)]
    whole = merged(one for one in said if one is not None)
    if any(isinstance(news, UserSaid | ToolResult) for news in said[last + 1 :]):
        return whole
    if last != len(items) - 1 or not can_go_on(whole):
        raise InvalidRequest(
            "The last item of 'input' must be a user's message or a function call's output, which the agent answers, "
            "or an answer's text with which it goes on.",
            param=f"input[{len(items) - 1}]",
        )
    return (*whole, GO_ON)


def history(items: Sequence[Item]) -> tuple[Said, ...]:
    """Return what stored items say, which have been answered; instructions hold for one response and are left out."""
    said = (_said(item, f"input[{index}]", is_news=False) for index, item in enumerate(items))
    return merged(one for one in said if one is not None and not isinstance(one, Instructed))


def merged(said: Iterable[Said]) -> tuple[Said, ...]:
    """Return the messages with each run of the agent's put together: its texts as they came, then its calls."""
    whole: list[Said] = []
    for one in said:
        if isinstance(one, AgentSaid) and whole and isinstance(before := whole[-1], AgentSaid):
            whole[-1] = AgentSaid(before.text + one.text, before.calls + one.calls)
        else:
            whole.append(one)
    return tuple(one for one in whole if not isinstance(one, AgentSaid) or one.calls or one.text.strip())


def _read(raw: msgspec.Raw, path: str) -> Item:
    kind = read_part(_KIND, raw, path)
    name = kind.type
    if name is None:
        name = "item_reference" if kind.role is None and kind.id is not None else "message"
    decoder = _KINDS.get(name)
    return _IGNORED if decoder is None else read_part(decoder, raw, path)


def _resolved(item: Item, known: Mapping[str, Item], path: str) -> Item:
    if not isinstance(item, ItemReference):
        return item
    meant = known.get(item.id)
    if meant is None or isinstance(meant, ItemReference):
        shown = item.id[:100]
        raise InvalidRequest(
            f"Item with id '{shown}' not found. Items are kept with responses that are stored: send the item itself.",
            param=path,
            code="item_not_found",
        )
    return meant


def _last_said(items: Sequence[Item]) -> int:
    """Return where the agent spoke last: what comes behind it is news to it; -1 where it never did."""
    return next((index for index in reversed(range(len(items))) if _is_agents(items[index])), -1)


def _is_agents(item: Item) -> bool:
    is_call = isinstance(item, FunctionCallItem | CustomCallItem | LocalShellCallItem)
    return is_call or (isinstance(item, MessageItem) and item.role == "assistant")


def _said(item: Item, path: str, *, is_news: bool) -> Said | None:
    match item:
        case MessageItem(role="user"):
            return _user(item.content, f"{path}.content", is_news=is_news)
        case MessageItem(role="assistant"):
            return AgentSaid(content.replaced(_joined(item.content, f"{path}.content")))
        case MessageItem():
            text = content.storable(_joined(item.content, f"{path}.content"), f"{path}.content")
            return Instructed(text) if text.strip() else None
        case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
            called = flat_name(name, item.namespace)
            return AgentSaid("", (Call(_call_id(call_id, path), called, content.replaced(arguments)),))
        case CustomCallItem(call_id=call_id, name=name, input=text):
            return AgentSaid("", (Call(_call_id(call_id, path), name, content.replaced(text)),))
        case LocalShellCallItem(call_id=str(call_id), action=action):
            done = content.replaced(bytes(action).decode())
            return AgentSaid("", (Call(_call_id(call_id, path), LOCAL_SHELL, done),))
        case LocalShellOutputItem(output=output):
            return ToolResult(_call_id(item.call_id or item.id, path), content.replaced(output))
        case FunctionOutputItem(call_id=call_id, output=output):
            return ToolResult(_call_id(call_id, path), _result(output))
        case _:
            return None


def _user(said: str | list[ContentPart], path: str, *, is_news: bool) -> UserSaid | None:
    if isinstance(said, str):
        return UserSaid((Text(content.text(said, path)),)) if is_news or said.strip() else None
    parts = tuple(
        _part(part, f"{path}[{index}]")
        for index, part in enumerate(said)
        if _text_of(part).strip() or isinstance(part, NotText)
    )
    if not parts and is_news:
        raise InvalidRequest(f"'{path}' has no text and no image: an agent is not asked nothing.", param=path)
    return UserSaid(parts) if parts else None


def _part(part: ContentPart, path: str) -> Part:
    match part:
        case InputImage(image_url=str(url)):
            return content.image(url, f"{path}.image_url")
        case InputImage() | InputFile() | InputAudio():
            raise _unsupported(path)
        case _:
            return Text(content.text(_text_of(part), f"{path}.text"))


def _joined(said: str | list[ContentPart], path: str) -> str:
    if isinstance(said, str):
        return said
    for index, part in enumerate(said):
        if isinstance(part, NotText):
            raise _unsupported(f"{path}[{index}]")
    return "\n\n".join(_text_of(part) for part in said)


def _result(output: str | list[ContentPart]) -> str:
    """Return a result's text."""
    if isinstance(output, str):
        return content.replaced(output)
    texts = [content.LEFT_OUT if isinstance(part, NotText) else _text_of(part) for part in output]
    return content.replaced("\n\n".join(texts))


def _text_of(part: ContentPart) -> str:
    match part:
        case InputImage() | InputFile() | InputAudio():
            return ""
        case RefusalPart(refusal=refusal):
            return refusal
        case _:
            return part.text


def _unsupported(path: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"'{path}': Letta takes no files and no audio here, and images by URL and from the user alone. Send text, or "
        "an 'input_image' with an 'image_url'.",
        param=path,
    )


def _call_id(call_id: str, path: str) -> str:
    if not call_id or len(call_id) > MAX_ID:
        raise InvalidRequest(f"Invalid '{path}.call_id': expected the id of a function call.", param=f"{path}.call_id")
    return content.storable(call_id, f"{path}.call_id")
