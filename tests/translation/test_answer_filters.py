import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidStructuredOutput
from gateway.translation import answer_filters as module
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    StopReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.agent_turn import ClientTool, Text, UserSaid
from gateway.translation.answer_filters import (
    ANY_OBJECT,
    AnswerFilter,
    OneCall,
    ShownActivity,
    StructuredOutput,
    answer_tool,
    filters_of,
    fit,
)
from gateway.translation.ask import Ask, OutputSchema
from gateway.translation.tools import NO_PARAMETERS
from tests.translation.strategies import turns

COUNT = OutputSchema(
    "count",
    "How many.",
    msgspec.Raw(b'{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'),
)
END = Stop("end_turn")
WAITS = Stop("requires_approval")
USAGE = Usage(1, 2)


def filtered(answer_filter: AnswerFilter, *events: AgentEvent) -> list[AgentEvent]:
    """Feed an answer event by event."""
    return [out for event in events for out in answer_filter.receive([event])]


def structured(*events: AgentEvent, output: OutputSchema = COUNT) -> list[AgentEvent]:
    return filtered(StructuredOutput("answer", output), *events)


def shown(*events: AgentEvent) -> str:
    out = filtered(ShownActivity(), *events)
    assert all(isinstance(event, ReasoningDelta | TextDelta | Stop | Usage) for event in out)
    return "".join(event.text for event in out if isinstance(event, ReasoningDelta))


def assert_fails(events: list[AgentEvent]) -> None:
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert isinstance(failure.error, InvalidStructuredOutput)
    assert (failure.error.status, failure.error.code) == (502, "invalid_structured_output")
    assert failure.error.should_retry is False
    assert not any(isinstance(event, Stop | TextDelta) for event in events)


# Structured output: the call -----------------------------------------------------------------------------------------


def test_call_becomes_the_content() -> None:
    out = structured(
        ReasoningDelta("Hm"),
        ToolCallDelta("call_1", "answer", '{"n"'),
        ToolCallDelta("call_1", None, ": 7}"),
        WAITS,
        USAGE,
    )
    assert out == [ReasoningDelta("Hm"), TextDelta('{"n": 7}'), END, USAGE]


def test_words_beside_the_call_are_left_out() -> None:
    assert structured(TextDelta("Here:"), ToolCallDelta("call_1", "answer", '{"n":7}'), WAITS) == [
        TextDelta('{"n":7}'),
        END,
    ]


def test_nothing_comes_before_the_answer_is_whole() -> None:
    answer_filter = StructuredOutput("answer", COUNT)
    assert filtered(answer_filter, TextDelta("{"), ToolCallDelta("call_1", "answer", '{"n":7}')) == []


@pytest.mark.parametrize("arguments", ["", "{", "{}", '{"n":"7"}', "[]", "7", '{"n":7} and more', '{"n":NaN}'])
def test_call_whose_arguments_do_not_fit(arguments: str) -> None:
    assert_fails(structured(TextDelta('{"n":7}'), ToolCallDelta("call_1", "answer", arguments), WAITS))


def test_call_beside_others_waits_with_them() -> None:
    other = [ToolCallDelta("call_2", "f", "{"), ToolCallDelta("call_2", None, "}")]
    out = structured(TextDelta("See:"), other[0], ToolCallDelta("call_1", "answer", '{"n":7}'), other[1], WAITS, USAGE)
    assert out == [*other, TextDelta("See:"), WAITS, USAGE]


def test_other_calls_alone() -> None:
    calls: list[AgentEvent] = [ToolCallDelta("call_2", "f", "{}"), ToolCallDelta("call_3", "answers", "{}")]
    assert structured(*calls, WAITS) == [*calls, WAITS]


def test_answer_that_is_given_twice_is_never_shown_as_a_call() -> None:
    first, second = ToolCallDelta("call_1", "answer", '{"n":1}'), ToolCallDelta("call_2", "answer", '{"n":2}')
    assert structured(first, second, WAITS) == [TextDelta('{"n":1}'), END]
    broken = ToolCallDelta("call_1", "answer", '{"n":')
    assert structured(broken, second, WAITS) == [TextDelta('{"n":2}'), END]


def test_name_in_every_piece() -> None:
    pieces = [ToolCallDelta("call_1", "answer", piece) for piece in ('{"n"', ":7}")]
    assert structured(*pieces, WAITS) == [TextDelta('{"n":7}'), END]


# Structured output: words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        '{"n":7}',
        ' \n{"n":7}\n',
        '```json\n{"n":7}\n```',
        '```\n{"n":7}\n```\n',
        '```json {"n":7}```',
        '```JSON\r\n{"n":7}\r\n```',
    ],
)
@pytest.mark.parametrize("reason", ["end_turn", "tool_rule", "no_tool_call"])
def test_words_that_fit(words: str, reason: StopReason) -> None:
    pieces = [TextDelta(piece) for piece in words]
    assert structured(*pieces, Stop(reason), USAGE) == [TextDelta('{"n":7}'), END, USAGE]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "Seven.",
        '{"n":"7"}',
        "{}",
        "[]",
        "7",
        "null",
        'It is {"n":7}',
        "```",
        "``````",
        "```json\n```",
        '{"n":7',
        "\0",
    ],
)
def test_words_that_do_not_fit(words: str) -> None:
    assert_fails(structured(*[TextDelta(words)] * bool(words), END, USAGE))


