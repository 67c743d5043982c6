import msgspec
import pytest

from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    ImageData,
    ImageUrl,
    Instructed,
    Part,
    Said,
    Text,
    ToolResult,
    UserSaid,
)
from tests.said import said_to

PARTS: tuple[Part, ...] = (Text("Hi"), ImageData("image/png", "QQ=="), ImageUrl("https://example.com/a.png"))


def test_thread_is_the_conversation_or_the_agents_own() -> None:
    assert said_to("agent-1", Text("Hi")).thread == "agent-1"
    assert said_to("agent-1").thread != said_to("agent-2").thread
    assert AgentTurn(agent_id="agent-1", conversation_id="conv-1").thread == "conv-1"


def test_turns_are_compared_by_what_they_say() -> None:
    assert said_to("agent-1", *PARTS) == said_to("agent-1", *PARTS)
    assert said_to("agent-1", *PARTS) != said_to("agent-2", *PARTS)
    assert said_to("agent-1", *PARTS) != said_to("agent-1", *PARTS[::-1])
    assert len({said_to("agent-1", *PARTS), said_to("agent-1", *PARTS)}) == 1


def test_parts_of_different_kinds_differ() -> None:
    parts: list[Part] = [Text("https://example.com"), ImageUrl("https://example.com")]
    assert parts[0] != parts[1]
    assert len({*parts, *PARTS}) == 5


@pytest.mark.parametrize("said", [*PARTS, said_to("agent-1", *PARTS)])
def test_nothing_changes_once_said(said: msgspec.Struct) -> None:
    with pytest.raises(AttributeError):
        setattr(said, said.__struct_fields__[0], "something else")


def test_messages_of_different_kinds_differ() -> None:
    said: list[Said] = [Instructed("Hi"), AgentSaid("Hi"), ToolResult("Hi", ""), UserSaid((Text("Hi"),))]
    assert len(set(said)) == 4


def test_result_of_a_tool_is_a_success_unless_it_says_otherwise() -> None:
    assert ToolResult("call_1", "42").succeeded
    assert ToolResult("call_1", "42") != ToolResult("call_1", "42", succeeded=False)


def test_turn_has_nothing_but_what_it_is_given() -> None:
    turn = AgentTurn(agent_id="agent-1")
    assert (turn.history, turn.news, turn.returns, turn.tools, turn.conversation_id) == ((), (), (), (), None)
