import time
from collections.abc import Sequence
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.conversations.divergence import DIGEST, digest, digests, instructions, split, spoken, unseen
from gateway.translation.agent_turn import (
    AgentSaid,
    Call,
    ImageData,
    ImageUrl,
    Instructed,
    Part,
    Said,
    Text,
    ToolResult,
    UserSaid,
)

Transcript: TypeAlias = Sequence[Said]

CALL = Call("call_1", "f", '{"a": 1}')


def user(text: str, *parts: Part) -> UserSaid:
    return UserSaid((Text(text), *parts))


def chat(*texts: str) -> list[Said]:
    """Return a chat whose messages are the user's and the agent's by turns."""
    return [AgentSaid(text) if index % 2 else user(text) for index, text in enumerate(texts)]


def known(held: Transcript, sent: Transcript) -> int | None:
    """Return how much of what is sent a conversation holds that holds the other."""
    return unseen(digests(held), digests(sent))


# Continued or parted -------------------------------------------------------------------------------------------------

HELD = chat("a", "A", "b", "B", "c", "C")


@pytest.mark.parametrize(
    ("held", "sent", "expected"),
    [
        pytest.param(HELD, chat("a", "A", "b", "B", "c", "C", "d"), 6, id="continued"),
        pytest.param(HELD, [*HELD, user("d"), user("e")], 6, id="continued by two messages"),
        pytest.param([], chat("a"), 0, id="nothing was said yet"),
        pytest.param(HELD, chat("a", "A", "b", "B", "x"), None, id="last message edited"),
        pytest.param(HELD, chat("a", "A", "x"), None, id="earlier message edited, the rest dropped"),
        pytest.param(HELD, chat("x"), None, id="first message edited, the rest dropped"),
        pytest.param(HELD, chat("x", "A", "b", "B", "c", "C", "d"), None, id="first message edited, the rest kept"),
        pytest.param(HELD, chat("a", "A", "x", "B", "c", "C", "d"), None, id="earlier message edited, the rest kept"),
        pytest.param(HELD, chat("a", "A", "b", "X", "c", "C", "d"), None, id="answer edited"),
        pytest.param(HELD, chat("a", "A", "b", "B", "c"), None, id="answer asked for again"),
        pytest.param(HELD, chat("a", "A", "b"), None, id="earlier answer asked for again"),
        pytest.param(HELD, chat("a"), None, id="first answer asked for again"),
        pytest.param(HELD, [], None, id="nothing sent"),
        pytest.param(HELD, HELD, None, id="no news"),
        pytest.param(HELD, chat("q", "Q", "r"), None, id="another chat"),
        pytest.param(HELD, chat("b", "B", "c", "C", "d"), 4, id="oldest turn trimmed"),
        pytest.param(HELD, chat("c", "C", "d"), 2, id="all but the newest turn trimmed"),
        pytest.param(HELD, HELD[3:] + chat("d"), 3, id="trimmed to begin with an answer"),
        pytest.param(HELD, HELD[5:] + chat("d"), None, id="trimmed to one message, which may be any"),
        pytest.param(HELD, chat("d"), None, id="trimmed to the news alone"),
        pytest.param(HELD, chat("b", "B", "c"), None, id="trimmed, and the answer asked for again"),
        pytest.param(HELD, chat("b", "B", "x", "C", "d"), None, id="trimmed, and edited"),
        pytest.param(HELD, HELD[:2] + HELD[4:] + chat("d"), None, id="middle trimmed"),
        pytest.param(chat("hi", "Hi", "hi", "Hi"), chat("hi", "Hi", "hi", "Hi", "hi"), 4, id="same words each time"),
        pytest.param(chat("hi", "Hi", "hi", "Hi"), chat("hi", "Hi", "hi"), None, id="same words, asked for again"),
        pytest.param(chat("hi", "Hi"), chat("hi", "Hi", "hi"), 2, id="same words, said once more"),
        pytest.param(chat("a", "A", "hi", "Hi"), chat("hi", "Hi", "b"), 2, id="trimmed to words that were said before"),
    ],
)
def test_chat_is_continued_or_parted(held: list[Said], sent: list[Said], expected: int | None) -> None:
    assert known(held, sent) == expected


# What clients make of messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Hello there, friend.",
        " Hello there, friend.\n",
        "Hello there,\nfriend.",
        "Hello\tthere, \r\n friend.",
        '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> Hm\n</details>\nHello there, friend.',
        "Hello there,\n<details type='tool_calls' name=\"f\">\n<summary>f</summary>\n</details>\nfriend.",
        "<think>Hm</think>Hello there, friend.",
        "Hello<details></details> there<think></think>, <details><summary>x</summary>y</details>friend.",
    ],
)
def test_answers_that_front_ends_dress_up(text: str) -> None:
    assert digest(AgentSaid(text)) == digest(AgentSaid("Hello there, friend."))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello there, friend",
        "Hello, friend.",
        "hello there, friend.",
        "<think>Hello there, friend.",
        "Hello</think>",
    ],
)
def test_answers_that_are_other_ones(text: str) -> None:
    assert digest(AgentSaid(text)) != digest(AgentSaid("Hello there, friend."))


def test_block_that_does_not_end_is_text() -> None:
    assert digest(AgentSaid("Hi <details>a")) != digest(AgentSaid("Hi"))
    assert digest(AgentSaid("Hi <details>a")) != digest(AgentSaid("Hi <details>b"))


