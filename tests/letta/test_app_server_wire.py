import json
from typing import Any

import msgspec
import pytest

from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_wire import Command, Runtime
from gateway.letta.app_server_words import said_to_agent
from gateway.letta.backend import Agent
from gateway.translation.agent_turn import AgentTurn, ImageData, ImageUrl, Text
from tests.letta.fake_app_server import FOLDER, frames_of
from tests.said import said_to

RUNTIME = Runtime("agent-1", "default")
SAID = {"agent_id": "agent-1", "conversation_id": "default"}


def said(command: Command) -> Any:
    return json.loads(wire.encode(command))


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        (wire.ServerInfo(request_id="q"), {"type": "app_server_info"}),
        (wire.ListModels(request_id="q"), {"type": "list_models"}),
        (
            wire.ListAgents(request_id="q", query=wire.ListQuery(limit=50)),
            {"type": "agent_list", "query": {"limit": 50}},
        ),
        (
            wire.ListAgents(request_id="q", query=wire.ListQuery(limit=50, after="agent-1")),
            {"type": "agent_list", "query": {"limit": 50, "after": "agent-1"}},
        ),
        (
            wire.CreateAgent(request_id="q", body=wire.AgentBody(name="Temp", model="lmstudio/m")),
            {"type": "agent_create", "body": {"name": "Temp", "model": "lmstudio/m"}},
        ),
        (
            wire.UpdateAgent(request_id="q", agent_id="agent-1", body=wire.AgentBody(description="x")),
            {"type": "agent_update", "agent_id": "agent-1", "body": {"description": "x"}},
        ),
        (
            wire.StartRuntime(request_id="q", agent_id="agent-1", conversation_id="default"),
            {
                "type": "runtime_start",
                **SAID,
                "mode": "unrestricted",
                "recover_approvals": False,
                "force_device_status": False,
                "client_info": {"name": "letta-gateway"},
            },
        ),
        (
            wire.ListConversations(request_id="q", query=wire.ConversationsQuery(limit=50, summary_search=wire.THREAD)),
            {"type": "conversation_list", "query": {"limit": 50, "summary_search": "Letta Gateway"}},
        ),
        (
            wire.CreateConversation(request_id="q", body=wire.ConversationBody("agent-1")),
            {"type": "conversation_create", "body": {"agent_id": "agent-1", "summary": "Letta Gateway"}},
        ),
        (
            wire.ForkConversation(request_id="q", conversation_id="c-1"),
            {"type": "conversation_fork", "conversation_id": "c-1"},
        ),
        (wire.Abort(request_id="q", runtime=RUNTIME), {"type": "abort_message", "runtime": SAID}),
        (
            wire.UpdateConversation(request_id="q", conversation_id="c", body=wire.ConversationChanges(archived=True)),
            {"type": "conversation_update", "conversation_id": "c", "body": {"archived": True}},
        ),
        (wire.RetrieveAgent(request_id="q", agent_id="a"), {"type": "agent_retrieve", "agent_id": "a"}),
        (
            wire.UpdateTools(request_id="q", updates=(wire.ToolUpdate((RUNTIME,), ()),)),
            {"type": "runtime_external_tools_update", "updates": [{"runtimes": [SAID], "external_tools": []}]},
        ),
        (
            wire.answer_of("q", "sunny", succeeded=True),
            {"type": "external_tool_call_response", "result": {"content": [{"type": "text", "text": "sunny"}]}},
        ),
        (
            wire.answer_of("q", "no net", succeeded=False),
            {
                "type": "external_tool_call_response",
                "result": {"content": [{"type": "text", "text": "no net"}], "is_error": True},
            },
        ),
        (
            wire.RemoveQueued(request_id="q", runtime=RUNTIME, item_id="q-1"),
            {"type": "remove_queue_item", "runtime": SAID, "item_id": "q-1"},
        ),
    ],
)
def test_what_a_command_looks_like(command: Command, sent: dict[str, Any]) -> None:
    assert said(command) == {"request_id": "q", **sent}


