import ast
import asyncio
import base64
import contextlib
import json
import re
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gateway.errors import TurnFailed
from gateway.letta.backend import Agent
from gateway.letta.rest_prompts import OVERLAID
from gateway.letta.scripted import Hang, Script, says
from gateway.open_webui import pipeline as pipeline_file
from gateway.open_webui.pipeline import (
    EventReader,
    LettaDecoder,
    LettaError,
    Pipeline,
    SpokenArguments,
    StreamEvent,
    asked_for,
    letta_content,
)
from gateway.translation.agent_events import Batch, Failure, ReasoningDelta, Stop, TextDelta, Usage
from gateway.translation.agent_turn import Text, UserSaid
from gateway.translation.ask import GO_ON
from tests.letta import recorded
from tests.open_webui.letta_server import AGENT, playing
from tests.open_webui.pipelines_server import PipelinesServer
from tests.server.running import FRIEND, Running, serving, settings
from tests.server.wire import until

Messages = list[dict[str, Any]]

HI: Messages = [{"role": "user", "content": "Hi"}]
TITLE: Messages = [{"role": "user", "content": "### Task:\nGenerate a concise title."}]
MERGE = "You have been provided with a set of responses from various models to the latest user query: x"
MERGED: Messages = [{"role": "user", "content": MERGE}]
PICKED: Messages = [
    {"role": "system", "content": f"Available Tools: []\n\n{pipeline_file.PICKS_TOOLS} based on the query."},
    {"role": "user", "content": "Query: What time is it?"},
]
CHAT = {"chat_id": "chat-1"}
SOURCE = Path(pipeline_file.__file__)


