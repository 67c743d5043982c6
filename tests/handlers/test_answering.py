"""Requests that are sent again: by the OpenAI SDK in silence, or by whoever names a key."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway import keys
from gateway.conversations import attempts
from gateway.errors import TurnFailed, UpstreamUnavailable
from gateway.letta.scripted import Break, Hang, Hold, Pause, Script, Step, says
from gateway.translation.agent_events import Batch, Stop, TextDelta, Usage
from tests.server.running import Running, chat_request, serving
from tests.server.wire import Answer, until

HEL: Batch = [TextDelta("Hel")]
LO: Batch = [TextDelta("lo")]
END: Batch = [Stop("end_turn"), Usage(10, 2)]
KEY = {"Idempotency-Key": "order-66"}
FIRST = {"x-stainless-retry-count": "0"}
AGAIN = {"x-stainless-retry-count": "1"}
BOTH = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


def said(answer: Answer) -> str:
    if answer.header("content-type") == "application/json":
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text
    return answer.text


async def ask(gateway: Running, headers: dict[str, str], **more: Any) -> "asyncio.Task[Answer]":
    """Send a request, and see it reach its turn or find another's."""
    task = gateway.app[keys.TASKS].spawn(gateway.chat(headers=headers, **more), "client")
    await asyncio.sleep(0.05)
    return task


# A key ---------------------------------------------------------------------------------------------------------------


@BOTH
async def test_answer_to_a_key_is_told_again(gateway: Running, *, stream: bool) -> None:
    first = await gateway.chat("Hello?", headers=KEY, stream=stream)
    again = await gateway.chat("Hello?", headers=KEY, stream=stream)
    assert said(first) == said(again) == "Hello, world!"
    assert first.body == again.body
    assert len(gateway.backend.turns) == 1


@BOTH
async def test_two_requests_of_a_key_at_once_share_a_turn(gateway: Running, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
    asked = [await ask(gateway, KEY, stream=stream) for _ in range(3)]
    gate.set()
    assert {said(await task) for task in asked} == {"Hello"}
    assert len(gateway.backend.turns) == 1


async def test_key_of_another_request(gateway: Running) -> None:
    await gateway.chat("Hello?", headers=KEY)
    other = await gateway.chat("Something else", headers=KEY)
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    assert len(gateway.backend.turns) == 1


@BOTH
async def test_client_of_a_key_goes_away_and_comes_back(gateway: Running, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
    async with gateway.connect() as connection:
        await connection.send(chat_request(headers=KEY, stream=stream))
        await until(lambda: gateway.backend.turns and gateway.backend.turns[0].heard)
    await asyncio.sleep(0.1)
    gate.set()
    assert said(await gateway.chat(headers=KEY, stream=stream)) == "Hello"
    assert len(gateway.backend.turns) == 1
    assert not gateway.backend.turns[0].cancelled


async def test_failure_that_reached_the_agent_is_told_again(gateway: Running) -> None:
    gateway.backend.play(Script((Break(TurnFailed(should_retry=False)),)))
    answers = [await gateway.chat(headers=KEY) for _ in range(2)]
    assert {(answer.status, answer.code) for answer in answers} == {(502, "agent_run_failed")}
    assert answers[0].body == answers[1].body
    assert len(gateway.backend.turns) == 1


async def test_request_that_did_not_reach_the_agent_is_sent_anew(gateway: Running) -> None:
    gateway.backend.play(Script(opening=(Break(UpstreamUnavailable(should_retry=True)),)), says("Here"))
    assert (await gateway.chat(headers=KEY)).status == 503
    assert said(await gateway.chat(headers=KEY)) == "Here"


@pytest.mark.parametrize("key", ["k" * 256, "\x7f"])
async def test_key_that_is_none(gateway: Running, key: str) -> None:
    answer = await gateway.chat(headers={"Idempotency-Key": key})
    assert answer.status == 400
    assert gateway.backend.turns == []


@BOTH
async def test_answer_to_a_key_survives_a_restart(gateway: Running, *, stream: bool) -> None:
    first = await gateway.chat("Hello?", headers=KEY, stream=stream)
    gateway.app[keys.ATTEMPTS]._known.clear()
    again = await gateway.chat("Hello?", headers=KEY, stream=stream)
    assert first.body == again.body
    assert first.header("content-type") == again.header("content-type")
    assert len(gateway.backend.turns) == 1
    assert (await gateway.chat("Else", headers=KEY, stream=stream)).code == "idempotency_key_reused"


@pytest.mark.parametrize(("first", "again"), [(KEY, KEY), (FIRST, AGAIN)], ids=["key", "sdk"])
async def test_turn_that_a_restart_cut_off_is_not_begun_anew(
    gateway: Running, first: dict[str, str], again: dict[str, str]
) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((HEL, Hold(gate), END)))
    asked = await ask(gateway, first)
    await until(lambda: gateway.backend.turns)
    gateway.app[keys.ATTEMPTS]._known.clear()
    answer = await gateway.chat(headers=again)
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (409, "outcome_unknown", "false")
    gate.set()
    await asked


# The SDK's tries -----------------------------------------------------------------------------------------------------


@BOTH
async def test_sdk_leaves_before_an_answer_and_asks_again(gateway: Running, *, stream: bool) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((Hold(gate), HEL, LO, END)))
    async with gateway.connect() as connection:
        await connection.send(chat_request(headers=FIRST, stream=stream))
        await until(lambda: gateway.backend.turns)
    await asyncio.sleep(0.1)
    again = await ask(gateway, AGAIN, stream=stream)
    gate.set()
    assert said(await again) == "Hello"
    assert len(gateway.backend.turns) == 1


