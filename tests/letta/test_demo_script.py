from collections.abc import Mapping, Sequence

import msgspec
import pytest

from gateway.letta.demo_script import (
    Arguments,
    BreakOff,
    Call,
    ChatRequest,
    Fail,
    Finish,
    Pause,
    Say,
    Schema,
    Steps,
    Think,
    example,
    play,
    usage,
)

WEATHER: Mapping[str, object] = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SEND_MESSAGE: Mapping[str, object] = {
    "name": "send_message",
    "parameters": {
        "type": "object",
        "properties": {"thinking": {"type": "string"}, "message": {"type": "string"}},
        "required": ["thinking", "message"],
    },
}


def chat(*messages: Mapping[str, object], tools: Sequence[Mapping[str, object]] = ()) -> ChatRequest:
    offered = [{"type": "function", "function": tool} for tool in tools]
    return msgspec.convert({"model": "demo", "messages": messages, "tools": offered}, ChatRequest)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def asked(text: str, *tools: Mapping[str, object]) -> Steps:
    return play(chat(user(text), tools=tools))


def said(steps: Steps) -> str:
    return "".join(step.text for step in steps if isinstance(step, Say))


def arguments(steps: Steps, index: int = 0) -> str:
    return "".join(step.text for step in steps if isinstance(step, Arguments) and step.index == index)


def test_any_message_is_said_back_word_by_word() -> None:
    assert asked("Hello  there") == [Say("You"), Say(" said:"), Say(" Hello"), Say("  there"), Finish("stop")]


def test_the_newest_user_message_counts() -> None:
    history = (user("old"), {"role": "assistant", "content": "yes"}, user("first"), user("second"))
    assert said(play(chat(*history))) == "You said: second"


@pytest.mark.parametrize(
    "content",
    [
        '{"type": "user_message", "message": "hi", "time": "now"}',
        [{"type": "text", "text": "<system-reminder>It is late.</system-reminder>"}, {"type": "text", "text": "hi"}],
    ],
)
def test_what_letta_wraps_around_a_message_is_taken_off(content: object) -> None:
    assert said(play(chat(user(content)))) == "You said: hi"


def test_json_of_the_user_is_left_alone() -> None:
    assert said(asked('{"a": 1}')) == 'You said: {"a": 1}'


def test_a_heartbeat_is_no_user_message() -> None:
    heartbeat = user('{"type": "heartbeat", "message": "go on"}')
    assert said(play(chat(user("hi"), heartbeat))) == "You said: hi"


def test_counting_pauses_between_words() -> None:
    assert asked("count to 2 every 300 ms") == [Say("word0"), Pause(0.3), Say(" word1"), Finish("stop")]


def test_thinking_comes_before_the_answer() -> None:
    steps = asked("think hard")
    assert "".join(step.text for step in steps if isinstance(step, Think)) == "I have to think hard"
    assert said(steps) == "You said: think hard"
    assert [type(step) for step in steps] == [Think] * 5 + [Say] * 4 + [Finish]


def test_thinking_before_another_script() -> None:
    steps = asked("think and be cut off")
    assert isinstance(steps[0], Think)
    assert steps[-1] == Finish("length")


def test_calling_an_offered_tool() -> None:
    steps = asked("call get_weather now", WEATHER)
    assert steps[0] == Call(0, "get_weather")
    assert arguments(steps) == '{"city": "Paris"}'
    assert sum(isinstance(step, Arguments) for step in steps) > 1
    assert steps[-1] == Finish("tool_calls")


def test_calling_with_given_arguments_after_some_words() -> None:
    steps = asked('Let me see: call get_weather with {"city": "Rome"}', WEATHER)
    assert said(steps) == "Let me see:"
    assert arguments(steps) == '{"city": "Rome"}'


def test_calling_two_tools_at_once() -> None:
    steps = asked("call get_weather and get_time now", WEATHER, {"name": "get_time"})
    assert [step for step in steps if isinstance(step, Call)] == [Call(0, "get_weather"), Call(1, "get_time")]
    assert arguments(steps, 1) == "{}"


