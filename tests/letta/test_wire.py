import json
from typing import Any

import msgspec
import pytest

from gateway.letta.backend import Agent
from gateway.letta.wire import AgentRow, Health, decode_agent, decode_agents, decode_health, turn_body
from gateway.translation.agent_turn import AgentTurn, ImageData, ImageUrl, Part, Text
from tests.letta import recorded


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
    assert json.loads(turn_body(AgentTurn("agent-1", content))) == {
        "messages": [{"role": "user", "content": sent}],
        "stream_tokens": True,
        "include_pings": True,
    }


def test_recorded_request_is_what_we_send() -> None:
    request = (recorded.FOLDER / "stream-text.txt").read_text().splitlines()[1]
    assert json.loads(turn_body(AgentTurn("agent-1", (Text("Hello there"),)))) == json.loads(request)


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
