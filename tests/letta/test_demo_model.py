import asyncio
from collections.abc import AsyncIterator, Callable

import aiohttp
import msgspec
import openai
import pytest

from gateway.letta.demo_model import RunningDemoModel, running_demo_model

TOOL: openai.types.chat.ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
async def model() -> AsyncIterator[RunningDemoModel]:
    async with running_demo_model() as running:
        yield running


@pytest.fixture
async def client(model: RunningDemoModel) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=model.base_url, api_key="x", max_retries=0) as sdk:
        yield sdk


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not true():  # noqa: ASYNC110 - the recorder counts, it does not signal
            await asyncio.sleep(0.01)


async def test_one_model_is_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]


async def test_a_stream_as_the_sdk_sees_it(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello there"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.delta.content for chunk in chunks for choice in chunk.choices] == [
        "You",
        " said:",
        " Hello",
        " there",
        None,
    ]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


async def test_reasoning_is_streamed_before_the_text(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "think hard"}], stream=True
    )
    kinds = [
        "reasoning" if getattr(chunk.choices[0].delta, "reasoning_content", None) else "text" async for chunk in stream
    ]
    assert kinds == ["reasoning"] * 5 + ["text"] * 5


async def test_a_whole_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "think hard"}])
    assert answer.choices[0].message.content == "You said: think hard"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_tool_call(client: openai.AsyncOpenAI, streamed: bool) -> None:  # noqa: FBT001 - a parameter of the test
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "call get_weather now"}]
    if streamed:
        async with client.chat.completions.stream(model="demo", messages=messages, tools=[TOOL]) as stream:
            answer: openai.types.chat.ChatCompletion = await stream.get_final_completion()
    else:
        answer = await client.chat.completions.create(model="demo", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.tool_calls is not None
    call = answer.choices[0].message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    assert call.id.startswith("call-")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
async def test_failing(client: openai.AsyncOpenAI, status: int, error: type[openai.APIStatusError]) -> None:
    with pytest.raises(error) as caught:
        await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": f"fail with {status}"}]
        )
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings"])
async def test_a_body_that_makes_no_sense_is_refused(model: RunningDemoModel, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(model.base_url + path, data=b"{") as response:
        assert response.status == 400
        assert "message" in (await response.json())["error"]


async def test_embeddings_are_unit_vectors_and_the_same_each_time(client: openai.AsyncOpenAI) -> None:
    both = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
    again = await client.embeddings.create(model="x", input="a", encoding_format="float")
    assert len(both.data[0].embedding) == 1536
    assert sum(value * value for value in again.data[0].embedding) == pytest.approx(1)
    assert both.data[0].embedding == pytest.approx(again.data[0].embedding, abs=1e-6)
    assert both.data[0].embedding != both.data[1].embedding


async def test_requests_are_remembered_as_they_came(client: openai.AsyncOpenAI, model: RunningDemoModel) -> None:
    await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "remember"}], seed=7)
    seen = model.requests[-1]
    assert seen.path == "/v1/chat/completions"
    assert msgspec.json.decode(seen.body)["seed"] == 7


@pytest.mark.parametrize("script", ["hang", "hang after 2 words", "count to 1000 every 10 ms"])
async def test_a_client_that_goes_away_is_noticed(
    model: RunningDemoModel, script: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": script}], "stream": True}
    async with aiohttp.ClientSession() as session:
        async with session.post(model.base_url + "/chat/completions", json=body) as response:
            assert response.status == 200
            await until(lambda: model.recorder.live == 1)
        await until(lambda: model.recorder.aborted == 1)
    assert (model.recorder.live, model.recorder.finished) == (0, 0)
    assert not caplog.records


async def test_breaking_off_gives_no_end(model: RunningDemoModel, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "break off after 2 words"}], "stream": True}
    async with aiohttp.ClientSession() as session, session.post(model.base_url + "/chat/completions", json=body) as got:
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.read()
    assert not caplog.records


async def test_aside() -> None:
    async with (
        running_demo_model(aside="(Only a script.)") as model,
        openai.AsyncOpenAI(base_url=model.base_url, api_key="x", max_retries=0) as client,
    ):
        answer = await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "You said: Hi\n\n(Only a script.)"