def test_a_tool_that_is_not_offered_is_not_called() -> None:
    assert said(asked("call get_time now", WEATHER)) == "There is no tool get_time."


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("sunny", "Tool said: sunny"),
        ('{"status": "OK", "message": "sunny", "time": "now"}', "Tool said: sunny"),
        ('{"status": "OK", "message": {"sky": "blue"}}', 'Tool said: {"sky": "blue"}'),
    ],
)
def test_a_tool_result_is_answered(content: str, answer: str) -> None:
    history = (user("call a now"), {"role": "assistant", "content": None}, {"role": "tool", "content": content})
    assert said(play(chat(*history))) == answer


def test_a_new_question_supersedes_a_tool_result() -> None:
    history = (user("call a now"), {"role": "tool", "content": "late"}, user("never mind"))
    assert said(play(chat(*history))) == "You said: never mind"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("refuse", [Finish("content_filter")]),
        ("be cut off", [Finish("length")]),
        ("say nothing", [Finish("stop")]),
        ("fail with 429", [Fail(429)]),
        ("hang", [Pause(3600), Finish("stop")]),
        ("hang after 1 word", [Say("word0"), Pause(3600), Finish("stop")]),
        ("break off after 1 word", [Say("word0"), BreakOff(), Finish("stop")]),
    ],
)
def test_ends(text: str, end: Steps) -> None:
    steps = asked(text)
    assert steps[-len(end) :] == end


def test_a_script_may_stand_below_other_lines() -> None:
    assert asked("You are terse.\nfail with 500") == [Fail(500)]


def test_images_are_counted_and_named() -> None:
    parts = [
        {"type": "text", "text": "describe image"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}},
    ]
    assert said(play(chat(user(parts)))) == "I see 2 images: image/png, a link"


def test_a_legacy_agent_speaks_by_a_tool() -> None:
    steps = asked('say "hi"', SEND_MESSAGE)
    assert steps[0] == Call(0, "send_message")
    assert msgspec.json.decode(arguments(steps)) == {"thinking": "I answer.", "message": 'You said: say "hi"'}
    assert steps[-1] == Finish("tool_calls")
    assert asked("fail with 500", SEND_MESSAGE) == [Fail(500)]
    assert msgspec.json.decode(arguments(asked("think of it", SEND_MESSAGE)))["thinking"] == "I have to think of it"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"enum": [7, 8]}, 7),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 1),
        ({"type": ["number", "null"]}, 1.5),
        ({"type": "array"}, []),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"type": "string"}},
                "required": ["a"],
            },
            {"a": True},
        ),
    ],
)
def test_examples_obey_their_schema(schema: object, value: object) -> None:
    assert msgspec.json.decode(example(msgspec.json.decode(msgspec.json.encode(schema), type=Schema))) == value


def test_usage_counts_words_and_knows_what_was_cached() -> None:
    request = chat(user("one two"), {"role": "assistant", "content": "three"}, user("think of it"))
    steps = play(request)
    used = usage(request, steps)
    assert (used.prompt_tokens, used.prompt_tokens_details.cached_tokens) == (6, 2)
    assert used.completion_tokens == len(steps) - 1
    assert used.completion_tokens_details.reasoning_tokens == 6
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens


# The aside -----------------------------------------------------------------------------------------------------------

ASIDE = "(Only a script.)"


@pytest.mark.parametrize("text", ["Hello there", "think hard"])
def test_aside_follows_what_is_only_repeated(text: str) -> None:
    steps = play(chat(user(text)), ASIDE)
    assert said(steps) == f"You said: {text}\n\n{ASIDE}"
    assert steps[-1] == Finish("stop")
    assert [step for step in steps if isinstance(step, Finish)] == [steps[-1]]


@pytest.mark.parametrize("text", ["count to 3", "refuse", "fail with 500", "call get_weather now", "say nothing"])
def test_aside_does_not_follow_a_script(text: str) -> None:
    request = chat(user(text), tools=[WEATHER])
    assert play(request, ASIDE) == play(request)


def test_aside_does_not_follow_a_tools_result() -> None:
    request = chat(user("call a now"), {"role": "tool", "content": "sunny"})
    assert said(play(request, ASIDE)) == "Tool said: sunny"


def test_legacy_agent_says_the_aside_by_its_tool() -> None:
    steps = play(chat(user("Hi"), tools=[SEND_MESSAGE]), ASIDE)
    assert msgspec.json.decode(arguments(steps))["message"] == f"You said: Hi\n\n{ASIDE}"