@pytest.mark.parametrize(
    ("turn", "content"),
    [
        (said_to("agent-1", Text('Hi\n"😀"')), 'Hi\n"😀"'),
        (
            said_to("agent-1", Text("Look"), ImageData("image/png", "QQ=="), ImageUrl("https://example.com/a.png")),
            [
                {"type": "text", "text": "Look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            ],
        ),
    ],
)
def test_turn_that_may_use_none_of_the_servers_tools(turn: AgentTurn, content: Any) -> None:
    command = said(wire.input_of(said_to_agent(turn), RUNTIME, "m1"))
    assert command == {
        "type": "input",
        "request_id": "m1",
        "runtime": SAID,
        "payload": {
            "kind": "create_message",
            "messages": [{"role": "user", "content": content, "client_message_id": "m1"}],
            "exclude_interactive_tools": True,
            "client_tool_allowlist": [],
            "client_toolset": {"base": "none", "include": []},
        },
    }


def test_turn_that_may_use_some_of_the_servers_tools() -> None:
    payload = said(wire.input_of("Hi", RUNTIME, "m1", ("Read", "Grep")))["payload"]
    assert payload["client_tool_allowlist"] == ["Read", "Grep"]
    assert payload["client_toolset"] == {"base": "none", "include": ["Read", "Grep"]}


def test_turn_that_may_use_tools_of_the_clients() -> None:
    payload = said(wire.input_of("Hi", RUNTIME, "m1", ("Read",), ("get_weather",)))["payload"]
    assert payload["client_tool_allowlist"] == ["Read", "get_weather"]
    assert payload["client_toolset"] == {"base": "none", "include": ["Read"]}
    assert payload["external_tool_scope_ids"] == [wire.SCOPE]


@pytest.mark.parametrize(
    ("delta", "refused"),
    [
        (b'{"message_type":"stop_reason","stop_reason":"requires_approval"}', None),
        (b'{"message_type":"approval_classification_end","auto_denied_tool_call_ids":["1"]}', ("1",)),
        (b'{"message_type":"approval_classification_end"}', ()),
    ],
)
def test_calls_that_the_server_refuses(delta: bytes, refused: tuple[str, ...] | None) -> None:
    assert wire.refused_calls(delta) == refused


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.jsonl")))
def test_every_recorded_frame_is_read(name: str) -> None:
    for recorded in frames_of(name):
        frame = wire.decode_incoming(json.dumps(recorded).encode())
        assert frame.type == recorded["type"]
        assert frame.request_id == recorded.get("request_id")
        assert (frame.runtime and msgspec.to_builtins(frame.runtime)) == recorded.get("runtime")
        assert json.loads(bytes(frame.delta) or b"null") == recorded.get("delta")
        assert [item.client_message_id for item in frame.queue] == [
            item["client_message_id"] for item in recorded.get("queue", [])
        ]


def test_refusal_is_read() -> None:
    (refusal,) = (frame for frame in frames_of("7-errors") if frame["type"] == "runtime_start_response")
    reply = msgspec.json.decode(json.dumps(refusal), type=wire.Reply)
    assert (reply.success, reply.error) == (False, "Agent agent-nope not found")


def test_listings_are_read() -> None:
    frames = {frame["type"]: json.dumps(frame).encode() for frame in frames_of("1-discover")}
    (row,) = msgspec.json.decode(frames["agent_list_response"], type=wire.AgentsReply).agents
    assert row.agent() == Agent("agent-local-652133e7-09c0-45c7-968d-f850b3a9c390", "Milo", 0, row.tags)
    assert row.tags == ("git-memory-enabled", "origin:letta-code")
    assert (row.model, row.description) == ("lmstudio/scripted-model", None)
    made = msgspec.json.decode(frames["agent_create_response"], type=wire.AgentReply)
    assert made.agent is not None
    assert made.agent.name == "Temp"


def test_models_are_read() -> None:
    row = {"id": "gpt-4o-mini", "handle": "lmstudio/gpt-4o-mini", "updateArgs": {"context_window": 128000}}
    reply = msgspec.json.decode(json.dumps({"success": True, "entries": [row]}), type=wire.ModelsReply)
    assert [entry.handle for entry in reply.entries] == ["lmstudio/gpt-4o-mini"]


@pytest.mark.parametrize(
    ("fields", "conversation"),
    [
        ({"conversation": {"id": "c-1", "agent_id": "agent-1", "summary": None, "in_context": []}}, "c-1"),
        ({"success": False, "conversation": None, "error": "no"}, None),
        ({"success": False, "error": "no"}, None),
    ],
)
def test_conversation_that_was_made_is_read(fields: dict[str, Any], conversation: str | None) -> None:
    reply = msgspec.json.decode(json.dumps({"request_id": "q", **fields}), type=wire.ConversationReply)
    assert (reply.conversation and reply.conversation.id) == conversation
    assert reply.error == fields.get("error")


def test_agent_that_is_not_there_is_read() -> None:
    frames = {frame["type"]: json.dumps(frame).encode() for frame in frames_of("1-discover") + frames_of("7-errors")}
    reply = msgspec.json.decode(frames["agent_retrieve_response"], type=wire.AgentReply)
    assert (reply.success, reply.agent) == (False, None)


def test_text_and_bytes_are_read_alike() -> None:
    text = '{"type":"stream_delta","delta":{"message_type":"ping","x":"ä😀"},"novelty":[1]}'
    for frame in (wire.decode_incoming(text), wire.decode_incoming(text.encode())):
        assert bytes(frame.delta).decode() == '{"message_type":"ping","x":"ä😀"}'


@pytest.mark.parametrize("junk", ["", "nonsense", "[1]", '{"type":7}', '{"runtime":{"agent_id":null}}'])
def test_junk_is_refused(junk: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.decode_incoming(junk)
