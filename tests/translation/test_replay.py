import pytest

from gateway.translation.agent_turn import AgentSaid, Call, ImageUrl, Instructed, Said, Text, ToolResult, UserSaid
from gateway.translation.replay import as_messages, as_text, result_in_words

PICTURE = ImageUrl("https://example.com/a.png")


def user(text: str) -> UserSaid:
    return UserSaid((Text(text),))


def test_messages_keep_their_roles_and_images() -> None:
    history: tuple[Said, ...] = (Instructed("Be kind."), UserSaid((Text("Look"), PICTURE)), AgentSaid("A cat."))
    assert as_messages(history) == history


def test_calls_and_results_become_words() -> None:
    history: tuple[Said, ...] = (
        user("What is the weather?"),
        AgentSaid("I look.", (Call("call_1", "weather", '{"city": "Paris"}'), Call("call_2", "time", "{}"))),
        ToolResult("call_1", "sunny"),
        ToolResult("call_2", "no clock", succeeded=False),
        AgentSaid("", (Call("call_3", "time", "{}"),)),
        ToolResult("call_9", ""),
    )
    assert as_messages(history) == (
        user("What is the weather?"),
        AgentSaid('I look.\n(Called the tool weather with {"city": "Paris"})\n(Called the tool time with {})'),
        user("Result of the tool weather: sunny"),
        user("Error of the tool time: no clock"),
        AgentSaid("(Called the tool time with {})"),
        user("Result of the tool call call_9: "),
    )


@pytest.mark.parametrize("empty", [AgentSaid(""), Instructed(""), UserSaid(())])
def test_messages_without_content_are_left_out(empty: Said) -> None:
    assert as_messages((empty, user("Hi"), empty)) == (user("Hi"),)
    assert as_text((empty,)) == ""


def test_one_text() -> None:
    history: tuple[Said, ...] = (
        Instructed("Be kind."),
        UserSaid((Text("Look"), PICTURE)),
        AgentSaid("A cat.", (Call("call_1", "weather", "{}"),)),
        ToolResult("call_1", "sunny"),
    )
    assert as_text(history) == (
        "<system>\nBe kind.\n</system>\n"
        "<user>\nLook\n(an image)\n</user>\n"
        "<assistant>\nA cat.\n(Called the tool weather with {})\n</assistant>\n"
        "<user>\nResult of the tool weather: sunny\n</user>"
    )


def test_nothing_said() -> None:
    assert as_messages(()) == ()
    assert as_text(()) == ""


def test_result_of_a_call_whose_tool_is_not_known() -> None:
    assert result_in_words(ToolResult("call_1", "sunny")) == "Result of the tool call call_1: sunny"
