import json
from typing import Any

import msgspec
import pytest

from gateway.letta.backend import Agent
from gateway.letta.rest_bridge import TAG
from gateway.letta.rest_returns import Settled
from gateway.letta.wire import (
    AgentRow,
    Health,
    decode_agent,
    decode_agents,
    decode_health,
    decode_profile,
    otid_of,
    turn_body,
)
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    ClientTool,
    ImageData,
    ImageUrl,
    Instructed,
    Part,
    Text,
    ToolResult,
    UserSaid,
)
from tests.letta import recorded
from tests.said import said_to

WEATHER = ClientTool("weather", "The weather.", msgspec.Raw(b'{"type":"object"}'))


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ((Text("Hi"),), "Hi"),
        ((Text('"\n\u2028😀'),), '"\n\u2028😀'),
        ((Text("a"), Text("b")), [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        (
            (ImageData("image/png", "QQ=="),),
            [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}}],
        ),
        (
            (Text("Look"), ImageUrl("https://example.com/a.png")),
            [
                {"type": "text", "text": "Look"},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            ],
        ),
    ],
)
def test_what_goes_out(content: tuple[Part, ...], sent: Any) -> None:
    assert json.loads(turn_body(said_to("agent-1", *content))) == {
        "messages": [{"role": "user", "content": sent}],
        "stream_tokens": True,
        "include_pings": True,
    }


def test_history_stale_results_and_news_in_their_order() -> None:
    turn = AgentTurn(
        agent_id="agent-1",
        conversation_id="conv-1",
        history=(Instructed("Be kind."), AgentSaid("Hello.")),
        news=(Instructed("Be brief."), UserSaid((Text("Hi"),))),
    )
    settled = Settled((ToolResult("a", "", succeeded=False),), (ToolResult("b", "late"),))
    assert json.loads(turn_body(turn, settled, (WEATHER,))) == {
        "messages": [
            {
                "type": "approval",
                "approvals": [{"type": "tool", "tool_call_id": "a", "tool_return": "", "status": "error"}],
            },
            {"role": "system", "content": "Be kind."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Result of the tool call b: late"},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "stream_tokens": True,
        "include_pings": True,
        "streaming": True,
        "client_tools": [{"name": "weather", "description": "The weather.", "parameters": {"type": "object"}}],
    }


def test_legacy_agent_is_told_all_in_the_reason_of_a_refusal() -> None:
    turn = AgentTurn(agent_id="agent-1", news=(UserSaid((Text("Hi"),)),))
    settled = Settled((ToolResult("a", "sunny"),), (ToolResult("b", "late"),))
    reason = (
        "It was not denied: the client ran it. Result of the tool call a: sunny\n"
        "<user>\nResult of the tool call b: late\n</user>\n<user>\nHi\n</user>"
    )
    (message,) = json.loads(turn_body(turn, settled, is_legacy=True))["messages"]
    assert message == {
        "type": "approval",
        "approve": False,
        "reason": reason,
        "approvals": [{"type": "approval", "tool_call_id": "a", "approve": False, "reason": reason}],
    }
    assert json.loads(turn_body(turn, is_legacy=True))["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("profile", "is_legacy", "own"),
    [
        (b'{"agent_type":"letta_v1_agent","tools":[{"id":"1","name":"a","tags":["x"]}]}', False, ("a",)),
        (b'{"agent_type":"sleeptime_agent","tools":null}', False, ()),
        (
            b'{"agent_type":"memgpt_v2_agent","tools":[{"id":"1","name":"a_1","tags":["' + TAG.encode() + b'"]}]}',
            True,
            (),
        ),
        (b"{}", False, ()),
    ],
)
def test_what_an_agent_is(profile: bytes, is_legacy: bool, own: tuple[str, ...]) -> None:  # noqa: FBT001 - a table
    known = decode_profile(profile)
    assert (known.is_legacy, known.own_tools, known.details().tools) == (is_legacy, own, own)


def test_recorded_request_is_what_we_send() -> None:
    request = (recorded.FOLDER / "stream-text.txt").read_text().splitlines()[1]
    assert json.loads(turn_body(said_to("agent-1", Text("Hello there")))) == json.loads(request)


def test_agent_row_of_many_fields() -> None:
    rows = decode_agents(
        b'[{"id":"agent-1","name":"friend","created_at":"2026-11-20T15:16:13.000500+00:00","tools":[{"x":1}]},'
        b'{"id":"agent-2","name":"other","created_at":null}]'
    )
    assert [row.agent() for row in rows] == [Agent("agent-1", "friend", 1_795_187_773), Agent("agent-2", "other", 0)]


def test_agent_without_a_time() -> None:
    assert decode_agent(b'{"id":"agent-1","name":"friend"}').agent() == Agent("agent-1", "friend", 0)


def test_health() -> None:
    assert decode_health(b'{"version":"0.16.8","status":"ok"}') == Health("0.16.8", "ok")


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b"{}", b'{"id":7,"name":"x"}', b'{"id":"a","name":null}'])
def test_answer_that_is_no_agent(answer: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_agent(answer)


def test_row_is_what_the_listing_is_read_as() -> None:
    assert decode_agents(b"[]") == []
    assert isinstance(decode_agents(b'[{"id":"a","name":"b"}]')[0], AgentRow)


def test_last_message_of_a_turn_is_named() -> None:
    turn = AgentTurn(agent_id="agent-1", history=(AgentSaid("before"),), news=(UserSaid((Text("Hi"),)),))
    assert json.loads(turn_body(turn, otid=otid_of("mark-1", 2)))["messages"] == [
        {"role": "assistant", "content": "before"},
        {"role": "user", "content": "Hi", "otid": "mark-1.2"},
    ]
    assert otid_of("mark-1", 2).startswith(otid_of("mark-1"))
    assert not otid_of("mark-10", 1).startswith(otid_of("mark-1"))


def test_turn_of_results_alone_has_no_message_to_be_named() -> None:
    settled = Settled((ToolResult("c1", "sunny"),))
    (message,) = json.loads(turn_body(AgentTurn(agent_id="agent-1"), settled, otid="mark-1.1"))["messages"]
    assert "otid" not in message


def test_tags_are_read() -> None:
    assert decode_agent(b'{"id":"agent-1","name":"x","tags":["a","b"]}').agent().tags == ("a", "b")
    assert decode_agent(b'{"id":"agent-1","name":"x","tags":null}').agent().tags == ()
