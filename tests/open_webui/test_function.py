import asyncio
import contextlib
import json
import sys
import types
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anyio
import pytest

from gateway.errors import TurnFailed
from gateway.letta.scripted import Hang, Script
from gateway.open_webui import function as function_file
from gateway.translation.agent_events import Batch, Failure, ReasoningDelta, Stop, TextDelta, Usage
from tests.letta import recorded
from tests.open_webui.letta_server import AGENT, playing
from tests.open_webui.shared_part import FOLDER, copied
from tests.server.running import Running, serving
from tests.server.wire import until

Body = dict[str, Any]

HI: Body = {"model": "letta.friend", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
HM: Batch = [ReasoningDelta("Hm")]
HELLO: Batch = [TextDelta("Hello")]
END: Batch = [Stop("end_turn"), Usage(10, 2)]


def pipe_at(url: str, **valves: Any) -> function_file.Pipe:
    """Make the function as Open WebUI does: from its text, in a module of its own."""
    module = types.ModuleType("function_letta")
    sys.modules[module.__name__] = module
    exec((FOLDER / "function.py").read_text("utf-8"), module.__dict__)  # noqa: S102
    pipe: function_file.Pipe = module.Pipe()
    pipe.valves = pipe.Valves(base_url=url, **valves)
    return pipe


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


@contextlib.asynccontextmanager
async def closing(pipe: function_file.Pipe) -> AsyncIterator[function_file.Pipe]:
    try:
        yield pipe
    finally:
        await pipe._letta.close()


@pytest.fixture
async def pipe(gateway: Running) -> AsyncIterator[function_file.Pipe]:
    async with closing(pipe_at(f"http://127.0.0.1:{gateway.port}/v1")) as made:
        yield made


class Emitted(list[Body]):
    """What the event emitter was given."""

    async def __call__(self, event: Body) -> None:
        self.append(event)


async def lines(pipe: function_file.Pipe, body: Body = HI, **more: Any) -> list[Body]:
    answer = await pipe.pipe(body, **more)
    assert isinstance(answer, AsyncGenerator)
    return [line async for line in answer]


def test_shared_part_is_the_pipelines() -> None:
    function = (FOLDER / "function.py").read_text("utf-8")
    assert function == copied(), "run `make open-webui-function`"


async def test_agents_are_its_models(pipe: function_file.Pipe) -> None:
    assert await pipe.pipes() == [{"id": "friend", "name": "friend"}]
    pipe.valves.agent_id = "friend"
    assert await pipe.pipes() == [{"id": "friend", "name": "friend"}]


async def test_server_that_is_not_there_is_told_among_the_models() -> None:
    async with closing(pipe_at("http://127.0.0.1:9")) as pipe:
        (listed,) = await pipe.pipes()
        assert listed["id"] == "unavailable"
        (failed,) = await lines(pipe)
        assert failed["error"]["code"] == "unreachable"
        pipe.valves.agent_id = "friend"
        assert await pipe.pipes() == [{"id": "friend", "name": "friend"}]


async def test_agents_stay_while_the_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing() as letta, closing(pipe_at(letta.url)) as pipe:
        known = await pipe.pipes()
        assert known == [{"id": AGENT["id"], "name": "friend"}]
        asked = len(letta.asked)
        assert await pipe.pipes() == known
        assert len(letta.asked) == asked, "the agents are as they were a moment ago"
    monkeypatch.setitem(type(pipe).pipes.__globals__, "REFRESH", 0.0)
    assert await pipe.pipes() == known, "the server is gone"
    pipe.valves = pipe.Valves(base_url=letta.url, api_key="another")
    assert [model["id"] for model in await pipe.pipes()] == ["unavailable"], "who knows whose they are"


async def test_server_that_hangs_holds_up_the_models_for_a_moment() -> None:
    async with playing() as letta, closing(pipe_at(letta.url)) as pipe:
        letta.answers.clear()
        within = type(pipe).pipes.__globals__
        assert within["LIST_WITHIN"] <= 3
        within["LIST_WITHIN"] = 0.2
        async with asyncio.timeout(2):
            (listed,) = await pipe.pipes()
        assert listed["id"] == "unavailable"
        letta.answers.set()
        assert await pipe.pipes() == [{"id": AGENT["id"], "name": "friend"}]


async def test_streamed_answer(gateway: Running, pipe: function_file.Pipe) -> None:
    gateway.backend.play(Script((HM, HELLO, END)))
    *told, usage = await lines(pipe)
    deltas = [line["choices"][0]["delta"] for line in told]
    assert deltas == [{"reasoning_content": "Hm"}, {"content": "Hello"}]
    assert usage["usage"]["total_tokens"] == 12
    json.dumps(told)


async def test_whole_answer(gateway: Running, pipe: function_file.Pipe) -> None:
    gateway.backend.play(Script((HM, HELLO, END)))
    answer = await pipe.pipe({**HI, "stream": False})
    assert isinstance(answer, dict)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}


