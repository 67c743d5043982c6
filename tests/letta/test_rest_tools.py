import msgspec
import pytest

from gateway.letta.frames import ToolCallBody
from gateway.letta.rest_tools import LONGEST_NAME, ClientTools, native_names
from gateway.translation.agent_events import AgentEvent, ServerToolCall, Stop, ToolCallDelta
from gateway.translation.agent_turn import ClientTool


def tool(name: str) -> ClientTool:
    return ClientTool(name, "What it does.", msgspec.Raw(b'{"type":"object"}'))


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        ([], ["weather"], ()),
        (["weather", "clock"], [], ("weather", "clock")),
        (["weather", "clock"], ["weather"], ("client_weather", "clock")),
        (["send_message"], [], ("client_send_message",)),
        (["weather", "client_weather"], ["weather"], ("client_weather_c8734ed4", "client_weather")),
        (["weather"], ["weather", "client_weather"], ("client_weather_c8734ed4",)),
    ],
)
def test_names_that_go_out(names: list[str], own: list[str], expected: tuple[str, ...]) -> None:
    assert native_names([tool(name) for name in names], own) == expected


def test_longest_name_has_room_for_the_difference() -> None:
    names = ["x" * 63 + letter for letter in "ab"]
    changed = native_names([tool(name) for name in names], names)
    assert len({*changed, *names}) == 4
    assert [len(name) for name in changed] == [LONGEST_NAME] * 2
    assert native_names([tool(name) for name in names], names) == changed


def fragments(calls: ClientTools, *said: tuple[str, str | None, str | None], waits: bool = True) -> list[AgentEvent]:
    events = [calls.called(ToolCallBody(*fragment), waits=waits) for fragment in said]
    return [event for event in events if event is not None]


def test_calls_come_back_under_the_clients_names() -> None:
    calls = ClientTools([tool("weather")], ["client_weather"])
    assert fragments(calls, ("a", "client_weather", None), ("a", None, '{"city'), ("a", None, '"}')) == [
        ToolCallDelta("a", "weather", ""),
        ToolCallDelta("a", None, '{"city'),
        ToolCallDelta("a", None, '"}'),
    ]
    assert calls.stopped("requires_approval") == [Stop("requires_approval")]


def test_tool_of_the_agents_own_that_waits_for_approval_is_none_of_the_clients() -> None:
    calls = ClientTools([tool("weather")], ["client_weather"])
    assert fragments(calls, ("a", "weather", None), ("a", None, "{}")) == [
        ServerToolCall("a", "weather", ""),
        ServerToolCall("a", None, "{}"),
    ]
    assert calls.stopped("requires_approval") == [Stop("end_turn")]


def test_tool_that_runs_on_letta() -> None:
    calls = ClientTools([tool("weather")], ["weather"])
    assert fragments(calls, ("a", "memory", "{}"), waits=False) == [ServerToolCall("a", "memory", "{}")]
    assert calls.stopped("end_turn") == [Stop("end_turn")]


@pytest.mark.parametrize(
    ("pieces", "arguments"),
    [
        (['{"city": "Paris",', '"request_heartbeat": ', "true}"], '{"city":"Paris"}'),
        (['{"n": 1.50}'], '{"n":1.50}'),
        (['{"city": '], '{"city": '),
    ],
)
def test_call_of_a_legacy_agent_comes_whole_and_without_lettas_own_argument(pieces: list[str], arguments: str) -> None:
    calls = ClientTools([tool("weather")], ["weather_1"], is_legacy=True)
    assert fragments(calls, ("a", "weather_1", None)) == [ToolCallDelta("a", "weather", "")]
    fragments(calls, *(("a", None, piece) for piece in pieces), waits=False)
    assert calls.stopped("requires_approval") == [ToolCallDelta("a", None, arguments), Stop("requires_approval")]
