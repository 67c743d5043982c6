import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import TurnFailed, UpstreamInvalid, UpstreamTruncated
from gateway.translation import responses_answer
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
from gateway.translation.agent_turn import AgentSaid, Call, UserSaid
from gateway.translation.heard import Heard
from gateway.translation.responses_answer import MAX_ITEMS, ResponseAnswer, item_id, response_of
from gateway.translation.responses_items import items_by_id, read_items, transcript
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_types import Echo
from tests.translation import strategies

FAILED = TurnFailed(should_retry=False)


def new_answer(*, tool_activity: bool = True) -> ResponseAnswer:
    return ResponseAnswer(
        response_id="resp_1",
        created=1_700_000_000,
        echo=Echo(model="friend"),
        tool_activity=tool_activity,
        namespaced={"crm__find": FunctionName("crm", "find")},
    )


def test_item_tells_whose_it_is() -> None:
    assert item_id("message", "resp_0a", 3) == "msg_0a_3"
    assert response_of("msg_0a_3") == response_of("mcp_0a_12") == "resp_0a"


@pytest.mark.parametrize("other", ["", "msg_0a", "msg_0a_", "resp_0a_1", "fco_0a_1", "msg_0a_x"])
def test_item_of_somebody_else(other: str) -> None:
    assert response_of(other) is None


def test_whole_answer() -> None:
    answer = new_answer()
    answer.receive([ReasoningDelta("Hm"), TextDelta("Hel"), TextDelta("lo"), Usage(5, 2)])
    answer.receive([Usage(1, 1), Stop("end_turn")])
    whole = json.loads(answer.answer())
    assert (whole["id"], whole["status"], whole["created_at"]) == ("resp_1", "completed", 1_700_000_000)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert whole["usage"]["total_tokens"] == 9


def test_text_after_a_pause_is_another_message() -> None:
    answer = new_answer()
    answer.receive([TextDelta("Let me see."), ReasoningDelta("Hm"), TextDelta("Done."), Stop("end_turn")])
    assert [item["type"] for item in json.loads(answer.output_items())] == ["message", "reasoning", "message"]
    assert answer.output() == (AgentSaid("Let me see.Done."),)


def test_same_call_again_after_its_return_is_another_item() -> None:
    answer = new_answer()
    once: Batch = [ServerToolCall("a", "f", "{}"), ServerToolReturn("a", "f", succeeded=True)]
    answer.receive([*once, *once, ServerToolReturn("b", None, succeeded=True), Stop("end_turn")])
    assert [item["id"] for item in json.loads(answer.output_items())] == ["mcp_1_0", "mcp_1_1"]


def test_name_that_comes_late() -> None:
    answer = new_answer()
    answer.receive([ToolCallDelta("a", None, "{"), ToolCallDelta("a", "f", "}"), Stop("requires_approval")])
    assert answer.output() == (AgentSaid("", (Call("a", "f", "{}"),)),)


def test_truncated_answer_is_an_error() -> None:
    answer = new_answer()
    answer.receive([TextDelta("Hel")])
    with pytest.raises(UpstreamTruncated) as raised:
        answer.answer()
    assert raised.value.should_retry is False


def test_failure_is_raised_where_it_comes() -> None:
    answer = new_answer()
    with pytest.raises(TurnFailed) as raised:
        answer.receive([TextDelta("Hel"), Failure(FAILED), TextDelta("lo")])
    assert raised.value is FAILED
    whole = json.loads(answer.answer())
    assert whole["status"] == "failed"
    assert whole["output"][0]["content"][0]["text"] == "Hel"


def test_too_many_items() -> None:
    answer = new_answer()
    answer.receive([ToolCallDelta(f"call_{index}", "f", "") for index in range(MAX_ITEMS)])
    with pytest.raises(UpstreamInvalid) as raised:
        answer.receive([TextDelta("a")])
    assert raised.value.code == "upstream_answer_too_long"


@pytest.mark.parametrize("fits", [True, False])
def test_all_that_is_gathered_counts(monkeypatch: pytest.MonkeyPatch, *, fits: bool) -> None:
    monkeypatch.setattr(responses_answer, "MAX_ANSWER", 12 if fits else 11)
    answer = new_answer()
    batch: Batch = [
        ReasoningDelta("123"),
        TextDelta("456"),
        ToolCallDelta("a", "f", "78"),
        ServerToolCall("b", "g", "9"),
        ToolCallDelta("a", None, "0"),
        TextDelta("12"),
    ]
    if fits:
        answer.receive(batch)
        assert answer.room == 0
    else:
        with pytest.raises(UpstreamInvalid):
            answer.receive(batch)


@given(batches=strategies.turns(), tool_activity=st.booleans(), by_reference=st.booleans())
def test_what_the_client_sends_back_reads_as_what_was_said(
    *, batches: list[Batch], tool_activity: bool, by_reference: bool
) -> None:
    answer = new_answer(tool_activity=tool_activity)
    for batch in batches:
        answer.receive(
            [event for event in batch if "\0" not in getattr(event, "text", getattr(event, "arguments", ""))]
        )
    stored = answer.output_items()
    items = msgspec.json.decode(stored, type=list[msgspec.Raw])
    if by_reference:
        ids = [item["id"] for item in json.loads(stored)]
        assert {response_of(one) for one in ids} <= {"resp_1"}
        items = [msgspec.Raw(msgspec.json.encode({"type": "item_reference", "id": one})) for one in ids]
    more = [msgspec.Raw(b'{"role":"user","content":"Go on."}')]
    *said, last = transcript(read_items(items + more), items_by_id(stored))
    assert isinstance(last, UserSaid)
    assert tuple(said) == answer.output()


@given(batches=strategies.turns())
def test_output_is_what_was_heard(batches: list[Batch]) -> None:
    answer, heard = new_answer(), Heard()
    for batch in batches:
        answer.receive(batch)
        heard.receive(batch)
    (said,) = answer.output() or (AgentSaid(""),)
    assert isinstance(said, AgentSaid)
    assert said.text.strip() == heard.said.text.strip()
    assert [call.call_id for call in said.calls] == [call.call_id for call in heard.calls]
    assert [call.arguments for call in said.calls] == [call.arguments for call in heard.calls]
