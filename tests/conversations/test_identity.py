from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from gateway.conversations.identity import LONGEST_CHAT, chat_of, is_background
from gateway.storage.text import fits
from gateway.translation.agent_turn import AgentSaid, ImageUrl, Instructed, Said, Text, ToolResult, UserSaid
from gateway.translation.ask import Ask


def user(*texts: str) -> UserSaid:
    return UserSaid(tuple(Text(text) for text in texts))


def ask(*transcript: Said, **fields: Any) -> Ask:
    return Ask(model="friend", transcript=transcript or (user("Hi"),), **fields)


def headers(**named: str) -> Mapping[str, str]:
    return CIMultiDict({name.replace("_", "-"): value for name, value in named.items()})


KEY, OPEN_WEBUI = "x_letta_chat_key", "X_OPENWEBUI_CHAT_ID"


@pytest.mark.parametrize(
    ("sent", "body", "chat"),
    [
        ({}, None, None),
        ({KEY: "k"}, None, "k"),
        ({OPEN_WEBUI: "o"}, None, "o"),
        ({}, "b", "b"),
        ({KEY: "k", OPEN_WEBUI: "o"}, "b", "k"),
        ({OPEN_WEBUI: "o"}, "b", "o"),
        ({KEY: "", OPEN_WEBUI: " "}, "b", "b"),
        ({KEY: "", OPEN_WEBUI: "o"}, None, "o"),
        ({KEY: " k "}, None, "k"),
        ({}, " b\n", "b"),
        ({}, "", None),
        ({}, " ", None),
        ({KEY: ""}, None, None),
        ({"X_Other": "k"}, None, None),
        ({KEY: "größe 😀"}, None, "größe 😀"),
    ],
)
def test_chat_that_a_request_names(sent: dict[str, str], body: str | None, chat: str | None) -> None:
    assert chat_of(headers(**sent), ask(chat=body)) == chat


def test_longest_identity_that_is_kept_as_it_is() -> None:
    assert chat_of({}, ask(chat="x" * LONGEST_CHAT)) == "x" * LONGEST_CHAT
    assert len(chat_of({}, ask(chat="x" * (LONGEST_CHAT + 1))) or "") < LONGEST_CHAT


def test_long_identities_that_differ_at_their_end_are_two_chats() -> None:
    one, other = (chat_of({}, ask(chat="x" * 10_000 + end)) for end in "ab")
    assert one != other
    assert one == chat_of({}, ask(chat="x" * 10_000 + "a"))


@given(chat=st.text(st.characters(), min_size=1) | st.text("\0\ud800\udcff\u202e\n a", min_size=1))
def test_any_identity_can_be_stored(chat: str) -> None:
    for named in (chat_of({}, ask(chat=chat)), chat_of({"X-Letta-Chat-Key": chat}, ask())):
        assert (named is None) == (not chat.strip())
        assert named is None or fits(named)


# Background requests -------------------------------------------------------------------------------------------------

TITLE = "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Guidelines:\n"
TASKS = [
    TITLE,
    "### Task:\nGenerate a concise title summarizing the chat history.\n### Guidelines:\n",
    "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history, along with 1-3 more specific",
    "### Task:\nGenerate a detailed prompt for am image generation task based on the given language and context.",
    "### Task:\nSuggest 3-5 relevant follow-up questions or prompts that the user might naturally ask next",
    "### Task:\nPredict 3-5 useful messages this user might naturally send next to advance their current objective.",
    "### Task:\nAnalyze the chat history to determine the necessity of generating search queries",
    "### Task:\nYou are an autocompletion system. Continue the text in `<text>` based on the **completion type**",
    "### Task:\nSummarize the conversation history that will be compacted out of the active chat context.",
    "Your task is to reflect the speaker's likely facial expression through a fitting emoji. Interpret emotions from",
    'You have been provided with a set of responses from various models to the latest user query: "Which tea?"',
    "Review the completed conversation turn and decide whether long-term memory should change.\n\nMemory types:",
]
"""How Open WebUI's own prompts begin, up to 0.12.4."""
WITH_DOCUMENTS = """### Task:
Respond to the user query using the provided context, incorporating inline citations in the format [id] **only when the
<source> tag includes an explicit id attribute** (e.g., <source id="1">).

### Guidelines:
- If you don't know the answer, clearly state that.

<context>
<source id="1">Milo likes walnuts.</source>
</context>

What does Milo like?"""
"""A user's question as Open WebUI 0.12.4 sends it beside documents."""


@pytest.mark.parametrize("text", TASKS)
def test_task_prompts_of_open_webui(text: str) -> None:
    assert is_background({}, ask(user(text)))
    assert is_background({}, ask(user(f"\n  {text}")))
    assert is_background({}, ask(Instructed("Be kind"), user(text)))


PICKS_TOOLS = """Available Tools: [{"name": "tell_time"}]

Your task is to choose and return the correct tool(s) from the list of available tools based on the query. Follow these
guidelines:"""


@pytest.mark.parametrize("text", ["Query: What time is it?", 'History:\nUSER: """Hi"""\nQuery: What time is it?'])
def test_tools_that_open_webui_has_a_model_choose(text: str) -> None:
    assert is_background({}, ask(Instructed(PICKS_TOOLS), user(text)))
    assert is_background({}, ask(Instructed(f"Be kind.\n{PICKS_TOOLS}"), user(text)))
    assert not is_background({}, ask(Instructed("Be kind."), user(text)))


@pytest.mark.parametrize(
    "transcript",
    [
        [user("Hi")],
        [user(WITH_DOCUMENTS)],
        [user("### Task:")],
        [user("### Task:\nWrite a poem")],
        [user("What does '### Task:' mean?")],
        [user("Please do this.\n### Task:\nWrite a poem")],
        [user("Task: write a poem")],
        [user("## Task: write a poem")],
        [user("Hi", TITLE)],
        [user(TITLE), AgentSaid("A title"), user("Thanks")],
        [user("Hi"), AgentSaid("Hello"), user(TITLE)],
        [user("Hi"), user(TITLE)],
        [Instructed(TITLE), user("Hi")],
        [Instructed(PICKS_TOOLS), user("Hi"), AgentSaid("Hello"), user("And?")],
        [ToolResult("call_1", TITLE)],
        [UserSaid((ImageUrl("https://example.com/a.png"),))],
        [UserSaid(())],
    ],
)
def test_users_own_words(transcript: list[Said]) -> None:
    assert not is_background({}, ask(*transcript))


def test_task_that_a_header_or_the_body_names() -> None:
    assert is_background(headers(x_openwebui_task="title_generation"), ask())
    assert is_background({}, ask(task="tags_generation"))
    assert is_background({}, ask(user("Hi"), AgentSaid("Hello"), user("And?"), task="follow_up_generation"))
    assert not is_background(headers(x_openwebui_task=""), ask(task=""))
    assert not is_background(headers(x_openwebui_chat_id="o"), ask())
