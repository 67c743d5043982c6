"""The main job on a real Letta server of either kind: the official OpenAI SDK talks to an agent as if to a model."""

import asyncio
import base64
import itertools
import time
import zlib
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from gateway.letta.demo_model import RunningDemoModel
from tests.live.gateways import gateway_before, sdk
from tests.live.letta_server import Agent, LettaServer
from tests.server.subprocesses import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(letta: LettaServer) -> AsyncIterator[GatewayProcess]:
    # A busy machine may take its time; what is tried here are statuses, not how soon the headers go.
    async with gateway_before(letta, LETTA_GATEWAY_FIRST_BYTE_WAIT="60") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(gateway: GatewayProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(gateway) as client:
        yield client


def user(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


async def stream(client: openai.AsyncOpenAI, model: str, text: str) -> list[tuple[float, ChatCompletionChunk]]:
    answer = await client.chat.completions.create(
        model=model, messages=user(text), stream=True, stream_options={"include_usage": True}
    )
    return [(time.monotonic(), chunk) async for chunk in answer]


def text_of(chunks: list[tuple[float, ChatCompletionChunk]]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for _, chunk in chunks if chunk.choices)


def png() -> str:
    def piece(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = b"\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00"
    body = piece(b"IHDR", header) + piece(b"IDAT", zlib.compress(b"\x00\xff\x00\x00")) + piece(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


async def test_every_agent_is_a_model(client: openai.AsyncOpenAI, letta: LettaServer, agent: Agent) -> None:
    twins = [letta.create_agent("Twin"), letta.create_agent("Twin")]
    try:
        models = {model.id: model async for model in client.models.list()}
        assert models[agent.name].owned_by == "letta"
        if letta.kind == "v1":  # the App Server tells no time of creation
            assert abs(models[agent.name].created - time.time()) < 600
        assert "Twin" not in models
        assert {twin.id for twin in twins} <= set(models)
        assert (await client.models.retrieve(agent.name)).id == agent.name
        assert (await client.models.retrieve(agent.id)).created == models[agent.name].created
        for unknown in (
            agent.name.upper() + "X",
            agent.name[:-1],
            "Twin",
            "agent-00000000-0000-4000-8000-000000000000",
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                await client.models.retrieve(unknown)
            assert refused.value.code == "model_not_found"
    finally:
        for twin in twins:
            letta.delete_agent(twin.id)


async def test_an_agent_made_a_moment_ago_answers_and_one_deleted_is_unknown(letta: LettaServer, agent: Agent) -> None:
    async with gateway_before(letta, LETTA_GATEWAY_MODELS_TTL="60") as gateway, sdk(gateway) as client:
        assert agent.name in {model.id async for model in client.models.list()}
        newcomer = letta.create_agent("Newcomer")
        answer = await client.chat.completions.create(model="Newcomer", messages=user("hello"))
        assert answer.choices[0].message.content == "You said: hello"
        letta.delete_agent(newcomer.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await client.chat.completions.create(model="Newcomer", messages=user("hello"))
        assert gone.value.code == "model_not_found"


@pytest.mark.services
async def test_more_agents_than_a_page(client: openai.AsyncOpenAI, letta: LettaServer) -> None:
    names = [f"Crowd {number}" for number in range(103)]
    with letta.crowd(names):
        assert set(names) <= {model.id async for model in client.models.list()}


async def test_stream_says_what_the_agent_says(client: openai.AsyncOpenAI, agent: Agent) -> None:
    chunks = [chunk for _, chunk in await stream(client, agent.name, "think about it")]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].model == agent.name
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning
    assert reasoning == "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    assert "".join(delta.content or "" for delta in deltas) == "You said: think about it"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["stop"]
    usage = chunks[-1].usage
    assert usage is not None
    assert not chunks[-1].choices
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens


async def test_whole_answer_is_the_folded_stream(client: openai.AsyncOpenAI, agent: Agent) -> None:
    answer = await client.chat.completions.create(model=agent.id, messages=user("think about it"))
    assert answer.choices[0].message.content == "You said: think about it"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.model_extra
    assert answer.choices[0].message.model_extra["reasoning_content"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


async def test_every_event_is_one_chunk_and_comes_as_it_is_said(client: openai.AsyncOpenAI, agent: Agent) -> None:
    words, pause = 25, 0.06
    chunks = await stream(client, agent.name, f"count to {words} every {pause * 1000:.0f} ms")
    arrivals = [when for when, chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert text_of(chunks).split() == [f"word{number}" for number in range(words)]
    assert len(arrivals) == words
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    # Nothing is held back: the words are as far apart as the model says them, not in bursts.
    assert arrivals[-1] - arrivals[0] > (words - 1) * pause * 0.8
    assert sorted(gaps)[len(gaps) // 2] > pause * 0.5
    assert sum(gap < pause * 0.2 for gap in gaps) <= words // 5


async def test_the_agent_keeps_the_memory(client: openai.AsyncOpenAI, agent: Agent, model: RunningDemoModel) -> None:
    await client.chat.completions.create(model=agent.name, messages=user("my cat is called Tiger"))
    await client.chat.completions.create(
        model=agent.name,
        messages=[
            {"role": "user", "content": "a transcript that the client made up"},
            {"role": "assistant", "content": "indeed"},
            {"role": "user", "content": "what is my cat called?"},
        ],
    )
    seen = bytes(model.requests[-1].body).decode()
    assert "my cat is called Tiger" in seen
    assert "what is my cat called?" in seen
    assert "made up" not in seen


async def test_image(client: openai.AsyncOpenAI, letta: LettaServer, agent: Agent, model: RunningDemoModel) -> None:
    answer = await client.chat.completions.create(
        model=agent.name,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "describe image"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png()}"}},
                ],
            }
        ],
    )
    if letta.kind == "v1":
        assert "image/png" in (answer.choices[0].message.content or "")
    else:  # it takes an LM Studio's model for one that sees nothing, and tells it so
        assert "(image omitted: model does not support images)" in bytes(model.requests[-1].body).decode()


async def test_two_turns_on_one_agent_do_not_overlap(letta: LettaServer, agent: Agent, model: RunningDemoModel) -> None:
    async with gateway_before(letta, LETTA_GATEWAY_QUEUE_DEPTH="1") as gateway, sdk(gateway) as client:
        first = asyncio.get_running_loop().create_task(stream(client, agent.name, "count to 30 every 50 ms"))
        await asyncio.sleep(0.6)
        second = asyncio.get_running_loop().create_task(stream(client, agent.name, "second question"))
        await asyncio.sleep(0.2)
        with pytest.raises(openai.ConflictError) as busy:
            await stream(client, agent.name, "third question")
        assert busy.value.code == "conversation_busy"
        assert int(busy.value.response.headers["retry-after"]) >= 1
        assert busy.value.response.headers["x-should-retry"] == "true"
        assert (await first)[-1][0] < next(when for when, _ in await second)
        assert text_of(await second) == "You said: second question"
    # What the model was shown for the second question holds the whole first answer.
    assert "word29" in bytes(model.requests[-1].body).decode()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f.g", "parameters": {}}}]}, "tools[0].function.name"),
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ],
)
async def test_what_an_agent_cannot_do_is_refused_by_name(
    client: openai.AsyncOpenAI, agent: Agent, fields: dict[str, object], param: str
) -> None:
    body: dict[str, object] = {"model": agent.name, "messages": user("hello"), **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


async def test_keys_are_asked_for_and_checked(letta: LettaServer, agent: Agent) -> None:
    keys = {"LETTA_GATEWAY_API_KEYS": "sk-right,sk-other"}
    async with gateway_before(letta, **keys) as gateway:
        async with sdk(gateway, "sk-other") as client:
            assert (await client.chat.completions.create(model=agent.name, messages=user("hi"))).choices
        async with sdk(gateway, "sk-wrong") as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.models.list()
        assert refused.value.code == "invalid_api_key"
        assert "sk-" not in gateway.errors


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("fail with 429", (openai.RateLimitError, "upstream_rate_limited")),
        ("fail with 401", (openai.InternalServerError, "model_auth_failed")),
        ("fail with 500", (openai.InternalServerError, "model_error")),
        ("fail with 400", (openai.BadRequestError, "upstream_rejected")),
    ],
)
async def test_a_failing_model_is_an_error_with_its_status(
    gateway: GatewayProcess,
    client: openai.AsyncOpenAI,
    letta: LettaServer,
    agent: Agent,
    script: str,
    expected: tuple[type[openai.APIStatusError], str],
) -> None:
    if letta.kind == "app_server" and script in {"fail with 429", "fail with 500"}:
        pytest.skip("the App Server asks the model again and again, for more than half a minute")
    error, code = expected
    before = await answered(gateway)
    for streamed in (True, False):
        with pytest.raises(error) as failed:
            await client.with_options(max_retries=2).chat.completions.create(
                model=agent.name, messages=user(script), stream=streamed
            )
        assert failed.value.code == code
        # The message was delivered: the SDK is told not to send it again, and does not.
        assert failed.value.response.headers["x-should-retry"] == "false"
        assert script not in str(failed.value)
    assert await answered(gateway) == before + 2
    assert "openai-proxy" not in gateway.errors


async def answered(gateway: GatewayProcess) -> float:
    """Count the chat completions that were answered, whatever the status."""
    metrics = (await gateway.ask("GET", "/metrics")).body.decode()
    lines = [line for line in metrics.splitlines() if line.startswith("letta_gateway_requests_total{")]
    return sum(float(line.split()[-1]) for line in lines if 'route="/v1/chat/completions"' in line)


@pytest.mark.parametrize(("script", "reason"), [("refuse", "content_filter"), ("be cut off", "length")])
async def test_an_answer_that_the_model_ends_early(
    client: openai.AsyncOpenAI, letta: LettaServer, agent: Agent, script: str, reason: str
) -> None:
    chunks = await stream(client, agent.name, script)
    finished = [chunk.choices[0].finish_reason for _, chunk in chunks if chunk.choices][-1]
    assert finished == (reason if letta.kind == "app_server" else "stop")  # V1 does not tell
    assert text_of(chunks)


async def test_model_breaks_off_in_mid_answer(client: openai.AsyncOpenAI, agent: Agent) -> None:
    with pytest.raises(openai.APIError) as failed:
        await stream(client, agent.name, "break off after 3 words")
    assert failed.value.code in {"model_error", "agent_run_failed"}


async def test_usage_is_what_the_model_reported(letta: LettaServer, agent: Agent) -> None:
    async with gateway_before(letta) as gateway, sdk(gateway) as client:
        chunks = await stream(client, agent.name, "hello")
        metrics = (await gateway.ask("GET", "/metrics")).body.decode()
    usage = chunks[-1][1].usage
    assert usage is not None
    assert f'letta_gateway_tokens_total{{kind="prompt"}} {usage.prompt_tokens:.1f}' in metrics
    assert f'letta_gateway_tokens_total{{kind="completion"}} {usage.completion_tokens:.1f}' in metrics
    assert 'letta_gateway_turns_total{outcome="complete"} 1.0' in metrics