async def test_chat_and_task_of_the_metadata(gateway: Running, pipe: function_file.Pipe) -> None:
    await lines(pipe, __metadata__={"chat_id": "chat-1"})
    await lines(pipe, __metadata__={"chat_id": "chat-1"}, __task__="title_generation")
    chat, title = (turn.sent.conversation_id for turn in gateway.backend.turns)
    assert chat != title
    await until(lambda: gateway.backend.deleted == [title])


async def test_error_is_an_event_and_what_open_webui_shows(gateway: Running, pipe: function_file.Pipe) -> None:
    gateway.backend.play(Script((HELLO, [Failure(TurnFailed(should_retry=False))])))
    emitted = Emitted()
    _, failed = await lines(pipe, __event_emitter__=emitted)
    assert failed["error"]["code"] == "agent_run_failed"
    (event,) = emitted
    assert event["type"] == "chat:error"


async def test_tools_are_shown_beside_the_answer() -> None:
    stream = recorded.stream("stream-server-side-tool")
    async with playing(stream) as letta, closing(pipe_at(letta.url)) as pipe:
        emitted = Emitted()
        told = await lines(pipe, __event_emitter__=emitted)
    assert [event["data"]["description"] for event in emitted] == ["Using memory_insert", "memory_insert failed"]
    assert all("event" not in line for line in told)


@pytest.mark.parametrize("shown", [True, False])
async def test_what_a_user_wants_to_see(gateway: Running, pipe: function_file.Pipe, *, shown: bool) -> None:
    gateway.backend.play(Script((HM, HELLO, END)))
    told = await lines(pipe, __user__={"id": "user-1", "valves": pipe.UserValves(show_reasoning=shown)})
    assert ("reasoning_content" in json.dumps(told)) == shown


async def test_reader_that_leaves_cancels_the_turn(gateway: Running, pipe: function_file.Pipe) -> None:
    gateway.backend.play(Script((HELLO, Hang())))
    answer = await pipe.pipe(HI)
    assert isinstance(answer, AsyncGenerator)
    await anext(answer)
    await answer.aclose()
    await until(lambda: gateway.backend.turns[0].cancelled)


BEGUN = b"".join(
    b"data: %s\n\n" % json.dumps({"run_id": "run-1", **frame}).encode()
    for frame in ({"message_type": "ping"}, {"message_type": "assistant_message", "id": "m1", "content": "Hel"})
)
TITLE: Body = {"chat_id": "chat-1", "task": "title_generation"}


@pytest.mark.parametrize("metadata", [{}, TITLE], ids=["own thread", "aside"])
async def test_client_of_open_webuis_that_goes_away_ends_the_run(metadata: Body) -> None:
    """Starlette cancels the scope that reads the answer: every wait in it fails from then on, not just the first."""
    async with playing(BEGUN) as letta, closing(pipe_at(letta.url)) as pipe:
        letta.holds.clear()
        with anyio.CancelScope() as scope:
            answer = await pipe.pipe(HI, __metadata__=metadata)
            assert isinstance(answer, AsyncGenerator)
            async for _ in answer:
                scope.cancel()
        assert scope.cancelled_caught
        await until(lambda: letta.cancelled == ["run-1"])
        await until(lambda: letta.paths("DELETE") == (["/v1/conversations/conv-1"] if metadata else []))


@pytest.mark.parametrize("metadata", [{}, TITLE], ids=["own thread", "aside"])
async def test_client_that_goes_away_before_the_first_word_ends_the_run(metadata: Body) -> None:
    async with playing(BEGUN) as letta, closing(pipe_at(letta.url)) as pipe:
        letta.begins.clear()
        letta.holds.clear()
        reading = asyncio.get_running_loop().create_task(lines(pipe, __metadata__=metadata))
        await until(lambda: letta.live == 1)
        reading.cancel()
        letta.begins.set()
        await until(lambda: letta.cancelled == ["run-1"])
        await until(lambda: letta.paths("DELETE") == (["/v1/conversations/conv-1"] if metadata else []))
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_next_turn_waits_until_the_one_that_was_left_has_ended() -> None:
    async with playing(BEGUN, BEGUN) as letta, closing(pipe_at(letta.url)) as pipe:
        letta.begins.clear()
        letta.holds.clear()
        left = asyncio.get_running_loop().create_task(lines(pipe))
        await until(lambda: letta.live == 1)
        left.cancel()
        later = asyncio.get_running_loop().create_task(lines(pipe))
        await asyncio.sleep(0.1)
        assert letta.live == 1
        letta.begins.set()
        await until(lambda: letta.cancelled == ["run-1"])
        await until(lambda: len(letta.turns) == 2)
        letta.holds.set()
        assert (await later)[-1]["error"]["code"] == "answer_cut_off"
        with pytest.raises(asyncio.CancelledError):
            await left


async def test_one_client(pipe: function_file.Pipe) -> None:
    assert pipe.get_client() is pipe.get_client()
