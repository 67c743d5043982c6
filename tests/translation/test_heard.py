from hypothesis import given

from gateway.errors import TurnFailed
from gateway.translation.agent_events import (
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.agent_turn import AgentSaid, Call
from gateway.translation.heard import Heard, length_of
from tests.translation.strategies import turns


def heard(*batches: Batch) -> Heard:
    made = Heard()
    for batch in batches:
        made.receive(batch)
    return made


def test_length_is_what_a_model_wrote() -> None:
    batch: Batch = [
        TextDelta("four"),
        ReasoningDelta("and six"),
        ToolCallDelta("c-1", "look", "{}"),
        ServerToolReturn("c-2", "look", succeeded=True),
        Usage(5, 5),
        Stop("end_turn"),
    ]
    assert length_of(batch) == 4 + 7 + 2
    assert length_of([]) == 0


def test_nothing_yet() -> None:
    assert (heard().said, heard().calls, heard().stop) == (AgentSaid(""), (), None)


def test_text_in_pieces_and_why_it_ended() -> None:
    made = heard([TextDelta("Hel"), TextDelta("lo")], [], [TextDelta("!"), Stop("end_turn")], [Usage(1, 2)])
    assert (made.said, made.stop) == (AgentSaid("Hello!"), "end_turn")


def test_calls_in_pieces_that_are_mixed() -> None:
    made = heard(
        [TextDelta("Let me see."), ToolCallDelta("call_b", "g", ""), ToolCallDelta("call_a", "f", '{"x"')],
        [ToolCallDelta("call_b", None, "{"), ToolCallDelta("call_a", None, ": 1}"), ToolCallDelta("call_b", None, "}")],
        [Stop("requires_approval")],
    )
    calls = (Call("call_b", "g", "{}"), Call("call_a", "f", '{"x": 1}'))
    assert (made.calls, made.said, made.stop) == (calls, AgentSaid("Let me see.", calls), "requires_approval")


def test_name_that_comes_late_or_twice() -> None:
    made = heard([ToolCallDelta("call_a", None, "{"), ToolCallDelta("call_a", "f", "}")])
    assert made.calls == (Call("call_a", "f", "{}"),)
    made = heard([ToolCallDelta("call_a", "f", "{"), ToolCallDelta("call_a", "f", "}")])
    assert made.calls == (Call("call_a", "f", "{}"),)


def test_what_the_client_does_not_send_back_is_not_kept() -> None:
    made = heard(
        [ReasoningDelta("Hm"), ServerToolCall("c", "memory", "{}"), ServerToolReturn("c", None, succeeded=True)]
    )
    assert made.said == AgentSaid("")


def test_answer_that_failed_or_was_cut_off_has_no_stop() -> None:
    assert heard([TextDelta("Hel")]).stop is None
    assert heard([TextDelta("Hel"), Failure(TurnFailed())]).stop is None


@given(batches=turns())
def test_however_the_network_cuts_it(batches: list[Batch]) -> None:
    together = heard([event for batch in batches for event in batch])
    assert heard(*batches).said == together.said
    assert heard(*batches).stop == together.stop is not None
