import msgspec
import pytest

from gateway.translation.agent_turn import Text, UserSaid
from gateway.translation.ask import Ask, Named, OutputSchema

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


@pytest.mark.parametrize("said", [Ask(model="friend", transcript=HI), Named("f"), OutputSchema()])
def test_nothing_changes_once_asked(said: msgspec.Struct) -> None:
    with pytest.raises(AttributeError):
        setattr(said, said.__struct_fields__[0], "something else")