@BOTH
async def test_sdk_that_does_not_come_back_ends_the_turn(
    gateway: Running, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.1)
    gateway.backend.play(Script((Hang(),)))
    async with gateway.connect() as connection:
        await connection.send(chat_request(headers=FIRST, stream=stream))
        await until(lambda: gateway.backend.turns)
    await until(lambda: gateway.backend.turns[0].cancelled)
    assert said(await gateway.chat(headers=AGAIN, stream=stream)) == "Hello, world!", "nothing is left of the first"


async def test_sdk_that_leaves_in_the_middle_of_a_stream_ends_the_turn_at_once(gateway: Running) -> None:
    gateway.backend.play(Script((HEL, Hang())))
    async with gateway.connect() as connection:
        await connection.send(chat_request(headers=FIRST, stream=True))
        await connection.head()
    await until(lambda: gateway.backend.turns[0].cancelled)


async def test_same_words_twice_are_two_messages(gateway: Running) -> None:
    for _ in range(2):
        assert said(await gateway.chat("Hi", headers=FIRST)) == "Hello, world!"
    assert len(gateway.backend.turns) == 2


async def test_try_that_comes_after_a_refusal_is_sent_anew(gateway: Running) -> None:
    gateway.backend.play(Script(opening=(Break(UpstreamUnavailable(should_retry=True)),)), says("Here"))
    assert (await gateway.chat(headers=FIRST)).status == 503
    assert said(await gateway.chat(headers=AGAIN)) == "Here"


async def test_try_with_no_first_one_is_a_request_like_others(gateway: Running) -> None:
    assert said(await gateway.chat(headers=AGAIN)) == "Hello, world!"


async def test_whole_answer_that_was_lost_on_its_way_is_told_again(gateway: Running) -> None:
    first, again = await gateway.chat(headers=FIRST), await gateway.chat(headers=AGAIN)
    assert first.body == again.body
    assert len(gateway.backend.turns) == 1


async def test_stream_that_is_far_along_is_not_told_again(gateway: Running) -> None:
    pieces: list[Step] = [[TextDelta("x" * 4_000)] for _ in range(20)]
    gateway.backend.play(Script((*pieces, Pause(0.3), END)))
    asked = await ask(gateway, FIRST, stream=True)
    answer = await gateway.chat(headers=AGAIN, stream=True)
    assert (answer.status, answer.code) == (409, "outcome_unknown")
    await asked


async def test_chats_with_the_same_words_are_kept_apart(gateway: Running) -> None:
    one, two = ({"X-OpenWebUI-Chat-Id": chat} for chat in ("one", "two"))
    await gateway.chat("Hi", headers={**FIRST, **one})
    await gateway.chat("Hi", headers={**AGAIN, **two})
    assert len(gateway.backend.turns) == 2


async def test_what_is_remembered_is_bounded(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MOST_REMEMBERED", 2_000)
    for number in range(50):
        await gateway.chat(f"Message {number}", headers=FIRST)
    known = gateway.app[keys.ATTEMPTS]._known
    assert sum(attempt.size for _, attempt in known.values()) < 4_000
