import json

import msgspec
import pytest

from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_tools import RESERVED, ClientCalls, Toolkit, toolkit_of
from gateway.translation.agent_events import Batch, ServerToolCall, ServerToolReturn, TextDelta, ToolCallDelta
from gateway.translation.agent_turn import ClientTool

SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"city":{"type":"string"}}}')


def tools(*names: str) -> tuple[ClientTool, ...]:
    return tuple(ClientTool(name, f"What {name} does", SCHEMA) for name in names)


def kit(*names: str, server_tools: tuple[str, ...] = ()) -> Toolkit:
    return toolkit_of(tools(*names), server_tools)


def test_no_tools() -> None:
    toolkit = kit()
    assert toolkit == Toolkit()
    assert (toolkit.allowed, toolkit.groups, toolkit.digest) == ((), (), b"")


def test_the_servers_tools_alone() -> None:
    toolkit = kit(server_tools=("Bash", "Read"))
    assert toolkit.allowed == ("Bash", "Read")
    assert toolkit.groups == ()


def test_tools_as_they_are_registered() -> None:
    toolkit = kit("get_weather", server_tools=("Bash",))
    assert toolkit.allowed == ("Bash", "get_weather")
    assert json.loads(wire.encode(toolkit.groups)) == [
        {
            "scope_id": "client",
            "tools": [
                {
                    "name": "get_weather",
                    "description": "What get_weather does",
                    "parameters": json.loads(bytes(SCHEMA)),
                    "timeout_ms": 300_000,
                    "auto_background": False,
                }
            ],
        }
    ]


def test_toolkits_are_told_apart_by_what_is_in_them() -> None:
    digests = {
        kit("a").digest,
        kit("a", "b").digest,
        kit("b", "a").digest,
        kit("a", server_tools=("Read",)).digest,
        toolkit_of((ClientTool("a", "Something else", SCHEMA),), ()).digest,
        toolkit_of((ClientTool("a", "What a does", msgspec.Raw(b"{}")),), ()).digest,
    }
    assert len(digests) == 6
    assert kit("a").digest == kit("a").digest


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_name_of_one_of_the_servers_own_tools(name: str) -> None:
    assert kit(name).names == {f"client_{name}": name}


def test_name_of_a_tool_that_the_operator_allows() -> None:
    toolkit = kit("fetch_webpage", "other", server_tools=("fetch_webpage",))
    assert toolkit.names == {"client_fetch_webpage": "fetch_webpage", "other": "other"}
    assert toolkit.allowed == ("fetch_webpage", "client_fetch_webpage", "other")


def test_other_name_that_is_taken_too() -> None:
    assert kit("client_Bash", "Bash").names == {"client_Bash": "client_Bash", "client_Bash_2": "Bash"}


def test_other_name_that_would_be_too_long() -> None:
    long = "x" * 64
    twin = f"client_{'x' * 57}"
    names = kit(long, twin, server_tools=(long,)).names
    assert list(names.values()) == [long, twin]
    assert names == {f"client_{'x' * 55}_2": long, twin: twin}
    assert {len(name) for name in names} == {64}


def is_waiting(calls: ClientCalls) -> bool:
    return calls.waits


# Calls ---------------------------------------------------------------------------------------------------------------


def test_calls_are_told_when_the_server_has_checked_them() -> None:
    calls = ClientCalls(kit("get_weather", "Bash"))
    first = calls.sort([TextDelta("Hm."), ServerToolCall("1", "get_weather", '{"ci')])
    assert first == [TextDelta("Hm.")]
    assert calls.sort([ServerToolCall("1", None, 'ty":1}'), ServerToolCall("2", "client_Bash", "{}")]) == []
    assert is_waiting(calls)
    assert calls.names == {"1": "get_weather", "2": "Bash"}
    assert calls.release() == [
        ToolCallDelta("1", "get_weather", '{"ci'),
        ToolCallDelta("1", None, 'ty":1}'),
        ToolCallDelta("2", "Bash", "{}"),
    ]
    assert not is_waiting(calls)
    assert calls.release() == []


def test_call_that_the_server_refuses_by_itself_is_its_own_affair() -> None:
    calls = ClientCalls(kit("a", "b"))
    calls.sort([ServerToolCall("1", "a", "{}"), ServerToolCall("2", "b", "{}")])
    assert calls.release({"1"}) == [ServerToolCall("1", "a", "{}"), ToolCallDelta("2", "b", "{}")]
    assert calls.names == {"2": "b"}
    returns: Batch = [ServerToolReturn("1", "a", succeeded=False), ServerToolReturn("2", "b", succeeded=True)]
    assert calls.sort([*returns]) == returns[:1]


def test_calls_of_the_servers_tools_are_told_at_once() -> None:
    calls = ClientCalls(kit("a", server_tools=("Bash",)))
    batch: Batch = [
        ServerToolCall("1", "Bash", "{}"),
        ServerToolCall("1", None, ""),
        ServerToolReturn("1", None, succeeded=True),
    ]
    assert calls.sort([*batch]) == batch
    assert not is_waiting(calls)


def test_results_of_the_step_before_are_no_news() -> None:
    calls = ClientCalls(kit("a"), frozenset({"1"}))
    assert calls.sort([ServerToolReturn("1", None, succeeded=True), TextDelta("So.")]) == [TextDelta("So.")]
    assert calls.names == {}
