import msgspec
import pytest

from gateway.translation.agent_turn import AgentTurn, ImageData, ImageUrl, Part, Text

PARTS: tuple[Part, ...] = (Text("Hi"), ImageData("image/png", "QQ=="), ImageUrl("https://example.com/a.png"))


def test_thread_is_the_agents_own() -> None:
    assert AgentTurn("agent-1", (Text("Hi"),)).thread == "agent-1"
    assert AgentTurn("agent-1", (Text("Hi"),)).thread == AgentTurn("agent-1", ()).thread
    assert AgentTurn("agent-1", ()).thread != AgentTurn("agent-2", ()).thread


def test_turns_are_compared_by_what_they_say() -> None:
    assert AgentTurn("agent-1", PARTS) == AgentTurn("agent-1", tuple(PARTS))
    assert AgentTurn("agent-1", PARTS) != AgentTurn("agent-2", PARTS)
    assert AgentTurn("agent-1", PARTS) != AgentTurn("agent-1", PARTS[::-1])
    assert len({AgentTurn("agent-1", PARTS), AgentTurn("agent-1", PARTS)}) == 1


def test_parts_of_different_kinds_differ() -> None:
    parts: list[Part] = [Text("https://example.com"), ImageUrl("https://example.com")]
    assert parts[0] != parts[1]
    assert len({*parts, *PARTS}) == 5


@pytest.mark.parametrize("said", [*PARTS, AgentTurn("agent-1", PARTS)])
def test_nothing_changes_once_said(said: msgspec.Struct) -> None:
    with pytest.raises(AttributeError):
        setattr(said, said.__struct_fields__[0], "something else")
