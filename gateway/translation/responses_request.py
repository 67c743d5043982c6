"""OpenAI's request for a response -> what is asked of the agent.

As in ``request.py``: what a Letta agent cannot do is refused by name, never dropped in silence. What says nothing to
an agent at all (kinds of items and tools that are OpenAI's own) is ignored, as coding agents send it unasked.
"""

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation import content
from gateway.translation.agent_turn import Instructed, Said, Text, UserSaid
from gateway.translation.ask import Ask, OutputSchema
from gateway.translation.field_errors import decoded
from gateway.translation.responses_items import read_items, transcript
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_tools import choose, read_tools
from gateway.translation.responses_types import (
    MAX_ID,
    ConversationId,
    Echo,
    EchoedConversation,
    Item,
    ItemReference,
    ResponsesRequest,
    TextConfig,
    TextFormat,
)
from gateway.translation.tools import check_name, check_schema

_DECODER: Final = msgspec.json.Decoder(ResponsesRequest)


def decode(body: bytes) -> ResponsesRequest:
    """Return the typed request of a body that is known to be JSON.

    Raises ``InvalidRequest`` with the path of the first field that is missing or wrong.
    """
    return decoded(_DECODER, body)


def ask_of(request: ResponsesRequest, *, before: tuple[Said, ...] = (), known: Mapping[str, Item] | None = None) -> Ask:
    """Return what is asked; raises ``InvalidRequest`` or ``UnsupportedParameter``, naming the field.

    ``before`` is what was said up to the response that this one follows, without the instructions, which hold for one
    response; ``known`` are the stored items that ``references`` may mean.
    """
    _refuse_unsupported(request)
    tools, choice = choose(request.tool_choice, read_tools(request.tools or ()).offered)
    return Ask(
        model=request.model,
        transcript=_instructions(request) + before + said_of(request, known),
        tools=tools,
        tool_choice=choice,
        parallel_calls=request.parallel_tool_calls is not False,
        output=_output(request.text),
        chat=_chat(request),
        is_news=request.conversation is not None,
        is_stream=bool(request.stream),
        wants_usage=True,
    )


def said_of(request: ResponsesRequest, known: Mapping[str, Item] | None = None) -> tuple[Said, ...]:
    """Return what the input says, without instructions and history: what a stored response adds to its thread."""
    if isinstance(request.input, str):
        return (UserSaid((Text(content.text(request.input, "input")),)),)
    return transcript(read_items(request.input), known or {})


def references(request: ResponsesRequest) -> tuple[str, ...]:
    """Return the ids of the stored items that the input refers to; ``response_of`` says whose they are."""
    if isinstance(request.input, str):
        return ()
    return tuple(item.id for item in read_items(request.input) if isinstance(item, ItemReference))


def namespaced(request: ResponsesRequest) -> Mapping[str, FunctionName]:
    """Return what the client calls those functions whose names had to be made for the agent."""
    return read_tools(request.tools or ()).namespaced


def conversation_of(request: ResponsesRequest) -> str | None:
    """Return the id of the conversation that the request names."""
    named = request.conversation
    return named.id if isinstance(named, ConversationId) else named


def echo_of(request: ResponsesRequest) -> Echo:
    """Return what the response repeats of its request; it keeps nothing of the body that was read."""
    conversation = conversation_of(request)
    return Echo(
        model=request.model,
        instructions=request.instructions,
        tools=tuple(msgspec.Raw(bytes(tool)) for tool in request.tools or ()),
        tool_choice=request.tool_choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        text=_echoed_text(request.text),
        previous_response_id=request.previous_response_id,
        conversation=None if conversation is None else EchoedConversation(conversation),
        store=request.store is not False,
        metadata=request.metadata or {},
        reasoning=request.reasoning,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        temperature=request.temperature,
        top_p=request.top_p,
        truncation=request.truncation or "disabled",
        service_tier=request.service_tier,
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )


# What cannot be done -------------------------------------------------------------------------------------------------

_REFUSED: Final[tuple[tuple[str, Callable[[ResponsesRequest], bool], str], ...]] = (
    ("background", lambda r: bool(r.background), "An agent's turn lasts as long as its request: leave background out."),
    ("top_logprobs", lambda r: bool(r.top_logprobs), "Letta reports no log probabilities: leave top_logprobs out."),
    (
        "include",
        lambda r: "message.output_text.logprobs" in (r.include or ()),
        "Letta reports no log probabilities: leave message.output_text.logprobs out.",
    ),
    ("prompt", lambda r: r.prompt is not None, "The gateway keeps no prompt templates: send instructions and input."),
)


def _refuse_unsupported(request: ResponsesRequest) -> None:
    for name, is_set, advice in _REFUSED:
        if is_set(request):
            raise UnsupportedParameter(f"Unsupported parameter: '{name}'. {advice}", param=name)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is true.", param="stream_options"
        )
    if request.previous_response_id is not None and request.conversation is not None:
        raise InvalidRequest(
            "Mutually exclusive parameters: 'previous_response_id' and 'conversation'. Send one of them.",
            param="previous_response_id",
            code="mutually_exclusive_parameters",
        )
    if not request.model or len(request.model) > MAX_ID:
        raise InvalidRequest("'model' must be the name or id of an agent. GET /v1/models lists them.", param="model")
    if conversation_of(request) == "":
        raise InvalidRequest("'conversation' is empty: name a conversation, or leave it out.", param="conversation")


# What is asked -------------------------------------------------------------------------------------------------------


def _instructions(request: ResponsesRequest) -> tuple[Instructed, ...]:
    text = content.storable(request.instructions or "", "instructions")
    return (Instructed(text),) if text.strip() else ()


def _chat(request: ResponsesRequest) -> str | None:
    conversation = conversation_of(request)
    if conversation is not None:
        return f"conversation:{conversation}"
    return (request.metadata or {}).get("chat_id")


def _output(text: TextConfig | None) -> OutputSchema | None:
    wanted = text.format if text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return OutputSchema()
    if wanted.name is None:
        raise InvalidRequest(
            "Missing required parameter: 'text.format.name'.",
            param="text.format.name",
            code="missing_required_parameter",
        )
    check_name(wanted.name, "text.format.name")
    if isinstance(wanted.schema, UnsetType) or bytes(wanted.schema).strip() == b"null":
        raise InvalidRequest(
            "Missing required parameter: 'text.format.schema'.",
            param="text.format.schema",
            code="missing_required_parameter",
        )
    check_schema(wanted.schema, "text.format.schema")
    return OutputSchema(wanted.name, wanted.description or "", msgspec.Raw(bytes(wanted.schema)))


def _echoed_text(text: TextConfig | None) -> TextConfig:
    wanted = text.format if text is not None else None
    if text is None or wanted is None:
        return TextConfig(TextFormat("text"), text.verbosity if text is not None else None)
    schema = UNSET if isinstance(wanted.schema, UnsetType) else msgspec.Raw(bytes(wanted.schema))
    return TextConfig(msgspec.structs.replace(wanted, schema=schema), text.verbosity)
