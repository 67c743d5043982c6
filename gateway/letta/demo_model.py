"""A scripted model behind the OpenAI API: no intelligence, but the behaviours of a real one, on demand.

It is no part of the gateway's request path: Letta calls it as its model provider. It serves `GET /v1/models`,
`POST /v1/chat/completions` and `POST /v1/embeddings`. `demo_script` decides what it says: messages like `count to 5`,
`think about it`, `call get_weather now` or `fail with 429` are scripts, and the whole list is at the top of that file.
It remembers what it was asked, and who went away in the middle, so that a test can look.
"""

import asyncio
import base64
import contextlib
import hashlib
import math
import struct
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator

import msgspec
from aiohttp import web

from gateway.letta.demo_script import (
    Arguments,
    BreakOff,
    Call,
    ChatRequest,
    Fail,
    Finish,
    Pause,
    Say,
    Step,
    Steps,
    Think,
    Usage,
    play,
    usage,
)

MODEL = "demo"
DIMENSIONS = 1536
"""The length of an embedding: that of OpenAI's text-embedding-3-small, which Letta asks for."""

_REMEMBERED_REQUESTS = 1000
_MAX_BODY = 64 * 1024 * 1024  # images come inside the body
_GLANCE = 0.05
"""How often a silent answer looks whether its client is still there, in seconds."""


class SeenRequest(msgspec.Struct, frozen=True):
    """A request as the model received it."""

    path: str
    body: msgspec.Raw


class Recorder:
    """What the model was asked, and how its answers ended."""

    def __init__(self, remembered: int = _REMEMBERED_REQUESTS) -> None:
        self._requests: deque[SeenRequest] = deque(maxlen=remembered)
        self.live = 0
        """Answers under way."""
        self.finished = 0
        """Answers that reached their end, failures that a script asked for among them."""
        self.aborted = 0
        """Answers whose client went away before the end."""

    @property
    def requests(self) -> tuple[SeenRequest, ...]:
        """The requests so far, the newest last; safe to read from another thread."""
        return tuple(self._requests)

    def note(self, path: str, body: bytes) -> None:
        """Remember a request."""
        self._requests.append(SeenRequest(path, msgspec.Raw(body)))

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer as live, then as finished or aborted."""
        self.live += 1
        try:
            yield
        except (ConnectionError, asyncio.CancelledError):
            self.aborted += 1
            raise
        else:
            self.finished += 1
        finally:
            self.live -= 1


class RunningDemoModel(msgspec.Struct, frozen=True):
    """A demo model that is listening."""

    host: str
    port: int
    recorder: Recorder

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base URL."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def requests(self) -> tuple[SeenRequest, ...]:
        """The requests so far, the newest last."""
        return self.recorder.requests


RECORDER = web.AppKey("recorder", Recorder)
ASIDE = web.AppKey("aside", str)


def build_demo_model(aside: str = "", recorder: Recorder | None = None) -> web.Application:
    """Build the application; the model adds ``aside`` to what it only repeats."""
    app = web.Application(client_max_size=_MAX_BODY)
    app[RECORDER] = recorder or Recorder()
    app[ASIDE] = aside
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/embeddings", _embeddings)
    return app


@contextlib.asynccontextmanager
async def running_demo_model(
    host: str = "127.0.0.1", port: int = 0, aside: str = "", recorder: Recorder | None = None
) -> AsyncIterator[RunningDemoModel]:
    """Serve a demo model while the context is open; port 0 is any free one."""
    app = build_demo_model(aside, recorder)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound: int = runner.addresses[0][1]
        yield RunningDemoModel(host, bound, app[RECORDER])
    finally:
        await runner.cleanup()


# What goes over the wire.


class _FunctionDelta(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(msgspec.Struct, omit_defaults=True):
    index: int
    function: _FunctionDelta
    id: str | None = None
    type: str | None = None


class _Delta(msgspec.Struct, omit_defaults=True):
    """A chunk's news, and a whole answer's message: their fields are the same."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _Choice(msgspec.Struct, omit_defaults=True):
    """A chunk's only choice has a delta, a whole answer's a message."""

    index: int
    finish_reason: str | None
    delta: _Delta | None = None
    message: _Delta | None = None


