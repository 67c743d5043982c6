import msgspec
import pytest

from gateway.translation.agent_turn import AgentSaid, Call, Said, Text, UserSaid
from gateway.translation.ask import GO_ON, Ask, Named, OutputSchema, can_go_on

HI = (UserSaid((Text("Hi"),)),)


def test_plain_ask_offers_nothing_and_wants_nothing() -> None:
    ask = Ask(model="friend", transcript=HI)
    assert (ask.tools, ask.tool_choice, ask.parallel_calls, ask.output) == ((), "auto", True, None)
    assert (ask.chat, ask.task, ask.is_stream, ask.wants_usage) == (None, None, False, False)


def test_asks_are_compared_by_what_they_ask() -> None:
    assert Ask(model="friend", transcript=HI) == Ask(model="friend", transcript=HI)
    assert Ask(model="friend", transcript=HI) != Ask(model="friend", transcript=HI, tool_choice=Named("auto"))
    assert Ask(model="friend", transcript=HI) != Ask(model="friend", transcript=HI, output=OutputSchema())


def test_answer_of_no_schema_has_a_name_all_the_same() -> None:
    assert OutputSchema() == OutputSchema("response", "", None)


def test_answer_that_can_be_continued() -> None:
    said = AgentSaid("Once upon")
    assert can_go_on([*HI, said])
    assert Ask(model="friend", transcript=(*HI, said, GO_ON)).goes_on
    in_the_users_own_words = UserSaid(GO_ON.content)
    assert not Ask(model="friend", transcript=(*HI, said, in_the_users_own_words)).goes_on
    calls = AgentSaid("x", (Call("1", "f", "{}"),))
    others: list[tuple[Said, ...]] = [(), (said,), (said, *HI), (*HI, AgentSaid("")), (*HI, calls)]
    assert not any(can_go_on(transcript) for transcript in others)


@pytest.mark.parametrize("said", [Ask(model="friend", transcript=HI), Named("f"), OutputSchema()])
def test_nothing_changes_once_asked(said: msgspec.Struct) -> None:
    with pytest.raises(AttributeError):
        setattr(said, said.__struct_fields__[0], "something else")