@pytest.mark.parametrize("reason", ["max_steps", "max_tokens_exceeded", "refusal"])
def test_words_that_were_cut_off_or_refuse(reason: StopReason) -> None:
    assert structured(TextDelta("I can"), TextDelta("not."), Stop(reason)) == [TextDelta("I cannot."), Stop(reason)]
    assert structured(Stop(reason)) == [Stop(reason)]
    assert structured(TextDelta('{"n":7}'), Stop(reason)) == [TextDelta('{"n":7}'), Stop(reason)]


@pytest.mark.parametrize("reason", ["max_steps", "max_tokens_exceeded"])
def test_call_that_was_cut_off(reason: StopReason) -> None:
    call = ToolCallDelta("call_1", "answer", '{"n":')
    assert structured(call, Stop(reason)) == [TextDelta('{"n":'), Stop(reason)]
    whole = ToolCallDelta("call_1", "answer", '{"n":7}')
    assert structured(whole, Stop(reason)) == [TextDelta('{"n":7}'), END]


def test_any_object_where_no_schema_was_sent() -> None:
    assert structured(TextDelta('{"a":[1]}'), END, output=OutputSchema()) == [TextDelta('{"a":[1]}'), END]
    assert_fails(structured(TextDelta("[1]"), END, output=OutputSchema()))


def test_failure_of_the_turn_is_passed_on() -> None:
    failure = Failure(InvalidStructuredOutput())
    assert structured(TextDelta("Hel"), failure) == [failure]


