import pytest

from gateway.letta.app_server_words import GOES_ON, MOST_RESULT, cut, said_to_agent
from gateway.letta.wire import Base64Source, ImageContent, TextContent
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    Call,
    ImageData,
    Instructed,
    Said,
    Text,
    ToolResult,
    UserSaid,
)


def user(*texts: str) -> tuple[UserSaid, ...]:
    return tuple(UserSaid((Text(text),)) for text in texts)


def test_one_text_goes_out_as_it_is() -> None:
    assert said_to_agent(AgentTurn(agent_id="a", news=user("Hi"))) == "Hi"


def test_several_messages_and_images_are_parts_of_one_message() -> None:
    image = UserSaid((Text("Look"), ImageData("image/png", "QQ==")))
    news: tuple[UserSaid, ...] = (*user("Hi"), image)
    assert said_to_agent(AgentTurn(agent_id="a", news=news)) == [
        TextContent("Hi"),
        TextContent("Look"),
        ImageContent(Base64Source("image/png", "QQ==")),
    ]


def test_instructions_stand_where_they_were_said() -> None:
    news: tuple[UserSaid | Instructed, ...] = (Instructed("Be brief."), *user("Hi"), Instructed("In French."))
    assert said_to_agent(AgentTurn(agent_id="a", news=news)) == [
        TextContent("<system-reminder>\nBe brief.\n</system-reminder>"),
        TextContent("Hi"),
        TextContent("<system-reminder>\nIn French.\n</system-reminder>"),
    ]


def test_history_comes_first_as_text() -> None:
    history: tuple[Said, ...] = (
        Instructed("Be brief."),
        *user("Weather?"),
        AgentSaid("Let me see.", (Call("1", "get_weather", '{"city":"Oslo"}'),)),
        ToolResult("1", "rain"),
        AgentSaid("It rains."),
    )
    content = said_to_agent(AgentTurn(agent_id="a", history=history, news=user("And now?")))
    assert isinstance(content, list)
    told, news = content
    assert news == TextContent("And now?")
    assert isinstance(told, TextContent)
    assert told.text.startswith("<system-reminder>\nThe conversation so far:\n")
    assert told.text.endswith("\n</system-reminder>")
    places = [told.text.index(words) for words in ("Be brief.", "Weather?", "Let me see.", "Oslo", "rain", "It rains.")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (ToolResult("1", "rain"), "Result of the tool get_weather: rain"),
        (ToolResult("1", "no net", succeeded=False), "Error of the tool get_weather: no net"),
        (ToolResult("2", "12:00"), "Result of the tool call 2: 12:00"),
    ],
)
def test_result_that_no_call_waits_for(result: ToolResult, words: str) -> None:
    turn = AgentTurn(agent_id="a", returns=(result,))
    assert said_to_agent(turn, turn.returns, {"1": "get_weather"}) == words


def test_nothing_to_say() -> None:
    assert said_to_agent(AgentTurn(agent_id="a", returns=(ToolResult("1", "rain"),))) == []


@pytest.mark.parametrize("text", ["", "rain", "x" * MOST_RESULT, "é" * (MOST_RESULT // 2)])
def test_result_that_fits(text: str) -> None:
    result = ToolResult("1", text, succeeded=False)
    assert cut(result) == (result, None)


@pytest.mark.parametrize("text", ["ab" * 40_000, "\U0001f600" * 40_000])
def test_result_that_the_server_would_cut_off(text: str) -> None:
    taken, rest = cut(ToolResult("1", text))
    assert rest is not None
    assert len(taken.text.encode("utf-16-le")) // 2 < 32_000
    assert taken.text.endswith(GOES_ON)
    assert taken.text.removesuffix(GOES_ON) + rest.text == text
    assert (taken.call_id, taken.succeeded, rest.call_id) == ("1", True, "1")
    content = said_to_agent(AgentTurn(agent_id="a", returns=(ToolResult("1", text),)), (), {"1": "look"}, (rest,))
    assert content == f"The rest of the result of the tool look:\n{rest.text}"
