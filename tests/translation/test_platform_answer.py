import pytest

from gateway.errors import TurnFailed, UpstreamInvalid, UpstreamTruncated
from gateway.translation import platform_answer
from gateway.translation.agent_events import (
    AgentEvent,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.platform_answer import MAX_NAME, PlatformAnswer, Said, Told
from gateway.translation.platform_types import ToolActivity

STOP = Stop("end_turn")


def told(answer: PlatformAnswer, *events: AgentEvent) -> list[Told | None]:
    return [answer.take(event) for event in events]


def said(*events: AgentEvent) -> Said:
    answer = PlatformAnswer()
    answer.receive(list(events))
    return answer.said()


def test_what_was_said_is_gathered() -> None:
    heard = said(
        ReasoningDelta("Hm"),
        ReasoningDelta("."),
        TextDelta("Hel"),
        ServerToolCall("call-1", "memory_insert", '{"a":'),
        ServerToolCall("call-1", None, "1}"),
        ServerToolReturn("call-1", None, succeeded=True),
        TextDelta("lo"),
        STOP,
    )
    assert heard == Said("Hello", "Hm.", (ToolActivity("call-1", "memory_insert", "done"),))


def test_tool_is_told_when_it_is_called_and_when_it_is_done() -> None:
    answer = PlatformAnswer()
    assert told(
        answer,
        ServerToolCall("call-1", "search", ""),
        ServerToolCall("call-1", None, '{"secret": 1}'),
        ServerToolReturn("call-1", "search", succeeded=False),
        ServerToolReturn("call-1", "search", succeeded=True),
    ) == [
        ToolActivity("call-1", "search", "running"),
        None,
        ToolActivity("call-1", "search", "failed"),
        None,
    ]
    assert answer.said().activity == (ToolActivity("call-1", "search", "failed"),)


def test_tool_whose_name_comes_late_is_told_with_it() -> None:
    answer = PlatformAnswer()
    assert told(
        answer,
        ServerToolCall("call-1", None, ""),
        ServerToolCall("call-1", "search", ""),
        ServerToolReturn("x", "y", succeeded=True),
    ) == [None, ToolActivity("call-1", "search", "running"), ToolActivity("x", "y", "done")]


@pytest.mark.parametrize(("ends", "status"), [((STOP,), "done"), ((), "failed")])
def test_tool_whose_end_is_not_told(ends: tuple[AgentEvent, ...], status: str) -> None:
    heard = said(ServerToolCall("call-1", "search", ""), *ends)
    assert [call.status for call in heard.activity] == [status]


def test_calls_of_a_clients_tools_are_nobodys_here() -> None:
    assert said(ToolCallDelta("call-1", "f", "{}"), STOP) == Said("", "", ())


def test_steps_add_up() -> None:
    answer = PlatformAnswer()
    answer.receive([Usage(1, 2), STOP, Usage(3, 4, 1, 1)])
    assert answer.usage == Usage(4, 6, 1, 1)


def test_text_is_told_as_it_is_kept() -> None:
    answer = PlatformAnswer()
    assert told(answer, TextDelta("a\0b"), ReasoningDelta("\ud83d!"), TextDelta("")) == [
        TextDelta("a\ufffdb"),
        ReasoningDelta("\ufffd!"),
        None,
    ]
    assert answer.said() == Said("a\ufffdb", "\ufffd!", ())


def test_answer_without_its_end_is_none() -> None:
    answer = PlatformAnswer()
    answer.receive([TextDelta("Hel")])
    with pytest.raises(UpstreamTruncated) as caught:
        answer.answer()
    assert caught.value.should_retry is False
    answer.receive([STOP])
    assert answer.answer() == b""


def test_failure_of_the_turn_is_raised_with_what_was_said_kept() -> None:
    answer = PlatformAnswer()
    with pytest.raises(TurnFailed):
        answer.receive([TextDelta("Hel"), Failure(TurnFailed()), TextDelta("lo")])
    assert answer.said().text == "Hel"


def test_answer_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_answer, "MAX_ANSWER", 10)
    answer = PlatformAnswer()
    with pytest.raises(UpstreamInvalid) as caught:
        answer.receive([TextDelta("123456"), ReasoningDelta("1234"), TextDelta("7")])
    assert (caught.value.code, caught.value.should_retry) == ("upstream_answer_too_long", False)
    assert answer.said() == Said("123456", "1234", ())


@pytest.mark.parametrize("kind", ["call", "return"])
def test_tools_without_end(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(platform_answer, "MAX_CALLS", 2)
    answer = PlatformAnswer()
    for number in range(3):
        call_id = f"call-{number}"
        answer.take(
            ServerToolCall(call_id, "f", "") if kind == "call" else ServerToolReturn(call_id, "f", succeeded=True)
        )
    assert answer.error is not None
    assert len(answer.said().activity) == 2


def test_names_are_bounded() -> None:
    (call,) = said(ServerToolCall("i" * 10_000, "n" * 10_000, "")).activity
    assert (len(call.id), len(call.name)) == (MAX_NAME, MAX_NAME)