@pytest.mark.parametrize("event", [TextDelta("x" * 60), ToolCallDelta("call_1", "answer", "x" * 60)])
def test_answer_that_is_too_long(event: AgentEvent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OUTPUT", 100)
    answer_filter = StructuredOutput("answer", COUNT)
    assert answer_filter.receive([event]) == []
    with pytest.raises(InvalidStructuredOutput) as raised:
        answer_filter.receive([event])
    assert raised.value.should_retry is False


def test_length_is_counted_over_words_and_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OUTPUT", 8)
    answer_filter = StructuredOutput("answer", COUNT)
    assert answer_filter.receive([TextDelta("a"), ToolCallDelta("call_1", "answer", '{"n":7}')]) == []
    with pytest.raises(InvalidStructuredOutput):
        answer_filter.receive([TextDelta("a")])


@pytest.mark.parametrize(
    "answer",
    [
        "{" * 100_000,
        '{"n":' * 100_000,
        '{"n":7,"m":' + "9" * 5_000 + "}",
        '{"n":7,"m":"\ud800"}',
        '{"n":1e999}',
        "`" * 99,
    ],
)
def test_answer_that_is_hard_to_read(answer: str) -> None:
    fit(answer, None)  # nothing is raised
    assert_fails(structured(TextDelta("x" + answer), END))


# The tool by which it is given ---------------------------------------------------------------------------------------


def tool(name: str) -> ClientTool:
    return ClientTool(name, "", NO_PARAMETERS)


def test_tool_of_the_answer() -> None:
    made = answer_tool(COUNT, [])
    assert (made.name, made.parameters) == ("answer", COUNT.schema)
    assert "count" in made.description
    assert made.description.endswith("The answer: How many.")
    assert answer_tool(OutputSchema(), []).parameters == ANY_OBJECT
    assert json.loads(bytes(ANY_OBJECT))["type"] == "object"


@pytest.mark.parametrize(
    ("taken", "name"),
    [
        (["f"], "answer"),
        (["answer"], "answer_1"),
        (["answer", "answer_1", "answer_3"], "answer_2"),
        (["answer_1"], "answer"),
    ],
)
def test_tool_has_a_name_of_its_own(taken: list[str], name: str) -> None:
    assert answer_tool(COUNT, [tool(other) for other in taken]).name == name


# One call ------------------------------------------------------------------------------------------------------------


def test_first_call_alone_is_let_through() -> None:
    first = [ToolCallDelta("call_1", "f", "{"), ToolCallDelta("call_1", None, "}")]
    second = [ToolCallDelta("call_2", "g", "{"), ToolCallDelta("call_2", None, "}")]
    out = filtered(OneCall(), TextDelta("Hi"), first[0], second[0], first[1], second[1], WAITS, USAGE)
    assert out == [TextDelta("Hi"), *first, WAITS, USAGE]


def test_answer_without_calls_is_let_through() -> None:
    assert filtered(OneCall(), TextDelta("Hi"), ServerToolCall("c", "f", ""), END) == [
        TextDelta("Hi"),
        ServerToolCall("c", "f", ""),
        END,
    ]


# Shown activity ------------------------------------------------------------------------------------------------------


def test_line_for_each_call_and_each_result() -> None:
    assert (
        shown(
            ReasoningDelta("Hm."),
            ServerToolCall("c", "memory", '{"a"'),
            ServerToolCall("c", None, ":1}"),
            ServerToolReturn("c", "memory", succeeded=True),
            TextDelta("Done"),
            END,
        )
        == 'Hm.\n[memory {"a":1}]\n[memory: done]\n'
    )


def test_result_that_failed_and_has_no_name() -> None:
    assert shown(ServerToolCall("c", "memory", ""), ServerToolReturn("c", None, succeeded=False), END) == (
        "\n[memory ]\n[memory: failed]\n"
    )


def test_result_of_a_call_that_was_not_told_of() -> None:
    assert shown(ServerToolReturn("c", "memory", succeeded=True)) == "[memory: done]\n"
    assert shown(ServerToolReturn("c", None, succeeded=True)) == "[tool: done]\n"


def test_two_calls_at_once() -> None:
    assert (
        shown(
            ServerToolCall("a", "f", "1"),
            ServerToolCall("b", "g", "2"),
            ServerToolCall("a", None, "3"),
            ServerToolReturn("b", None, succeeded=True),
            ServerToolReturn("a", None, succeeded=False),
        )
        == "\n[f 13]\n\n[g 2]\n[g: done]\n[f: failed]\n"
    )


def test_call_is_shown_once_and_in_short() -> None:
    pieces = [ServerToolCall("c", "f" if not n else None, "x" * 150) for n in range(9)]
    text = shown(*pieces, TextDelta("Hi"), ServerToolReturn("c", None, succeeded=True), END)
    assert text == f"\n[f {'x' * 200}...]\n[f: done]\n"


def test_call_at_the_very_end() -> None:
    out = filtered(ShownActivity(), ServerToolCall("c", "f", "{}"), END)
    assert out == [ReasoningDelta("\n[f {}]\n"), END]


def test_what_an_agent_calls_takes_one_line() -> None:
    text = shown(ServerToolCall("c", "f", '{\n  "a": 1\n}'), ServerToolReturn("c", None, succeeded=True))
    assert text == '\n[f { "a": 1 }]\n[f: done]\n'


# All of them ---------------------------------------------------------------------------------------------------------

PLAIN = Ask(model="friend", transcript=(UserSaid((Text("Hi"),)),))


def kinds(ask: Ask, answering: ClientTool | None = None, *, shows: bool = False) -> list[type]:
    return [type(made) for made in filters_of(ask, answering, shows_activity=shows)]


def test_filters_that_a_request_asks_for() -> None:
    one = msgspec.structs.replace(PLAIN, parallel_calls=False, tools=(tool("f"),))
    assert kinds(PLAIN) == []
    assert kinds(PLAIN, shows=True) == [ShownActivity]
    assert kinds(one) == [OneCall]
    assert kinds(msgspec.structs.replace(PLAIN, output=COUNT), tool("answer")) == [StructuredOutput]
    everything = msgspec.structs.replace(one, output=COUNT)
    assert kinds(everything, tool("answer"), shows=True) == [ShownActivity, StructuredOutput, OneCall]


def test_one_call_beside_the_answers_is_the_clients() -> None:
    ask = msgspec.structs.replace(PLAIN, parallel_calls=False, output=COUNT, tools=(tool("f"),))
    out: Batch = [
        ToolCallDelta("call_1", "answer", '{"n":7}'),
        ToolCallDelta("call_2", "f", "{}"),
        ToolCallDelta("call_3", "f", "{}"),
        WAITS,
    ]
    for answer_filter in filters_of(ask, tool("answer"), shows_activity=False):
        out = answer_filter.receive(out)
    assert out == [ToolCallDelta("call_2", "f", "{}"), WAITS]


MAKERS: list[Callable[[], AnswerFilter]] = [
    OneCall,
    ShownActivity,
    lambda: StructuredOutput("get_weather", OutputSchema()),
]


@pytest.mark.parametrize("make", MAKERS)
@given(batches=turns())
def test_however_the_network_cuts_it(make: Callable[[], AnswerFilter], batches: list[Batch]) -> None:
    cut, whole = make(), make()
    out: list[Any] = [event for batch in batches for event in cut.receive(batch)]
    expected: list[Any] = whole.receive([event for batch in batches for event in batch])
    assert [_plain(event) for event in out] == [_plain(event) for event in expected]
    assert sum(isinstance(event, Stop | Failure) for event in out) == 1


def _plain(event: AgentEvent) -> object:
    """Failures are compared by what they say."""
    return (type(event.error), event.error.message) if isinstance(event, Failure) else event


@given(
    arguments=st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=4),
    cuts=st.lists(st.integers(0, 99), max_size=5),
    fence=st.sampled_from(["{}", "```json\n{}\n```", "```\n{}```", " {}\n"]),
)
def test_object_comes_out_as_it_went_in(arguments: dict[str, Any], cuts: list[int], fence: str) -> None:
    answer = fence.replace("{}", json.dumps(arguments))
    edges = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [TextDelta(answer[start:end]) for start, end in pairwise(edges)]
    text, end = structured(*pieces, END, output=OutputSchema())
    assert isinstance(text, TextDelta)
    assert json.loads(text.text) == arguments
    assert end == END
