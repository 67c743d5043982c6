"""Users talk with their agents: every status, every moment at which somebody may go away, and what is kept of it."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import select, text

from gateway import keys
from gateway.accounts.history import History
from gateway.accounts.instances import Instances
from gateway.conversations import attempts
from gateway.errors import (
    AgentGone,
    ConversationBusy,
    StorageUnavailable,
    TurnFailed,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.handlers import platform_chat
from gateway.letta.scripted import Break, Hang, Hold, Pause, Script, Step, says
from gateway.settings import Price
from gateway.storage.address import SqliteFile
from gateway.storage.tables import messages
from gateway.translation.agent_events import (
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    Usage,
)
from gateway.translation.agent_turn import ImageData, Text
from gateway.translation.platform_types import Message
from tests.handlers.platforms import (
    ANN,
    BEN,
    CARA,
    HISTORY,
    MESSAGE,
    Platform,
    agent_of,
    body,
    events,
    key,
    platform,
    sent,
    token,
)
from tests.said import parts_of
from tests.server.running import JSON
from tests.server.wire import until
from tests.storage.databases import opened

HEL: Batch = [TextDelta("Hel")]
LO: Batch = [TextDelta("lo")]
END: Batch = [Stop("end_turn"), Usage(10, 2)]
ROOT: Final = Path(__file__).parents[2]
KEY = {"Idempotency-Key": "order-66"}
BOTH = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def gateway() -> AsyncIterator[Platform]:
    async with platform() as running:
        yield running


def shown(messages: list[Message]) -> list[tuple[str, str, str]]:
    return [(message.role, message.status, message.text) for message in messages]


HELLO = ("user", "complete", "Hello?")
NOT_SENT = [("user", "failed", "Hello?"), ("assistant", "failed", "")]


# An answer -----------------------------------------------------------------------------------------------------------


async def test_stream(gateway: Platform) -> None:
    gateway.backend.play(
        Script(
            (
                [ReasoningDelta("Hm")],
                [ServerToolCall("call-1", "search", '{"secret": 1}')],
                [ServerToolReturn("call-1", "search", succeeded=True), TextDelta("Hel")],
                LO,
                [Stop("end_turn"), Usage(10, 2, 4, 1)],
            )
        )
    )
    answer = await gateway.say()
    assert (answer.status, answer.complete, answer.header("content-type")) == (200, True, "text/event-stream")
    told = events(answer)
    ids = told[0][1]
    assert told[:-1] == [
        ("start", {"message_id": ids["message_id"], "user_message_id": ids["user_message_id"]}),
        ("reasoning", {"delta": "Hm"}),
        ("tool", {"id": "call-1", "name": "search", "status": "running"}),
        ("tool", {"id": "call-1", "name": "search", "status": "done"}),
        ("text", {"delta": "Hel"}),
        ("text", {"delta": "lo"}),
        (
            "usage",
            {
                "prompt_tokens": 10,
                "completion_tokens": 2,
                "total_tokens": 12,
                "cached_tokens": 4,
                "reasoning_tokens": 1,
            },
        ),
    ]
    name, data = told[-1]
    message = data["message"]
    assert name == "done"
    assert (message["id"], message["text"], message["reasoning"], message["status"]) == (
        ids["message_id"],
        "Hello",
        "Hm",
        "complete",
    )
    assert message["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "cached_tokens": 4,
        "reasoning_tokens": 1,
        "cost": "0.000000",
        "model": "scripted/model",
    }
    assert b"secret" not in answer.body
    question, kept = (await gateway.history()).json()["data"][::-1]
    assert kept == message, "what is told is what is kept"
    assert (question["id"], question["text"]) == (ids["user_message_id"], "Hello?")
    assert await gateway.booked() == [(ANN, "platform", "complete")]
    await gateway.settled()


async def test_whole_answer() -> None:
    async with platform(prices={"*": Price(1.0, 100.0)}) as gateway:
        gateway.backend.play(Script(([ReasoningDelta("Hm")], HEL, LO, END)))
        answer = await gateway.say(stream=False)
        assert (answer.status, answer.header("content-type")) == (200, "application/json")
        said = answer.json()
        assert set(said) == {"message", "user_message", "usage"}
        assert said["usage"] == said["message"]["usage"]
        assert said["usage"]["cost"] == "0.000210"
        assert (await gateway.history()).json()["data"] == [said["message"], said["user_message"]]


async def test_message_goes_to_the_users_own_agent_on_its_own_thread(gateway: Platform) -> None:
    await gateway.say(headers={"X-Letta-Chat-Key": "chat-1", "X-OpenWebUI-Task": "title_generation"})
    await gateway.say("### Task: say", user=BEN)
    ann, ben = (turn.sent for turn in gateway.backend.turns)
    assert (ann.agent_id, ben.agent_id) == (agent_of(ANN).id, agent_of(BEN).id)
    assert ann.conversation_id is ben.conversation_id is None
    assert parts_of(ann) == (Text("Hello?"),)
    assert gateway.backend.conversations == {}


async def test_policy_of_the_openai_surface_changes_nothing_here() -> None:
    async with platform(conversation="stateless", tool_activity="reasoning") as gateway:
        tool: list[Step] = [[ServerToolCall("call-1", "search", '{"secret": 1}')], HEL, END]
        gateway.backend.play(Script(tuple(tool)))
        told = await gateway.say()
        assert gateway.backend.turns[0].sent.conversation_id is None
        assert b"secret" not in told.body
        assert [name for name, _ in events(told)] == ["start", "tool", "text", "usage", "done"]


async def test_parts(gateway: Platform) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    assert (await gateway.say([{"type": "text", "text": "What is this?"}, image])).status == 200
    assert parts_of(gateway.backend.turns[0].sent) == (Text("What is this?"), ImageData("image/png", "iVBORw0KGgo="))
    assert (await gateway.messages())[0].text == "What is this?\n(an image)"


async def test_user_who_has_no_agent_yet_gets_one(gateway: Platform) -> None:
    assert (await gateway.say(user=CARA)).status == 200
    (made,) = [agent for agent in gateway.backend.listed if CARA in "".join(agent.tags)]
    assert gateway.backend.turns[0].sent.agent_id == made.id
    assert (await gateway.say(user=CARA)).status == 200
    assert gateway.backend.turns[1].sent.agent_id == made.id


async def test_each_event_goes_out_when_it_comes(gateway: Platform) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    gateway.backend.play(Script((Hold(gates[0]), HEL, Hold(gates[1]), LO, Hold(gates[2]), END)))
    async with gateway.connect() as connection:
        await gateway.start(connection)
        assert shown(await gateway.messages()) == [HELLO, ("assistant", "running", "")], "stored before it is sent"
        gates[0].set()
        await connection.head()
        pieces = connection.pieces()
        assert [name for name, _ in events(await anext(pieces))] == ["start", "text"]
        gates[1].set()
        assert events(await anext(pieces)) == [("text", {"delta": "lo"})]
        assert shown(await gateway.messages())[1][1] == "running"
        gates[2].set()
        assert [name for name, _ in events(await anext(pieces))] == ["usage", "done"]


async def test_message_is_stored_before_the_agent_gets_it(gateway: Platform) -> None:
    seen: list[list[tuple[str, str, str]]] = []
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, END), opening=(Hold(gate),)))
    async with gateway.connect() as connection:
        await gateway.start(connection)
        seen.append(shown(await gateway.messages()))
        gate.set()
        await connection.answer()
    assert seen == [[HELLO, ("assistant", "running", "")]]


@BOTH
async def test_message_of_a_megabyte_and_odd_text(gateway: Platform, *, stream: bool) -> None:
    long = "😀\u202e\u2028é" * 100_000
    gateway.backend.play(says("a\0b" + "\u0001" * 20_000, "𝄞"))
    answer = await gateway.say(long, stream=stream)
    assert answer.status == 200
    question, told = await gateway.messages()
    assert question.text == long
    assert told.text == "a\ufffdb" + "\u0001" * 20_000 + "𝄞"
    if stream:
        assert "".join(data["delta"] for name, data in events(answer) if name == "text") == told.text


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [({"message": ""}, "message"), ({"message": "a\0b"}, "message"), ({}, "message"), ({"message": 1}, "message")],
)
async def test_wrong_field(gateway: Platform, given: dict[str, Any], param: str) -> None:
    answer = await gateway.ask("POST", MESSAGE, {**JSON, **token(ANN)}, str(given).replace("'", '"').encode())
    assert answer.status == 400
    if b"invalid_json" not in answer.body:
        assert answer.error["param"] == param
    assert gateway.backend.turns == []
    assert await gateway.messages() == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer token-nobody"}, key(ANN)])
@pytest.mark.parametrize(("method", "path"), [("POST", MESSAGE), ("GET", HISTORY), ("DELETE", HISTORY)])
async def test_nobody_comes_in_without_an_access_token(
    gateway: Platform, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = await gateway.ask(method, path, {**JSON, **headers}, body() if method == "POST" else b"")
    assert answer.status == 401
    assert gateway.backend.turns == []


@BOTH
async def test_budget_that_is_used_up(gateway: Platform, *, stream: bool) -> None:
    await gateway.spend(ANN, 0)
    answer = await gateway.say(stream=stream, headers=KEY)
    assert (answer.status, answer.code) == (402, "budget_exceeded")
    assert gateway.backend.turns == []
    assert shown(await gateway.messages()) == NOT_SENT
    await gateway.spend(ANN, 1_000_000)
    assert (await gateway.say(stream=stream, headers=KEY)).status == 200, "the same message, once there is money"
    assert len(await gateway.messages()) == 2


REFUSALS: list[tuple[Script, int, str]] = [
    (Script(opening=(Break(UpstreamUnavailable(should_retry=True)),)), 503, "upstream_unavailable"),
    (Script(opening=(Break(UpstreamRateLimited()),)), 429, "upstream_rate_limited"),
    (Script(opening=(Break(AgentGone(should_retry=False)),)), 404, "agent_missing"),
    (Script((Break(UpstreamRateLimited()),)), 429, "upstream_rate_limited"),
]


@BOTH
@pytest.mark.parametrize(("script", "status", "code"), REFUSALS, ids=["unreachable", "limited", "gone", "later"])
async def test_message_that_may_be_sent_again_is_kept_as_failed_until_it_is(
    gateway: Platform, script: Script, status: int, code: str, *, stream: bool
) -> None:
    gateway.backend.play(script)
    answer = await gateway.say(stream=stream, headers=KEY)
    assert (answer.status, answer.code) == (status, code)
    assert shown(await gateway.messages()) == NOT_SENT
    assert {message.error_code for message in await gateway.messages()} == {code}
    assert (await gateway.say(stream=stream, headers=KEY)).status == 200
    assert shown(await gateway.messages()) == [HELLO, ("assistant", "complete", "Hello, world!")]


async def test_agent_that_is_busy_is_a_409() -> None:
    async with platform(queue_wait=0.1) as gateway:
        gateway.backend.play(Script(opening=(Break(ConversationBusy()),) * 50))
        answer = await gateway.say()
        assert (answer.status, answer.code) == (409, "conversation_busy")
        assert shown(await gateway.messages()) == NOT_SENT


FAILURES: list[tuple[Script, int, str]] = [
    (Script(opening=(Break(UpstreamTimeout(should_retry=False)),)), 504, "upstream_timeout"),
    (Script((Break(TurnFailed(should_retry=False)),)), 502, "agent_run_failed"),
    (Script(([Failure(TurnFailed(should_retry=False))],)), 502, "agent_run_failed"),
    (Script(), 502, "upstream_stream_truncated"),
]


@BOTH
@pytest.mark.parametrize(("script", "status", "code"), FAILURES, ids=["opening", "broken", "told", "empty"])
async def test_failure_before_a_word(
    gateway: Platform, script: Script, status: int, code: str, *, stream: bool
) -> None:
    gateway.backend.play(script)
    answers = [await gateway.say(stream=stream, headers=KEY) for _ in range(2)]
    assert {(answer.status, answer.code) for answer in answers} == {(status, code)}
    question, told = await gateway.messages()
    assert (question.text, told.status, told.text, told.error_code) == ("Hello?", "failed", "", code)
    assert len(gateway.backend.turns) == 1, "it may have reached the agent: it is not sent again"


@BOTH
@pytest.mark.parametrize(
    "end",
    [Break(UpstreamTruncated(should_retry=False)), [Failure(TurnFailed(should_retry=False))], Pause(0)],
    ids=["broken", "told", "cut off"],
)
async def test_failure_in_the_midst(gateway: Platform, end: Step, *, stream: bool) -> None:
    gateway.backend.play(Script((HEL, end)))
    answer = await gateway.say(stream=stream)
    told = (await gateway.messages())[1]
    assert (told.status, told.text) == ("failed", "Hel")
    if stream:
        assert [name for name, _ in events(answer)] == ["start", "text", "error"]
        assert events(answer)[-1][1]["error"]["code"] == told.error_code
        assert answer.complete
    else:
        assert (answer.status, answer.code) == (502, told.error_code)
    await gateway.settled()


async def test_error_says_nothing_of_what_is_behind(gateway: Platform) -> None:
    gateway.backend.down = UpstreamUnavailable(should_retry=True)
    answer = await gateway.say(user=CARA)
    assert answer.status == 503
    assert b"letta.invalid" not in answer.body
    assert CARA.encode() not in answer.body


async def test_message_is_kept_where_the_agent_cannot_be_made_yet(gateway: Platform) -> None:
    gateway.backend.down = UpstreamUnavailable(should_retry=True)
    headers = {"Idempotency-Key": "order-1"}
    answer = await gateway.say("Remember this", user=CARA, headers=headers, stream=False)
    assert answer.status == 503
    question, told = await gateway.messages(CARA)
    assert (question.text, question.status, told.status) == ("Remember this", "failed", "failed")
    gateway.backend.down = None
    assert (await gateway.say("Remember this", user=CARA, headers=headers, stream=False)).status == 200
    question, told = await gateway.messages(CARA)
    assert (question.text, question.status, told.status) == ("Remember this", "complete", "complete")


# Repeated ------------------------------------------------------------------------------------------------------------


@BOTH
async def test_repeated_request_is_the_same_message(gateway: Platform, *, stream: bool) -> None:
    answers = [await gateway.say(stream=stream, headers=KEY) for _ in range(3)]
    gateway.app[keys.ATTEMPTS]._known.clear()
    answers.append(await gateway.say(stream=stream, headers=KEY))
    assert len({answer.body for answer in answers}) == 1
    assert len(gateway.backend.turns) == 1
    assert len(await gateway.messages()) == 2
    other = await gateway.say("Something else", stream=stream, headers=KEY)
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    assert (await gateway.say(user=BEN, stream=stream, headers=KEY)).status == 200, "another user's key is another's"
    assert len(gateway.backend.turns) == 2


@BOTH
async def test_two_at_once_are_one_message(gateway: Platform, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
    asked = [gateway.app[keys.TASKS].spawn(gateway.say(stream=stream, headers=KEY), "client") for _ in range(3)]
    await until(lambda: gateway.backend.turns)
    gate.set()
    assert len({(await task).body for task in asked}) == 1
    assert len(await gateway.messages()) == 2


async def test_same_words_twice_are_two_messages(gateway: Platform) -> None:
    for _ in range(2):
        await gateway.say()
    assert len(await gateway.messages()) == 4


# Clients that go away ------------------------------------------------------------------------------------------------


@BOTH
async def test_client_leaves_before_the_turn(gateway: Platform, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), END)))
    async with gateway.connect() as first:
        await gateway.start(first, "first")
        async with gateway.connect() as second:
            await second.send(sent("second", stream=stream))
            await gateway.eventually(lambda messages: len(messages) == 4)
        await gateway.eventually(lambda messages: messages[3].status != "running")
        gate.set()
        await first.answer()
    assert shown(await gateway.ended()) == [
        ("user", "complete", "first"),
        ("assistant", "complete", "Hel"),
        ("user", "complete", "second"),
        ("assistant", "interrupted", ""),
    ]
    assert len(gateway.backend.turns) == 1, "the agent never got it"
    await gateway.settled()


@BOTH
@pytest.mark.parametrize(
    "script", [Script((Hang(),)), Script(opening=(Hang(),))], ids=["before a word", "while it is sent"]
)
async def test_client_leaves_before_a_word(gateway: Platform, script: Script, *, stream: bool) -> None:
    gateway.backend.play(script)
    async with gateway.connect() as connection:
        await gateway.start(connection, stream=stream)
    assert shown(await gateway.ended()) == [HELLO, ("assistant", "interrupted", "")]
    await gateway.settled()
    assert gateway.backend.turns[0].cancelled
    assert (await gateway.booked()) == [(ANN, "platform", "interrupted")]


@BOTH
async def test_client_leaves_in_the_midst(gateway: Platform, *, stream: bool) -> None:
    tool = ServerToolCall("call-1", "search", "{}")
    gateway.backend.play(Script(([ReasoningDelta("Hm"), tool], HEL, Hang())))
    async with gateway.connect() as connection:
        await gateway.start(connection, stream=stream)
        await until(lambda: gateway.backend.turns[0].heard == 2)
    told = (await gateway.ended())[1]
    assert (told.status, told.text, told.reasoning, told.error_code) == ("interrupted", "Hel", "Hm", None)
    assert [call.status for call in told.activity] == ["failed"]
    await gateway.settled()
    assert gateway.backend.turns[0].cancelled
    assert (await gateway.booked()) == [(ANN, "platform", "interrupted")], "billed once"


class SlowHistory(History):
    """A history whose steps wait until they are let go on."""

    slow = ""
    begun: asyncio.Event
    gate: asyncio.Event

    async def begin(self, *given: Any) -> Message:
        await self._pass("begin")
        return await super().begin(*given)

    async def end(self, *given: Any) -> Message | None:
        await self._pass("end")
        return await super().end(*given)

    async def _pass(self, step: str) -> None:
        if step == self.slow:
            self.begun.set()
            await self.gate.wait()


@BOTH
@pytest.mark.parametrize(("step", "status"), [("begin", "interrupted"), ("end", "complete")])
async def test_client_leaves_during_the_save(step: str, status: str, *, stream: bool) -> None:
    async with platform() as gateway:
        history = gateway.app[keys.HISTORY]
        history.__class__ = SlowHistory
        assert isinstance(history, SlowHistory)
        history.slow, history.begun, history.gate = step, asyncio.Event(), asyncio.Event()
        async with gateway.connect() as connection:
            await connection.send(sent(stream=stream))
            await asyncio.wait_for(history.begun.wait(), 5)
        await asyncio.sleep(0.1)
        history.gate.set()
        await gateway.eventually(lambda messages: len(messages) == 2)
        question, told = await gateway.ended()
        assert (question.text, told.status) == ("Hello?", status)
        assert told.text == ("Hello, world!" if step == "end" else "")
        await gateway.settled()


@BOTH
async def test_client_leaves_and_the_agent_goes_on_where_the_operator_wants_that(*, stream: bool) -> None:
    async with platform(on_disconnect="finish") as gateway:
        gate = asyncio.Event()
        gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
        async with gateway.connect() as connection:
            await gateway.start(connection, stream=stream)
            await until(lambda: gateway.backend.turns[0].heard)
        await asyncio.sleep(0.1)
        assert shown(await gateway.messages())[1] == ("assistant", "running", "")
        gate.set()
        assert shown(await gateway.ended()) == [HELLO, ("assistant", "complete", "Hello")]
        await gateway.settled()
        assert not gateway.backend.turns[0].cancelled
        assert await gateway.booked() == [(ANN, "platform", "complete")]


@BOTH
async def test_client_with_a_key_leaves_and_comes_back(gateway: Platform, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
    async with gateway.connect() as connection:
        await gateway.start(connection, stream=stream, headers=KEY)
        await until(lambda: gateway.backend.turns[0].heard)
    gate.set()
    answer = await gateway.say(stream=stream, headers=KEY)
    message = events(answer)[-1][1]["message"] if stream else answer.json()["message"]
    assert message["text"] == "Hello"
    assert shown(await gateway.messages()) == [HELLO, ("assistant", "complete", "Hello")]


async def test_sdk_that_leaves_and_does_not_come_back(gateway: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.05)
    gateway.backend.play(Script((Hang(),)))
    async with gateway.connect() as connection:
        await gateway.start(connection, headers={"x-stainless-retry-count": "0"})
    assert shown(await gateway.ended()) == [HELLO, ("assistant", "interrupted", "")]


async def test_slow_reader_is_given_up() -> None:
    async with platform(write_timeout=0.2) as gateway:
        pieces: list[Step] = [[TextDelta("x" * 4_000)] for _ in range(2_000)]
        gateway.backend.play(Script((*pieces, END)))
        async with gateway.connect() as connection:
            await gateway.start(connection)
            await until(lambda: gateway.backend.turns[0].cancelled)
        question, told = await gateway.ended()
        assert (question.text, told.status) == ("Hello?", "interrupted")
        assert 0 < len(told.text) < 8_000_000
        assert set(told.text) == {"x"}
        await gateway.settled()


async def test_gateway_that_goes_away_keeps_how_far_it_came(gateway: Platform) -> None:
    gateway.backend.play(Script((HEL, Hang())))
    async with gateway.connect() as connection:
        await gateway.start(connection)
        await until(lambda: gateway.backend.turns[0].heard)
        await gateway.app[keys.TURNS].end()
        answer = await connection.answer()
    assert events(answer)[-1][1]["error"]["code"] == "shutting_down"
    told = (await gateway.ended())[1]
    assert (told.status, told.text, told.error_code) == ("interrupted", "Hel", "shutting_down")


# A database that is away ---------------------------------------------------------------------------------------------


class Failing(History):
    """A history that cannot be written for some steps."""

    failures: dict[str, int]

    async def begin(self, *given: Any) -> Message:
        self._fail("begin")
        return await super().begin(*given)

    async def note_turn(self, *given: Any) -> None:
        self._fail("note")
        await super().note_turn(*given)

    async def end(self, *given: Any) -> Message | None:
        self._fail("end")
        return await super().end(*given)

    def _fail(self, step: str) -> None:
        if self.failures.get(step):
            self.failures[step] -= 1
            raise StorageUnavailable("locked")


def failing(gateway: Platform, **failures: int) -> None:
    history = gateway.app[keys.HISTORY]
    history.__class__ = Failing
    assert isinstance(history, Failing)
    history.failures = failures


@BOTH
async def test_message_that_cannot_be_stored_is_not_sent(gateway: Platform, *, stream: bool) -> None:
    failing(gateway, begin=1)
    answer = await gateway.say(stream=stream, headers=KEY)
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (503, "storage_unavailable", "true")
    assert gateway.backend.turns == []
    assert await gateway.messages() == []
    assert (await gateway.say(stream=stream, headers=KEY)).status == 200
    assert len(await gateway.messages()) == 2


@BOTH
async def test_answer_that_cannot_be_stored_is_stored_later(
    gateway: Platform, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    monkeypatch.setattr(platform_chat, "LATER", (0.05, 0.05))
    failing(gateway, end=2)
    answer = await gateway.say(stream=stream)
    if stream:
        assert [name for name, _ in events(answer)][-1] == "error", "what is not kept is not told as done"
        assert events(answer)[-1][1]["error"]["code"] == "storage_unavailable"
    else:
        assert (answer.status, answer.code, answer.header("x-should-retry")) == (503, "storage_unavailable", "false")
    assert shown(await gateway.ended()) == [HELLO, ("assistant", "complete", "Hello, world!")]


async def test_answer_that_is_never_stored(gateway: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_chat, "LATER", (0.01, 0.01))
    failing(gateway, end=9)
    await gateway.say()
    await asyncio.sleep(0.1)
    assert shown(await gateway.messages()) == [HELLO, ("assistant", "running", "")]
    assert (await gateway.say("and now?")).status == 200


async def test_turn_that_cannot_be_noted_is_noted_at_the_end(gateway: Platform) -> None:
    failing(gateway, note=1)
    answer = await gateway.say(stream=False)
    assert answer.json()["usage"]["prompt_tokens"] == 100


# The history ---------------------------------------------------------------------------------------------------------


async def test_pages(gateway: Platform) -> None:
    for number in range(3):
        gateway.backend.play(says(f"{number}!"))
        await gateway.say(f"{number}?")
    first = (await gateway.history("?limit=4")).json()
    assert [message["text"] for message in first["data"]] == ["2!", "2?", "1!", "1?"]
    await gateway.say("new")
    second = (await gateway.history(f"?limit=4&cursor={first['next_cursor']}")).json()
    assert [message["text"] for message in second["data"]] == ["0!", "0?"]
    assert second["next_cursor"] is None


async def test_each_user_sees_their_own(gateway: Platform) -> None:
    await gateway.say("Ann's")
    await gateway.say("Ben's", user=BEN)
    for user, own in ((ANN, "Ann's"), (BEN, "Ben's")):
        assert [message.text for message in await gateway.messages(user) if message.role == "user"] == [own]
    bens = (await gateway.messages(BEN))[0].id
    others = await gateway.history(f"?cursor={bens}")
    unknown = await gateway.history("?cursor=msg_" + "0" * 32)
    assert (others.status, others.code) == (404, "message_not_found")
    assert others.body == unknown.body


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=-1", "limit"),
        ("?limit=101", "limit"),
        ("?limit=1000000000", "limit"),
        ("?limit=1.5", "limit"),
        ("?limit=ten", "limit"),
        ("?limit=1&limit=2", "limit"),
        ("?cursor=';--", "cursor"),
        ("?cursor=%00", "cursor"),
        ("?cursor=..%2f..%2fetc", "cursor"),
        ("?cursor=" + "x" * 5_000, "cursor"),
    ],
)
async def test_query_that_is_wrong(gateway: Platform, query: str, param: str) -> None:
    answer = await gateway.history(query)
    assert answer.status == 400
    assert answer.error["param"] == param


async def test_fields_of_the_query_that_nobody_knows_are_ignored(gateway: Platform) -> None:
    assert (await gateway.history(f"?user_id={BEN}&offset=1")).json() == {"data": [], "next_cursor": None}


async def test_deleted_history(gateway: Platform) -> None:
    await gateway.say()
    await gateway.say(user=BEN)
    answer = await gateway.ask("DELETE", HISTORY, token(ANN))
    assert (answer.status, answer.body) == (204, b"")
    assert await gateway.messages() == []
    assert len(await gateway.messages(BEN)) == 2
    assert gateway.backend.gone == [], "the agent stays"
    assert len(await gateway.booked()) == 2, "and so does what it cost"


@BOTH
async def test_deleted_history_is_told_by_no_key(gateway: Platform, *, stream: bool) -> None:
    headers = {"Idempotency-Key": "order-1"}
    assert (await gateway.say("my secret is 42", headers=headers, stream=stream)).status == 200
    stored = await gateway.ask("POST", "/v1/responses", {**JSON, **key(ANN)}, b'{"model":"own-a","input":"secret"}')
    others = await gateway.ask("POST", "/v1/responses", {**JSON, **key(BEN)}, b'{"model":"own-b","input":"secret"}')
    await gateway.ask("DELETE", HISTORY, token(ANN))
    turns = len(gateway.backend.turns)
    for _ in range(2):
        answer = await gateway.say("my secret is 42", headers=headers, stream=stream)
        assert (answer.status, answer.code) == (409, "outcome_unknown")
        gateway.app[keys.ATTEMPTS]._known.clear()  # as a minute later, or after a restart
    assert len(gateway.backend.turns) == turns, "the agent heard it once"
    path = f"/v1/responses/{stored.json()['id']}"
    assert (await gateway.ask("GET", path, key(ANN))).status == 404
    assert (await gateway.ask("GET", f"/v1/responses/{others.json()['id']}", key(BEN))).status == 200


async def test_answer_under_way_is_not_kept_by_its_key_when_the_history_is_deleted(gateway: Platform) -> None:
    gate, headers = asyncio.Event(), {"Idempotency-Key": "order-1"}
    gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
    async with gateway.connect() as connection:
        await gateway.start(connection, stream=False, headers=headers)
        await gateway.ask("DELETE", HISTORY, token(ANN))
        gate.set()
        assert (await connection.answer()).json()["message"]["text"] == "Hello"
    gateway.app[keys.ATTEMPTS]._known.clear()
    assert (await gateway.say("Hello?", headers=headers, stream=False)).code == "outcome_unknown"


@BOTH
async def test_history_that_is_deleted_during_an_answer(gateway: Platform, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
    async with gateway.connect() as connection:
        await gateway.start(connection, stream=stream)
        await gateway.ask("DELETE", HISTORY, token(ANN))
        gate.set()
        answer = await connection.answer()
    message = events(answer)[-1][1]["message"] if stream else answer.json()["message"]
    assert (message["text"], message["status"]) == ("Hello", "complete")
    assert await gateway.messages() == []


# Crashes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=[pytest.mark.services, pytest.mark.timeout(600)])])
async def test_gateway_that_is_killed_keeps_every_message_once(tmp_path: Path, rounds: int) -> None:
    command: list[str | Path] = [sys.executable, "-m", "tests.handlers.crashing_gateway", tmp_path, str(rounds)]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    acks = [line.split() for line in (tmp_path / "acks").read_text().splitlines()]
    asked, answered = ({words for kind, words, *_ in acks if kind == wanted} for wanted in ("asked", "done"))
    again = {(words, status) for kind, words, *rest in acks if kind == "status" for status in rest}
    assert len({words.split("-")[1] for words in asked}) >= rounds // 2, "most rounds saw messages"
    assert {status for _, status in again} <= {"200", "409"}
    async with opened(SqliteFile(tmp_path / "gateway.db")) as database:
        await History(database, Instances(database, "afterwards")).reconcile()
        async with database.read() as connection:
            assert (await connection.execute(text("PRAGMA integrity_check"))).scalars().all() == ["ok"]
            rows = (await connection.execute(select(messages).order_by(messages.c.position))).all()
    questions, answers = rows[::2], rows[1::2]
    assert {row.role for row in questions} == {"user"}
    assert {row.role for row in answers} == {"assistant"}
    kept = {question.text: answer for question, answer in zip(questions, answers, strict=True)}
    assert len(kept) == len(questions), "none twice"
    assert asked <= kept.keys()
    assert {words for words, status in again if status == "200"} <= kept.keys()
    assert all((kept[words].status, kept[words].text) == ("complete", "Hello") for words in answered)
    assert {row.status for row in answers} <= {"complete", "interrupted"}