@pytest.mark.parametrize("piece", ["<details", "<details>", "<think>", "</details>", "<details <think>", " \n", "<"])
def test_no_answer_takes_long_to_compare(piece: str) -> None:
    began = time.process_time()
    digest(AgentSaid(piece * (1_000_000 // len(piece))))
    assert time.process_time() - began < 0.5


def test_arguments_of_a_call_are_written_anew() -> None:
    assert digest(AgentSaid("", (CALL,))) == digest(AgentSaid("", (Call("call_1", "f", '{"a":1}'),)))
    assert digest(AgentSaid("", (CALL,))) != digest(AgentSaid("", (Call("call_2", "f", '{"a": 1}'),)))
    assert digest(AgentSaid("", (CALL,))) != digest(AgentSaid(""))
    assert digest(AgentSaid("", (CALL, CALL))) != digest(AgentSaid("", (CALL,)))


def test_results_of_tools_are_shortened() -> None:
    assert digest(ToolResult("call_1", "a long result")) == digest(ToolResult("call_1", "[shortened]", succeeded=False))
    assert digest(ToolResult("call_1", "42")) != digest(ToolResult("call_2", "42"))


def test_words_of_users_are_their_own() -> None:
    assert digest(user("Hi")) == digest(user(" Hi\n"))
    assert digest(user("Hi  there")) != digest(user("Hi there"))
    assert digest(user("<think>Hi</think>")) != digest(user("<think></think>"))


PICTURE = ImageData("image/png", "AAAA")


@pytest.mark.parametrize(
    "other",
    [
        user("Look"),
        UserSaid((PICTURE, Text("Look"))),
        user("Look", ImageData("image/png", "AAAB")),
        user("Look", PICTURE, PICTURE),
        user("Look", ImageUrl("AAAA")),
        user("Look", Text("AAAA")),
        UserSaid((Text("LookAAAA"),)),
    ],
)
def test_images_are_part_of_what_is_said(other: UserSaid) -> None:
    assert digest(other) != digest(user("Look", PICTURE))
    assert digest(user("Look", PICTURE)) == digest(user(" Look ", ImageData("image/jpeg", "AAAA")))


def test_kinds_are_not_mistaken_for_each_other() -> None:
    said: list[Said] = [user("x"), AgentSaid("x"), ToolResult("x", ""), Instructed("x"), UserSaid((ImageUrl("x"),))]
    assert len({digest(one) for one in said}) == len(said)
    assert {len(digest(one)) for one in said} == {DIGEST}


def test_odd_characters() -> None:
    assert digest(user("\ud800")) != digest(user("\udfff"))
    assert digest(AgentSaid("\u2028a\u00a0b")) == digest(AgentSaid("a b"))


# Parts of a transcript -----------------------------------------------------------------------------------------------


def test_instructions_apart_from_what_is_spoken() -> None:
    transcript: list[Said] = [
        Instructed("Be kind"),
        user("a"),
        Instructed("Be brief"),
        AgentSaid("A"),
        ToolResult("x", ""),
    ]
    assert spoken(transcript) == (user("a"), AgentSaid("A"), ToolResult("x", ""))
    assert instructions(transcript) == "Be kind\n\nBe brief"
    assert instructions(spoken(transcript)) == ""


@pytest.mark.parametrize(
    ("transcript", "where"),
    [
        ([], 0),
        (chat("a"), 0),
        ([user("a"), user("b")], 0),
        (chat("a", "A", "b"), 2),
        ([user("a"), AgentSaid("", (CALL,)), ToolResult("call_1", "1"), user("b")], 2),
        (chat("a", "A"), 2),
    ],
)
def test_where_the_news_begin(transcript: list[Said], where: int) -> None:
    assert split(transcript) == where


# Any chat ------------------------------------------------------------------------------------------------------------

_texts = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=5)
_chats = st.lists(_texts, min_size=1, max_size=6, unique=True).map(
    lambda texts: chat(*[f"{i}{t}" for i, t in enumerate(texts)])
)
_news = st.lists(_texts.map(lambda text: user(f"new {text}")), min_size=1, max_size=2)


def turns(held: list[Said]) -> list[Said]:
    """Return a chat up to an answer."""
    return held if len(held) % 2 == 0 else [*held, AgentSaid(f"answer {len(held)}")]


@given(held=_chats.map(turns), news=_news)
def test_what_is_only_continued_is_always_continued(held: list[Said], news: list[UserSaid]) -> None:
    assert known(held, [*held, *news]) == len(held)


@given(held=_chats.map(turns), news=_news, data=st.data())
def test_what_was_edited_is_never_continued(held: list[Said], news: list[UserSaid], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(held) - 1))
    edited = user("edited") if at % 2 == 0 else AgentSaid("edited")
    rest = held[at + 1 :] if data.draw(st.booleans()) else []
    assert known(held, [*held[:at], edited, *rest, *news]) is None


@given(held=_chats.map(turns), data=st.data())
def test_what_is_asked_for_again_is_never_continued(held: list[Said], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(held)))
    assert known(held, held[:length]) is None


@given(held=_chats.map(turns), news=_news, data=st.data())
def test_what_lost_its_beginning_is_continued_where_it_ends(
    held: list[Said], news: list[UserSaid], data: st.DataObject
) -> None:
    dropped = data.draw(st.integers(1, len(held)))
    left = len(held) - dropped
    assert known(held, [*held[dropped:], *news]) == (left if left >= 2 else None)


@given(held=_chats.map(turns), sent=_chats, news=_news)
def test_what_is_known_is_what_the_conversation_ends_with(
    held: list[Said], sent: list[Said], news: list[UserSaid]
) -> None:
    start = known(held, [*sent, *news])
    assert start is None or digests(sent[:start]) == digests(held[len(held) - start :])
