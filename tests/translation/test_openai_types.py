"""The types against OpenAI's own: what the gateway answers, the official SDK reads; what the SDK may send, is known."""

import typing

import msgspec
import pytest
from openai.types import Model as SdkModel
from openai.types.chat import ChatCompletion as SdkCompletion
from openai.types.chat import ChatCompletionChunk as SdkChunk
from openai.types.chat import ChatCompletionMessageParam, completion_create_params

from gateway.translation import openai_types as ours
from gateway.translation.openai_types import ChatCompletionRequest

USAGE = ours.CompletionUsage(1, 2, 3, ours.PromptTokensDetails(1), ours.CompletionTokensDetails(2))


def test_chunk_is_one_of_the_sdks() -> None:
    fragment = ours.ToolCallFragment(0, "call_a", ours.FunctionFragment("f", "{}"), "function")
    delta = ours.Delta("assistant", "Hi", "Hm", "Hm", [fragment])
    choice = ours.ChunkChoice(0, delta, None, "tool_calls")
    chunk = ours.ChatCompletionChunk("chatcmpl-1", "chat.completion.chunk", 1, "friend", [choice], USAGE)
    read = SdkChunk.model_validate_json(msgspec.json.encode(chunk), strict=True)
    assert read.choices[0].delta.tool_calls is not None
    assert read.model_dump(exclude_unset=True, mode="json") == msgspec.to_builtins(chunk)


def test_completion_is_one_of_the_sdks() -> None:
    call = ours.ToolCall("call_a", "function", ours.FunctionCall("f", "{}"))
    message = ours.AnswerMessage("assistant", None, None, "Hm", "Hm", [call])
    answer = ours.ChatCompletion(
        "chatcmpl-1", "chat.completion", 1, "friend", [ours.Choice(0, message, None, "stop")], USAGE
    )
    read = SdkCompletion.model_validate_json(msgspec.json.encode(answer), strict=True)
    assert read.model_dump(exclude_unset=True, mode="json") == msgspec.to_builtins(answer)


def test_models_are_the_sdks() -> None:
    listed = ours.ModelList("list", [ours.Model("friend", "model", 1, "letta")])
    assert SdkModel.model_validate(msgspec.to_builtins(listed)["data"][0], strict=True).owned_by == "letta"


@pytest.mark.parametrize("kind", [ours.Delta, ours.FunctionFragment, ours.ToolCallFragment])
def test_what_a_delta_does_not_say_is_left_out(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.omit_defaults


def test_every_parameter_of_openais_api_is_known() -> None:
    theirs = set(typing.get_type_hints(completion_create_params.CompletionCreateParamsStreaming))
    unknown = theirs - set(ChatCompletionRequest.__struct_fields__) - IGNORED_AS_UNKNOWN
    assert not unknown, "new in OpenAI's API: give each a rule in ChatCompletionRequest"


IGNORED_AS_UNKNOWN = {"moderation", "prompt_cache_options", "prompt_cache_retention"}
"""Parameters that a provider's cache or policy reads: an agent answers the same with and without them."""


def test_every_role_of_openais_api_is_known() -> None:
    theirs = {
        role
        for kind in typing.get_args(ChatCompletionMessageParam)
        for role in typing.get_args(typing.get_args(typing.get_type_hints(kind, include_extras=True)["role"])[0])
    }
    assert theirs == {kind.__struct_config__.tag for kind in typing.get_args(ours.Message)}


def test_unknown_fields_are_ignored() -> None:
    body = b'{"model":"friend","messages":[{"role":"user","content":"Hi","x":1}],"chat_id":"7","y":{"z":[1]}}'
    assert msgspec.json.decode(body, type=ChatCompletionRequest).model == "friend"


def test_every_optional_field_takes_null() -> None:
    optional = set(ChatCompletionRequest.__struct_fields__) - {"model", "messages"}
    body: dict[str, object] = {"model": "friend", "messages": [], **dict.fromkeys(optional)}
    decoded = msgspec.json.decode(msgspec.json.encode(body), type=ChatCompletionRequest)
    assert decoded.model == "friend"