class _Answer(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: Usage | None = None


class _Model(msgspec.Struct):
    id: str
    created: int = 0
    object: str = "model"
    owned_by: str = "letta-gateway"


class _Embedding(msgspec.Struct):
    embedding: list[float] | str
    index: int
    object: str = "embedding"


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _Listing(msgspec.Struct, omit_defaults=True):
    data: list[_Model] | list[_Embedding]
    object: str
    model: str | None = None
    usage: _EmbeddingUsage | None = None


class _Error(msgspec.Struct):
    message: str
    type: str
    code: str | None = None
    param: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _EmbeddingRequest(msgspec.Struct):
    input: str | list[str | int | list[int]]
    model: str = "text-embedding-3-small"
    encoding_format: str = "float"
    dimensions: int = DIMENSIONS


_ERRORS = {
    400: _Error("The demo model was asked to refuse this request.", "invalid_request_error"),
    401: _Error("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    403: _Error("You are not allowed to do that.", "invalid_request_error"),
    404: _Error("The model does not exist.", "invalid_request_error", "model_not_found"),
    413: _Error("This model's maximum context length is exceeded.", "invalid_request_error", "context_length_exceeded"),
    429: _Error("Rate limit reached for the demo model.", "rate_limit_error", "rate_limit_exceeded"),
}
_OTHER_ERROR = _Error("The demo model was asked to fail.", "server_error")

_read_chat = msgspec.json.Decoder(ChatRequest).decode
_read_embedding = msgspec.json.Decoder(_EmbeddingRequest).decode
_encode = msgspec.json.encode


def _json(body: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")


def _refuse(problem: msgspec.DecodeError) -> web.Response:
    return _json(_ErrorBody(_Error(str(problem), "invalid_request_error")), 400)


async def _models(_: web.Request) -> web.Response:
    return _json(_Listing([_Model(MODEL)], "list"))


async def _embeddings(request: web.Request) -> web.Response:
    body = await request.read()
    request.app[RECORDER].note(request.path, body)
    try:
        asked = _read_embedding(body)
    except msgspec.DecodeError as problem:
        return _refuse(problem)
    several = isinstance(asked.input, list) and not all(isinstance(item, int) for item in asked.input)
    inputs = asked.input if several else [asked.input]
    found = [_Embedding(_embed(_encode(text), asked), index) for index, text in enumerate(inputs)]
    return _json(_Listing(found, "list", asked.model, _EmbeddingUsage(len(body), len(body))))


def _embed(text: bytes, asked: _EmbeddingRequest) -> list[float] | str:
    """Make the same unit vector of the same text, always."""
    raw = [byte - 127.5 for byte in hashlib.shake_256(text).digest(asked.dimensions)]
    norm = math.hypot(*raw)
    vector = [value / norm for value in raw]
    if asked.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    recorder = request.app[RECORDER]
    recorder.note(request.path, body)
    try:
        asked = _read_chat(body)
    except msgspec.DecodeError as problem:
        return _refuse(problem)
    steps = play(asked, request.app[ASIDE])
    try:
        with recorder.answering():
            if isinstance(steps[0], Fail):
                return _json(_ErrorBody(_ERRORS.get(steps[0].status, _OTHER_ERROR)), steps[0].status)
            return await (_stream if asked.stream else _complete)(request, asked, steps)
    except ConnectionError:
        return web.Response(status=499)  # to nobody: the connection is gone


async def _stream(request: web.Request, asked: ChatRequest, steps: Steps) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    chunk = _Answer(_new_id("chatcmpl"), "chat.completion.chunk", int(time.time()), asked.model, [])
    role: str | None = "assistant"
    async for step in _in_time(request, steps):
        delta = _delta(step)
        delta.role, role = role, None
        chunk.choices = [_Choice(0, step.reason if isinstance(step, Finish) else None, delta)]
        await response.write(_event(chunk))
    if asked.stream_options and asked.stream_options.include_usage:
        chunk.choices, chunk.usage = [], usage(asked, steps)
        await response.write(_event(chunk))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _event(chunk: _Answer) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


async def _complete(request: web.Request, asked: ChatRequest, steps: Steps) -> web.Response:
    said = [step async for step in _in_time(request, steps)]
    message = _Delta(
        role="assistant",
        content="".join(step.text for step in said if isinstance(step, Say)),
        reasoning_content="".join(step.text for step in said if isinstance(step, Think)) or None,
        tool_calls=[_whole_call(step, said) for step in said if isinstance(step, Call)] or None,
    )
    choice = _Choice(0, next(step.reason for step in said if isinstance(step, Finish)), message=message)
    created = int(time.time())
    return _json(_Answer(_new_id("chatcmpl"), "chat.completion", created, asked.model, [choice], usage(asked, steps)))


async def _in_time(request: web.Request, steps: Steps) -> AsyncIterator[Step]:
    """Give the steps that are said, each at its time, as long as the client is there."""
    for step in steps:
        match step:
            case Pause(seconds):
                await _wait(request, seconds)
            case BreakOff():
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionAbortedError("a script asked for it")
            case _:
                yield step


async def _wait(request: web.Request, seconds: float) -> None:
    # aiohttp tells a handler that its client has gone only where the runner was asked to; this works under any runner.
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _GLANCE))
        if request.transport is None:
            raise ConnectionResetError("the client went away")


def _delta(step: Step) -> _Delta:
    match step:
        case Say(text):
            return _Delta(content=text)
        case Think(text):
            return _Delta(reasoning_content=text)
        case Call(index, name):
            call = _CallDelta(index, _FunctionDelta(name, ""), _new_id("call"), "function")
            return _Delta(tool_calls=[call])
        case Arguments(index, text):
            return _Delta(tool_calls=[_CallDelta(index, _FunctionDelta(arguments=text))])
        case _:
            return _Delta()


def _whole_call(call: Call, said: Steps) -> _CallDelta:
    arguments = "".join(step.text for step in said if isinstance(step, Arguments) and step.index == call.index)
    return _CallDelta(call.index, _FunctionDelta(call.name, arguments), _new_id("call"), "function")


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:20]}"