def said(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def frames(*documents: dict[str, Any] | str) -> bytes:
    lines = [document if isinstance(document, str) else json.dumps(document) for document in documents]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def frame(kind: str, **fields: Any) -> dict[str, Any]:
    return {"message_type": kind, "run_id": "run-1", **fields}


PING = frame("ping")
END = frame("stop_reason", stop_reason="end_turn")
USED = frame("usage_statistics", prompt_tokens=10, completion_tokens=2, total_tokens=12)
HELLO = frames(PING, frame("assistant_message", id="m1", content="Hello"), END, USED, "[DONE]")


@contextlib.asynccontextmanager
async def pipeline_at(url: str, **valves: Any) -> AsyncIterator[Pipeline]:
    made = Pipeline()
    made.valves = Pipeline.Valves(base_url=url, **valves)
    try:
        yield made
    finally:
        await made.on_shutdown()


async def heard(
    pipeline: Pipeline, messages: Messages, model: str = "friend", body: dict[str, Any] | None = None
) -> list[StreamEvent]:
    return [event async for event in pipeline.stream("", model, messages, body or {})]


def text(events: list[StreamEvent], kind: str = "message") -> str:
    return "".join(event.data["content"] for event in events if event.type == kind)


def statuses(events: list[StreamEvent]) -> list[tuple[str, bool]]:
    return [(event.data["description"], event.data["done"]) for event in events if event.type == "status"]


def error(events: list[StreamEvent]) -> dict[str, Any]:
    """Return the failure, which is the last event and the only one."""
    assert [event.type for event in events].index("chat:error") == len(events) - 1
    return events[-1].data


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


@pytest.fixture
async def pipeline(gateway: Running) -> AsyncIterator[Pipeline]:
    async with pipeline_at(f"http://127.0.0.1:{gateway.port}/v1") as made:
        yield made


# By way of a gateway --------------------------------------------------------------------------------------------------


async def test_events_of_a_turn(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(Script(([ReasoningDelta("Hm")], [TextDelta("Hel")], [TextDelta("lo")], [Stop("end_turn")])))
    events = await heard(pipeline, HI)
    assert (text(events), text(events, "reasoning")) == ("Hello", "Hm")
    assert [event.type for event in events] == ["reasoning", "message", "message", "usage"]


async def test_usage(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(says("Hi", usage=Usage(10, 2)))
    usage = (await heard(pipeline, HI))[-1]
    assert usage.type == "usage"
    assert (usage.data["prompt_tokens"], usage.data["completion_tokens"], usage.data["total_tokens"]) == (10, 2, 12)


async def test_answer_that_was_cut_short_says_so(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(says("This sentence has no", stop="max_steps"))
    assert statuses(await heard(pipeline, HI)) == [("The agent reached its limit", True)]


async def test_chat_has_a_conversation_of_its_own(gateway: Running, pipeline: Pipeline) -> None:
    await heard(pipeline, said("One"), body=CHAT)
    await heard(pipeline, [*said("One"), {"role": "assistant", "content": "Hello, world!"}, *said("Two")], body=CHAT)
    await heard(pipeline, said("One"), body={"metadata": {"chat_id": "chat-2"}})
    assert len(gateway.backend.conversations) == 2
    first, second, third = (turn.sent for turn in gateway.backend.turns)
    assert first.conversation_id == second.conversation_id != third.conversation_id
    assert second.news == (UserSaid((Text("Two"),)),)


async def test_title_reaches_no_conversation_that_stays(gateway: Running, pipeline: Pipeline) -> None:
    await heard(pipeline, said("One"), body=CHAT)
    await heard(pipeline, said("Any prompt"), body={**CHAT, "task": "title_generation"})
    await heard(pipeline, TITLE, body=CHAT)
    first, *tasks = (turn.sent.conversation_id for turn in gateway.backend.turns)
    await until(lambda: gateway.backend.deleted == tasks)
    assert first not in tasks


@pytest.mark.parametrize("messages", [TITLE, MERGED, PICKED])
def test_task_is_known_by_its_words(messages: Messages) -> None:
    assert asked_for(None, "friend", messages, CHAT).task
    assert asked_for(None, "friend", [{"role": "system", "content": "Be kind."}, *messages], CHAT).task
    assert not asked_for(None, "friend", [*HI, {"role": "assistant", "content": "Hello"}, *messages], CHAT).task


async def test_odd_chat_id_is_a_chat(gateway: Running, pipeline: Pipeline) -> None:
    await heard(pipeline, HI, body={"chat_id": "Zürich\r\nX-Evil: 1 \ud800"})
    assert len(gateway.backend.conversations) == 1


async def test_unknown_agent_is_told_in_the_gateways_words(pipeline: Pipeline) -> None:
    failure = error(await heard(pipeline, HI, "nobody"))
    assert failure["code"] == "model_not_found"
    assert failure["message"].startswith("The model 'nobody' does not exist.")


async def test_wrong_key_is_told_without_it() -> None:
    async with (
        serving(settings(api_keys=("sk-right",))) as gateway,
        pipeline_at(f"http://user:pass-word@127.0.0.1:{gateway.port}", api_key="sk-wrong") as pipeline,
    ):
        failure = error(await heard(pipeline, HI))
        assert failure["code"] == "invalid_api_key"
        assert not re.search("sk-wrong|pass-word", str(failure))
        pipeline.valves.api_key = "sk-right"
        assert text(await heard(pipeline, HI)) == "Hello, world!"


def test_secrets_in_the_address_go_into_a_header() -> None:
    connection = Pipeline.Valves(base_url="https://ann:p%40ss@letta.example/v1/")
    assert connection.root() == "https://letta.example"
    assert connection.headers()["Authorization"] == f"Basic {base64.b64encode(b'ann:p@ss').decode()}"
    connection.api_key = "sk-1"
    assert connection.headers()["Authorization"] == "Bearer sk-1"


async def test_failure_in_mid_stream(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], [Failure(TurnFailed(should_retry=False))])))
    events = await heard(pipeline, HI)
    assert text(events) == "Hel"
    assert error(events)["code"] == "agent_run_failed"


async def test_caller_that_leaves_cancels_the_turn(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    events = pipeline.stream("Hi", "friend", HI, {})
    assert (await anext(events)).data == {"content": "Hel"}
    await events.aclose()
    await until(lambda: gateway.backend.turns[0].cancelled)


async def test_reader_in_a_thread_that_leaves_cancels_the_turn(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    lines = pipeline.pipe("Hi", "friend", HI, {})
    assert isinstance(lines, Iterator)
    first = await asyncio.to_thread(next, lines)
    assert first["choices"][0]["delta"] == {"content": "Hel"}
    lines.close()
    await until(lambda: gateway.backend.turns[0].cancelled)


async def test_silent_turn_shows_signs_of_life(
    gateway: Running, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server notices that nobody reads any more when it writes, and not before."""
    monkeypatch.setattr(pipeline_file, "HEARTBEAT", 0.05)
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    lines = pipeline.pipe("Hi", "friend", HI, {})
    assert isinstance(lines, Iterator)
    deltas = [(await asyncio.to_thread(next, lines))["choices"][0]["delta"] for _ in range(40)]
    assert {"content": "Hel"} in deltas
    assert deltas[-1] == {}
    lines.close()
    await until(lambda: gateway.backend.turns[0].cancelled)


async def test_stream_that_is_left_without_being_closed_is_ended(
    gateway: Running, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does the Pipelines server, in whose cycles of garbage it stays."""
    monkeypatch.setattr(pipeline_file, "ABANDONED", 0.1)
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    lines = pipeline.pipe("Hi", "friend", HI, {})
    assert isinstance(lines, Iterator)
    await asyncio.to_thread(next, lines)
    await until(lambda: gateway.backend.turns[0].cancelled)
    (failed,) = await asyncio.to_thread(list, lines)
    assert failed["error"]["code"] == "stopped"


async def test_shutdown_ends_running_turns_with_a_word(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
    lines = pipeline.pipe("Hi", "friend", HI, {})
    assert isinstance(lines, Iterator)
    await asyncio.to_thread(next, lines)
    rest = asyncio.get_running_loop().run_in_executor(None, list, lines)
    await asyncio.sleep(0.05)
    await pipeline.on_shutdown()
    assert (await rest)[-1]["error"]["code"] == "stopped"
    assert not [thread for thread in threading.enumerate() if thread.name == "letta-pipeline"]
    await until(lambda: gateway.backend.turns[0].cancelled)


async def test_one_client_for_each_event_loop(pipeline: Pipeline) -> None:
    assert pipeline.get_client() is pipeline.get_client()

    async def elsewhere() -> httpx.AsyncClient:
        client = pipeline.get_client()
        await pipeline.on_shutdown()
        return client

    other = await asyncio.to_thread(asyncio.run, elsewhere())
    assert other is not pipeline.get_client()
    assert other.is_closed


async def test_new_tls_valve_takes_a_new_client_and_breaks_no_turn(gateway: Running, pipeline: Pipeline) -> None:
    gateway.backend.play(says("One", "Two", "Three"))
    before = pipeline.get_client()
    events = pipeline.stream("Hi", "friend", HI, {})
    await anext(events)
    pipeline.valves = Pipeline.Valves(base_url=pipeline.valves.base_url, verify_tls=False)
    await pipeline.on_valves_updated()
    assert pipeline.get_client() is not before
    assert not before.is_closed
    assert text([event async for event in events]) == "TwoThree"
    assert before.is_closed


# What goes wrong on the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:9", "unreachable"),
        ("", "invalid_base_url"),
        ("ftp://letta", "invalid_base_url"),
        ("127.0.0.1:8080", "invalid_base_url"),
        ("http://letta.invalid:99999999", "unreachable"),
    ],
)
async def test_server_that_is_not_there(url: str, code: str) -> None:
    async with pipeline_at(url) as pipeline:
        assert error(await heard(pipeline, HI))["code"] == code
        assert (await asyncio.to_thread(pipeline.pipelines))[0]["id"] == "unavailable"


async def test_server_that_speaks_no_tls(gateway: Running) -> None:
    async with pipeline_at(f"https://127.0.0.1:{gateway.port}") as pipeline:
        assert error(await heard(pipeline, HI))["code"] == "tls_failed"


async def test_silent_server() -> None:
    async with playing(frames(PING)) as letta, pipeline_at(letta.url, silence_timeout=0.3) as pipeline:
        letta.holds.clear()
        assert error(await heard(pipeline, HI, AGENT["id"]))["code"] == "timeout"
        await until(lambda: letta.cancelled == ["run-1"])


async def test_turn_that_takes_too_long() -> None:
    async with playing(frames(PING)) as letta, pipeline_at(letta.url, turn_timeout=0.3) as pipeline:
        letta.holds.clear()
        assert error(await heard(pipeline, HI, AGENT["id"]))["code"] == "timeout"
        await until(lambda: letta.cancelled == ["run-1"])


async def test_server_behind_a_proxy_that_came_first_is_found_later() -> None:
    async with playing(HELLO) as letta, pipeline_at(letta.url) as pipeline:
        letta.is_hidden = True
        assert error(await heard(pipeline, HI))["code"] == "agent_not_found"
        letta.is_hidden = False
        assert text(await heard(pipeline, HI)) == "Hello"


@pytest.mark.parametrize(
    ("key", "shown"),
    [("sk-\u20ac", "invalid_api_key"), ("sk\r\nX-Evil: 1", "invalid_api_key"), ("", "")],
)
async def test_key_that_no_header_carries(gateway: Running, key: str, shown: str) -> None:
    async with pipeline_at(f"http://127.0.0.1:{gateway.port}", api_key=key) as pipeline:
        events = await heard(pipeline, HI)
        assert (error(events)["code"] if shown else "") == shown


async def test_messages_that_are_no_json(pipeline: Pipeline) -> None:
    circle: dict[str, Any] = {"role": "user", "content": "Hi"}
    circle["again"] = circle
    for odd in ([circle], [{"role": "user", "content": "Hi", "x": object()}]):
        assert error(await heard(pipeline, odd))["code"] == "invalid_request"


async def test_app_server_is_told_to_need_a_gateway() -> None:
    async def info(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        found = b"/app-server-info" in head
        body = b'{"letta_code_version": "0.34.12"}' if found else b"{}"
        status = b"200 OK" if found else b"404 Not Found"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body))
        writer.close()

    server = await asyncio.start_server(info, "127.0.0.1", 0)
    async with server, pipeline_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as pipeline:
        assert error(await heard(pipeline, HI))["code"] == "app_server"


def raw_answers(body: bytes, kind: str) -> list[StreamEvent]:
    """Return the events of a turn that is answered with these bytes by whatever is at the address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        health = b'{"version": "1", "status": "ok"}' if kind == "letta" and head.startswith(b"GET /v1/health/") else b""
        if not head.startswith(b"POST"):
            status = b"200 OK" if health else b"404 Not Found"
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(health)))
            writer.write(health)
        elif b"/cancel " in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)
        writer.close()

    async def turn() -> list[StreamEvent]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, pipeline_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as pipeline:
            return await heard(pipeline, HI, AGENT["id"])

    return asyncio.run(turn())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(sorted(LettaDecoder._ACCEPT))
FIELDS = ("id", "content", "reasoning", "tool_calls", "tool_call", "stop_reason", "tool_return", "name", "status")
ODD_FRAMES = st.builds(
    lambda kind, fields: json.dumps({"message_type": kind, **fields}).encode(),
    KINDS,
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4),
)
ODD_CHUNKS = st.builds(
    lambda delta, more: json.dumps({"choices": [{"delta": delta}], **more}).encode(),
    st.dictionaries(st.sampled_from(("content", "reasoning", "tool_calls")), JSON_VALUES),
    st.dictionaries(st.sampled_from(("usage", "error")), JSON_VALUES),
)
EVENTS = st.lists(st.binary(max_size=40) | ODD_FRAMES | ODD_CHUNKS | JSON_VALUES.map(lambda v: json.dumps(v).encode()))


@pytest.mark.parametrize("kind", ["letta", "gateway"])
@given(events=EVENTS)
@examples(max_examples=40)
def test_nothing_that_a_server_sends_breaks_the_stream(kind: str, events: list[bytes]) -> None:
    heard = raw_answers(b"".join(b"data: " + event + b"\n\n" for event in events), kind)
    assert [event.type for event in heard].count("chat:error") <= 1
    assert heard[-1].type in {"usage", "chat:error", "message", "status"}
    for event in heard:
        json.dumps(event.model_dump(), ensure_ascii=False).encode()
        assert event.data.get("code") != "internal_error"


@pytest.mark.parametrize("body", [b"data: [" + b"[" * 200_000 + b"\n\n", b"x" * 3_000_000, b'data: "\\ud800"\n\n'])
@pytest.mark.parametrize("kind", ["letta", "gateway"])
def test_monstrous_events(kind: str, body: bytes) -> None:
    assert error(raw_answers(body, kind))["code"] in {"invalid_answer", "answer_cut_off"}


# Straight to Letta ----------------------------------------------------------------------------------------------------


async def test_letta_hears_the_newest_message_alone() -> None:
    async with playing(HELLO) as letta, pipeline_at(letta.url) as pipeline:
        messages = [*said("One"), {"role": "assistant", "content": "Hello"}, *said("Two")]
        events = await heard(pipeline, messages, "friend", CHAT)
        ((path, body),) = letta.turns
    assert path == f"/v1/agents/{AGENT['id']}/messages/stream"
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Two"}]}]
    assert [event.type for event in events] == ["message", "usage"]
    assert events[-1].data == {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}


@pytest.mark.parametrize("name", recorded.names())
def test_recorded_streams_say_what_the_gateway_makes_of_them(name: str) -> None:
    stream, decoder, events = recorded.stream(name), LettaDecoder(), []
    failed = False
    try:
        for data in EventReader().feed(stream):
            if data != b"[DONE]":
                events += list(decoder.decode(data))
        decoder.end()
    except LettaError:
        failed = True
    chunks = [json.loads(line) for line in recorded.expected(name) if line != "[DONE]"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices")]
    assert text(events) == "".join(delta.get("content") or "" for delta in deltas)
    assert text(events, "reasoning") == "".join(delta.get("reasoning") or "" for delta in deltas)
    assert failed == any("error" in chunk for chunk in chunks)
    assert bool(decoder.waiting) == any("tool_calls" in delta for delta in deltas)


async def test_tools_that_run_on_letta_are_statuses() -> None:
    stream = recorded.stream("stream-server-side-tool")
    async with playing(stream) as letta, pipeline_at(letta.url) as pipeline:
        events = await heard(pipeline, HI)
    assert statuses(events) == [("Using memory_insert", False), ("memory_insert failed", True)]


async def test_what_a_search_found_is_a_source() -> None:
    call = {"tool_call_id": "c1", "name": "web_search", "arguments": "{}"}
    stream = frames(
        frame("tool_call_message", tool_call=call, tool_calls=call),
        frame("tool_return_message", tool_call_id="c1", status="success", tool_return="Paris is a city."),
        frame("tool_return_message", tool_call_id="c1", status="success", tool_return="Paris is a city."),
        END,
    )
    async with playing(stream) as letta, pipeline_at(letta.url) as pipeline:
        events = await heard(pipeline, HI)
    assert [event.data for event in events if event.type == "citation"] == [
        {"source": {"name": "web_search"}, "document": ["Paris is a city."], "metadata": [{"source": "web_search"}]}
    ]
    assert statuses(events) == [("Using web_search", False), ("Used web_search", True)]


async def test_legacy_agent_speaks_by_a_tool() -> None:
    fragments = [
        r'{"thinking": "a \"message\": \"',
        '", "mess',
        r'age" : "He said \"h',
        "i\\",
        r'", \ud8',
        "3d",
        r"\ude00",
    ]
    calls = [{"tool_call_id": "c1", "name": "send_message", "arguments": None}]
    calls += [{"tool_call_id": "c1", "name": None, "arguments": fragment} for fragment in [*fragments, '!"}', "x"]]
    stream = frames(
        frame("reasoning_message", id="m0", reasoning="Hm"),
        *(frame("tool_call_message", id="m1", tool_call=call) for call in calls),
        frame("tool_return_message", tool_call_id="c1", name="send_message", status="success", tool_return="None"),
        END,
    )
    async with playing(stream) as letta, pipeline_at(letta.url) as pipeline:
        events = await heard(pipeline, HI)
    assert text(events) == 'He said "hi", \U0001f600!'
    assert statuses(events) == []


@given(message=st.text(), cuts=st.lists(st.integers(1, 5)))
def test_spoken_arguments_split_anywhere(message: str, cuts: list[int]) -> None:
    arguments, spoken, said_so_far = json.dumps({"a": 'a "message": "x', "message": message}), SpokenArguments(), ""
    for cut in [*cuts, len(arguments)]:
        said_so_far += spoken.feed(arguments[:cut])
        arguments = arguments[cut:]
    assert said_so_far == message.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


async def test_hidden_thought_and_compaction_are_statuses() -> None:
    stream = frames(
        frame("hidden_reasoning_message", id="m1", state="redacted"),
        frame("hidden_reasoning_message", id="m1", state="redacted"),
        frame("summary_message", summary="It was long."),
        frame("user_message", content="echo"),
        frame("system_message", content="echo"),
        frame("approval_response_message"),
        frame("something_new", content={"x": 1}),
        END,
    )
    async with playing(stream) as letta, pipeline_at(letta.url) as pipeline:
        events = await heard(pipeline, HI)
    assert statuses(events) == [("Thought, in private", True), ("Summed up what was said before", True)]
    assert text(events) == ""


async def test_call_that_needs_an_approval_is_refused_and_the_agent_goes_on() -> None:
    asks = recorded.stream("stream-client-tool-1-call")
    async with playing(asks, HELLO) as letta, pipeline_at(letta.url) as pipeline:
        events = await heard(pipeline, HI)
        _, (_, second) = letta.turns
    (answer,) = second["messages"][0]["approvals"]
    assert (answer["type"], answer["status"]) == ("tool", "error")
    assert answer["tool_call_id"] in asks.decode()
    assert text(events).endswith("Hello")
    assert events[-1].type == "usage"


async def test_agent_that_asks_for_ever_is_left() -> None:
    asks = recorded.stream("stream-client-tool-1-call")
    async with playing(*[asks] * 9) as letta, pipeline_at(letta.url) as pipeline:
        assert error(await heard(pipeline, HI))["code"] == "approval_needed"
        assert len(letta.turns) == pipeline_file.MAX_REFUSALS


async def test_approval_that_waits_for_somebody_else() -> None:
    stream = recorded.stream("stream-client-tool-2-user-message-while-pending")
    async with playing(stream) as letta, pipeline_at(letta.url) as pipeline:
        assert error(await heard(pipeline, HI))["code"] == "pending_approval"


@pytest.mark.parametrize("body", [{"task": "title_generation"}, {}], ids=["told", "by the prompt"])
async def test_task_of_the_front_end_runs_aside(body: dict[str, str]) -> None:
    async with playing(HELLO) as letta, pipeline_at(letta.url) as pipeline:
        assert text(await heard(pipeline, TITLE, body={**CHAT, **body})) == "Hello"
        ((path, sent),) = letta.turns
        assert path == "/v1/conversations/conv-1/messages"
        assert sent["streaming"] is True
        assert letta.paths("DELETE") == ["/v1/conversations/conv-1"]


async def test_answer_that_is_to_be_continued_says_no_earlier_message_again() -> None:
    async with playing(HELLO) as letta, pipeline_at(letta.url) as pipeline:
        await heard(pipeline, [*said("Send the letter"), {"role": "assistant", "content": "It is"}])
        ((_, sent),) = letta.turns
    assert UserSaid((Text(pipeline_file.GO_ON),)) == GO_ON, "as the gateway says it"
    assert sent["messages"] == [{"role": "user", "content": [{"type": "text", "text": pipeline_file.GO_ON}]}]


INSTRUCTED: Messages = [{"role": "system", "content": "Speak German."}, *HI]


@pytest.mark.parametrize("body", [{}, {"task": "title_generation"}], ids=["own thread", "aside"])
async def test_system_prompt_goes_beside_the_agents_own(body: dict[str, str]) -> None:
    asks = recorded.stream("stream-client-tool-1-call")
    async with playing(asks, HELLO, HELLO) as letta, pipeline_at(letta.url) as pipeline:
        await heard(pipeline, INSTRUCTED, body=body)
        await heard(pipeline, HI, body=body)
        first, refusal, without = (sent for _, sent in letta.turns)
    assert first["override_system"] == OVERLAID.format(prompt="You are Milo.", text="Speak German.")
    assert refusal["override_system"] == first["override_system"]
    assert first["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert "override_system" not in without


async def test_system_prompt_that_an_older_letta_would_drop_is_not_dropped_silently() -> None:
    async with playing(HELLO) as letta, pipeline_at(letta.url) as pipeline:
        letta.version = "0.16.6"
        events = await heard(pipeline, INSTRUCTED)
        ((_, sent),) = letta.turns
    assert "override_system" not in sent
    assert statuses(events) == [("Left out the system prompt, which this Letta server takes since 0.16.7", True)]


async def test_turns_of_one_agent_run_one_at_a_time() -> None:
    async with playing(HELLO, HELLO) as letta, pipeline_at(letta.url) as pipeline:
        letta.holds.clear()
        first = asyncio.get_running_loop().create_task(heard(pipeline, HI, AGENT["id"]))
        await until(lambda: letta.live == 1)
        second = asyncio.get_running_loop().create_task(heard(pipeline, HI, AGENT["id"]))
        await asyncio.sleep(0.1)
        letta.holds.set()
        assert text(await first) == text(await second) == "Hello"
        assert letta.most == 1
        assert statuses(await second) == [(pipeline_file._WAITING, False), (pipeline_file._WAITING, True)]


async def test_caller_that_leaves_cancels_its_run_on_letta() -> None:
    begun = frames(PING, frame("assistant_message", id="m1", content="Hel"))
    async with playing(begun, HELLO) as letta, pipeline_at(letta.url) as pipeline:
        letta.holds.clear()
        events = pipeline.stream("Hi", "friend", HI, {})
        await anext(events)
        await events.aclose()
        assert letta.cancelled == ["run-1"]
        letta.holds.set()
        assert text(await heard(pipeline, HI)) == "Hello", "its place is free"


async def test_stream_that_breaks_off_is_a_failure() -> None:
    begun = frames(PING, frame("assistant_message", id="m1", content="Hel"))
    async with playing(begun) as letta, pipeline_at(letta.url) as pipeline:
        events = await heard(pipeline, HI)
    assert text(events) == "Hel"
    assert error(events)["code"] == "answer_cut_off"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "agent_not_found"),
        (409, "conversation_busy"),
        (422, "invalid_request"),
        (429, "rate_limited"),
        (503, "server_error"),
        (302, "unexpected_status"),
        (200, "invalid_answer"),
    ],
)
async def test_refusal_of_lettas_shows_nothing_of_its_text(status: int, code: str) -> None:
    async with playing() as letta, pipeline_at(letta.url) as pipeline:
        letta.refuses = (status, '{"detail": "secret of the server"}')
        failure = error(await heard(pipeline, HI))
    assert failure["code"] == code
    assert "secret" not in failure["message"]


async def test_password_of_lettas() -> None:
    async with playing(HELLO) as letta, pipeline_at(letta.url, api_key="wrong") as pipeline:
        letta.password = "right"
        failure = error(await heard(pipeline, HI))
        assert failure["code"] == "invalid_api_key"
        assert "wrong" not in failure["message"]
        pipeline.valves.api_key = "right"
        assert text(await heard(pipeline, HI)) == "Hello"


async def test_names_that_two_agents_share_and_that_none_has() -> None:
    async with playing() as letta, pipeline_at(letta.url) as pipeline:
        letta.agents = [AGENT, {**AGENT, "id": AGENT["id"].replace("1", "2")}]
        assert error(await heard(pipeline, HI))["code"] == "ambiguous_agent"
        assert error(await heard(pipeline, HI, "x&limit=1\ud800"))["code"] == "agent_not_found"


async def test_image_goes_along() -> None:
    data = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0="}}
    web = {"type": "image_url", "image_url": {"url": "https://letta.com/a.png"}}
    assert letta_content([{"type": "text", "text": "Look"}, data, web]) == [
        {"type": "text", "text": "Look"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0="}},
        {"type": "image", "source": {"type": "url", "url": "https://letta.com/a.png"}},
    ]
    for url in ("http://10.0.0.1/", "data:image/png,x", "file:///etc/passwd"):
        with pytest.raises(LettaError, match="image"):
            letta_content([{"type": "image_url", "image_url": {"url": url}}])


def test_nothing_to_say() -> None:
    for messages in ([], [{"role": "user", "content": None}], [None, 1, "x"]):
        with pytest.raises(LettaError, match="nothing to say"):
            letta_content(asked_for(None, "friend", messages, {}).newest())
    assert asked_for("Hi", "friend", [], {}).newest() == "Hi"


# On the Pipelines server ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pipelines_server(folder: Path, valves: dict[str, Any]) -> AsyncIterator[PipelinesServer]:
    shutil.copy(SOURCE, folder / "letta_agents.py")
    (folder / "letta_agents").mkdir()
    (folder / "letta_agents" / "valves.json").write_text(json.dumps(valves))
    server = PipelinesServer(folder)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def pipelines(gateway: Running, tmp_path: Path) -> AsyncIterator[PipelinesServer]:
    async with pipelines_server(tmp_path, {"base_url": f"http://127.0.0.1:{gateway.port}"}) as server:
        yield server


def chunks(stream: str) -> list[dict[str, Any]]:
    *lines, done = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_file_loads_where_its_valves_say(pipelines: PipelinesServer) -> None:
    assert pipelines.models() == {"letta.friend": "Letta: friend"}
    assert not (pipelines.folder / "failed").exists()


async def test_streamed_answer_of_the_server(gateway: Running, pipelines: PipelinesServer) -> None:
    hm: Batch = [ReasoningDelta("Hm")]
    gateway.backend.play(Script((hm, [TextDelta("data: Hel")], [TextDelta("lo")], [Stop("end_turn")])))
    stream = await pipelines.chat({"model": "letta.friend", "messages": HI})
    assert isinstance(stream, str)
    *told, usage, finish = chunks(stream)
    deltas = [chunk["choices"][0]["delta"] for chunk in told]
    assert deltas == [{"reasoning_content": "Hm"}, {"content": "data: Hel"}, {"content": "lo"}]
    assert usage["choices"] == []
    assert finish["choices"][0]["finish_reason"] == "stop"


async def test_whole_answer_of_the_server(gateway: Running, pipelines: PipelinesServer) -> None:
    gateway.backend.play(Script(([ReasoningDelta("Hm")], [TextDelta("Hello")], [Stop("end_turn"), Usage(10, 2)])))
    answer = await pipelines.chat({"model": "letta.friend", "messages": HI, "stream": False})
    assert isinstance(answer, dict)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}
    assert answer["usage"]["total_tokens"] == 12
    gateway.backend.play(Script(([Failure(TurnFailed(should_retry=False))],)))
    failed = await pipelines.chat({"model": "letta.friend", "messages": HI, "stream": False})
    assert isinstance(failed, dict)
    assert failed["error"]["code"] == "agent_run_failed"


async def test_error_is_an_event_and_what_open_webui_shows(gateway: Running, pipelines: PipelinesServer) -> None:
    gateway.backend.play(Script(([Failure(TurnFailed(should_retry=False))],)))
    stream = await pipelines.chat({"model": "letta.friend", "messages": HI})
    assert isinstance(stream, str)
    failed = next(chunk for chunk in chunks(stream) if "event" in chunk)
    assert failed["event"]["type"] == "chat:error"
    assert failed["error"]["message"] == failed["event"]["data"]["message"]


async def test_inlet_keeps_which_chat_it_is(gateway: Running, pipelines: PipelinesServer) -> None:
    """Open WebUI takes the metadata out of what it sends after the filters."""
    body = {"model": "letta.friend", "messages": HI, "metadata": {"chat_id": "chat-9", "task": None, "x": [1]}}
    passed = await pipelines.inlet("letta.friend", body, {"id": "user-1"})
    assert passed == {**body, "chat_id": "chat-9"}
    del passed["metadata"]
    await pipelines.chat(passed)
    assert len(gateway.backend.conversations) == 1
    assert await pipelines.outlet("letta.friend", body, {"id": "user-1"}) == body
    assert await pipelines.inlet("letta.friend", {"metadata": 1}, {}) == {"metadata": 1}


async def test_valves_that_are_updated_count_at_once(gateway: Running, pipelines: PipelinesServer) -> None:
    url = f"http://127.0.0.1:{gateway.port}"
    await pipelines.update_valves("letta", {"base_url": "http://127.0.0.1:9"})
    assert list(pipelines.models()) == ["letta.unavailable"]
    assert "cannot be reached" in pipelines.models()["letta.unavailable"]
    await pipelines.update_valves("letta", {"base_url": url, "agent_id": FRIEND.id})
    assert list(pipelines.models()) == [f"letta.{FRIEND.id}"]
    stream = await pipelines.chat({"model": f"letta.{FRIEND.id}", "messages": HI})
    assert isinstance(stream, str)
    assert "world" in stream


async def test_agents_that_come_later_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        serving(settings(models_ttl=0.1)) as gateway,
        pipelines_server(tmp_path, {"base_url": f"http://127.0.0.1:{gateway.port}"}) as pipelines,
    ):
        assert list(pipelines.models()) == ["letta.friend"]
        gateway.backend.listed = [FRIEND, Agent("agent-2", "a/b?c", 1)]
        monkeypatch.setitem(type(pipelines.modules["letta"]).pipelines.__globals__, "REFRESH", 0.3)
        await until(lambda: len(pipelines.models()) == 2)
        odd = next(model for model in pipelines.models() if model != "letta.friend")
        assert re.fullmatch(r"letta\.agent-[0-9a-f]{16}", odd), "it stands in paths"
        await pipelines.chat({"model": odd, "messages": HI})
        assert gateway.backend.turns[-1].sent.agent_id == "agent-2"


async def test_file_that_fails_is_put_aside(tmp_path: Path) -> None:
    """The loader is worth nothing unless it finds what the server would."""
    (tmp_path / "broken.py").write_text("raise ValueError")
    server = PipelinesServer(tmp_path)
    await server.start()
    assert server.models() == {}
    assert (tmp_path / "failed" / "broken.py").exists()


def test_requirements_are_all_that_the_file_imports(tmp_path: Path) -> None:
    imported = {
        (name.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
        for node in ast.walk(ast.parse(SOURCE.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    shutil.copy(SOURCE, tmp_path)
    server = PipelinesServer(tmp_path)
    asyncio.run(server.start())
    foreign = {"httpx", "pydantic"}
    assert {name.strip() for name in server.requirements} == foreign
    assert foreign <= imported
    assert "gateway" not in imported
