from typing import Any

import msgspec
import pytest

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import (
    AgentSaid,
    Call,
    ImageData,
    ImageUrl,
    Instructed,
    Said,
    Text,
    ToolResult,
    UserSaid,
)
from gateway.translation.ask import GO_ON
from gateway.translation.content import LEFT_OUT
from gateway.translation.responses_items import items_by_id, merged, read_items, transcript

HI = {"role": "user", "content": "Hi"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def said(*items: Any, known: bytes = b"[]") -> tuple[Said, ...]:
    raws = [msgspec.Raw(msgspec.json.encode(item)) for item in items]
    return transcript(read_items(raws), items_by_id(known))


def refused(*items: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        said(*items)
    return raised.value


def user(text: str) -> UserSaid:
    return UserSaid((Text(text),))


def call(call_id: str, name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}", **more}


def output(call_id: str, result: Any = "ok") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": result}


def part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text}


def message(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": list(parts)}


# Messages ------------------------------------------------------------------------------------------------------------


def test_message_with_or_without_a_type() -> None:
    assert said(HI) == said({"type": "message", **HI}) == said({"type": None, **HI}) == (user("Hi"),)


def test_text_and_images_of_the_user() -> None:
    item = message(
        "user",
        part("input_text", "What is this?"),
        part("input_text", " "),
        {"type": "input_image", "image_url": PIXEL, "detail": "auto"},
        {"type": "input_image", "image_url": "https://example.com/a.png", "file_id": None},
    )
    parts = (Text("What is this?"), ImageData("image/png", "iVBORw0KGgo="), ImageUrl("https://example.com/a.png"))
    assert said(item) == (UserSaid(parts),)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions(role: str) -> None:
    item = message(role, part("input_text", "Be kind."), part("input_text", "Be brief."))
    assert said(item, {"role": role, "content": " "}, HI) == (Instructed("Be kind.\n\nBe brief."), user("Hi"))


def test_agents_texts_and_calls_are_one_message() -> None:
    transcript = said(
        HI,
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        message("assistant", part("output_text", "Let me see."), {"type": "refusal", "refusal": "Or not."}),
        call("a"),
        call("b", "find", namespace="crm"),
        output("a"),
        output("b"),
    )
    assert transcript == (
        user("Hi"),
        AgentSaid("Let me see.\n\nOr not.", (Call("a", "f", "{}"), Call("b", "crm__find", "{}"))),
        ToolResult("a", "ok"),
        ToolResult("b", "ok"),
    )


def test_calls_of_two_rounds_are_two_messages() -> None:
    assert said(HI, call("a"), output("a"), call("b"), output("b"))[1:] == (
        AgentSaid("", (Call("a", "f", "{}"),)),
        ToolResult("a", "ok"),
        AgentSaid("", (Call("b", "f", "{}"),)),
        ToolResult("b", "ok"),
    )


def test_output_in_parts_says_what_is_missing() -> None:
    parts = [part("input_text", "Here:"), {"type": "input_image", "image_url": PIXEL}, {"type": "input_file"}]
    assert said(HI, call("a"), output("a", parts))[-1] == ToolResult("a", f"Here:\n\n{LEFT_OUT}\n\n{LEFT_OUT}")


def test_calls_of_other_kinds_are_the_agents_speech() -> None:
    custom = {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "*** Begin"}
    shell = {"type": "local_shell_call", "call_id": "b", "action": {"type": "exec"}, "status": "completed"}
    assert said(
        HI,
        custom,
        {"type": "custom_tool_call_output", "call_id": "a", "output": "Done!"},
        shell,
        {"type": "local_shell_call_output", "id": "b", "output": "ls: ok"},
    ) == (
        user("Hi"),
        AgentSaid("", (Call("a", "apply_patch", "*** Begin"),)),
        ToolResult("a", "Done!"),
        AgentSaid("", (Call("b", "local_shell", '{"type":"exec"}'),)),
        ToolResult("b", "ls: ok"),
    )


def test_what_machines_wrote_is_never_refused() -> None:
    texts = said(HI, message("assistant", part("output_text", "a\0b")), call("a", arguments="\0"), output("a", "\0c"))
    assert texts[1:] == (AgentSaid("a\ufffdb", (Call("a", "f", "\ufffd"),)), ToolResult("a", "\ufffdc"))


def test_empty_output_is_a_result() -> None:
    assert said(HI, call("a"), output("a", [part("input_text", "")]))[-1] == ToolResult("a", "")


def test_user_may_speak_behind_the_outputs() -> None:
    assert said(HI, call("a"), output("a"), {"role": "user", "content": "And?"})[-1] == user("And?")


def test_blank_messages_of_the_past_are_left_out() -> None:
    past = [{"role": "user", "content": " "}, message("user"), message("assistant", part("output_text", "\n"))]
    assert said(*past, HI) == (user("Hi"),)


@pytest.mark.parametrize(
    "other",
    [
        {"type": "reasoning", "id": 3, "summary": None},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "mcp_call", "id": "mcp_1", "name": "f"},
        {"type": "of_next_year", "role": "user"},
    ],
)
def test_items_that_say_nothing_to_an_agent_are_ignored(other: dict[str, Any]) -> None:
    assert said(other, HI, other) == (user("Hi"),)


# References ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [{"type": "item_reference", "id": "fc_1_0"}, {"id": "fc_1_0"}])
def test_reference_to_a_stored_item(reference: dict[str, Any]) -> None:
    known = msgspec.json.encode([{"type": "reasoning", "id": "rs_1_1"}, {**call("a"), "id": "fc_1_0"}])
    reasoning = {"type": "item_reference", "id": "rs_1_1"}
    assert said(HI, reasoning, reference, output("a"), known=known) == said(HI, call("a"), output("a"))


def test_reference_to_an_unknown_item() -> None:
    error = refused(HI, {"type": "item_reference", "id": "msg_9_0"}, HI)
    assert error.param == "input[1].id"
    assert error.message.startswith("Item with id 'msg_9_0' not found.")


def test_reference_is_never_followed_twice() -> None:
    known = items_by_id(b'[{"type":"item_reference","id":"msg_1_0"}]')
    raws = [msgspec.Raw(b'{"type":"item_reference","id":"msg_1_0"}')]
    with pytest.raises(InvalidRequest, match="not found"):
        transcript(read_items(raws), known)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_answer_that_is_to_be_continued() -> None:
    _, answer, more = said(HI, message("assistant", part("output_text", "Hi.")))
    assert (answer, more) == (AgentSaid("Hi."), GO_ON)
    assert more is GO_ON


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        ([3], "input[0]"),
        ([{}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "user", "content": None}], "input[0].content"),
        ([{"role": "king", "content": "Hi"}], "input[0].role"),
        ([{"type": 3}], "input[0].type"),
        ([{"type": "item_reference"}], "input[0].id"),
        ([{"role": "user", "content": ""}], "input[0].content"),
        ([{"role": "user", "content": "\0a"}], "input[0].content"),
        ([message("user")], "input[0].content"),
        ([HI, message("user", part("input_text", " "))], "input[1].content"),
        ([message("user", part("input_text", "a"), part("input_text", "\0a"))], "input[0].content[1].text"),
        ([message("user", {"type": "input_text"})], "input[0].content[0].text"),
        ([message("user", {"type": "video"})], "input[0].content[0].type"),
        ([message("user", {"type": "input_image", "image_url": "http://a"})], "input[0].content[0].image_url"),
        ([message("user", {"type": "input_image", "file_id": "file_1"})], "input[0].content[0]"),
        ([message("user", {"type": "input_file", "file_id": "file_1"})], "input[0].content[0]"),
        ([message("system", {"type": "input_image", "image_url": PIXEL}), HI], "input[0].content[0]"),
        ([message("assistant", part("output_text", "Hi."))], "input[0]"),
        ([HI, message("assistant", part("output_text", "Hi.")), call("a")], "input[2]"),
        ([HI, call("a")], "input[1]"),
        ([message("developer", part("input_text", "Be kind."))], "input[0]"),
        ([call(""), output("a")], "input[0].call_id"),
        ([call("a"), output("a" * 513)], "input[1].call_id"),
        ([{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}, HI], "input[0].arguments"),
        ([call("a"), {"type": "function_call_output", "call_id": "a"}], "input[1].output"),
        ([call("a"), output("a", 3)], "input[1].output"),
    ],
)
def test_fault_is_named(items: list[Any], param: str) -> None:
    with pytest.raises((InvalidRequest, UnsupportedParameter)) as raised:
        said(*items)
    assert raised.value.param == param
    assert f"'{param}" in raised.value.message or "'input'" in raised.value.message


def test_too_many_items() -> None:
    with pytest.raises(InvalidRequest, match="more than 10000 items"):
        read_items([msgspec.Raw(b"{}")] * 10_001)


def test_merging_keeps_the_order_of_everybody_else() -> None:
    spoken: tuple[Said, ...] = (AgentSaid("a"), AgentSaid(""), AgentSaid("b"), user("c"), AgentSaid(" "), user("d"))
    assert merged(spoken) == (AgentSaid("ab"), user("c"), user("d"))
