"""Every failing path answers OpenAI's error object, through a real server."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import pytest
from aiohttp import web

from gateway import errors
from gateway.errors import GatewayError
from tests.server.running import JSON, Running, chat_body, one_route, serving, settings
from tests.server.test_listener import MALFORMED
from tests.server.wire import request

EXAMPLES: Final[dict[str, Callable[[], GatewayError]]] = {
    "ModelNotFound": lambda: errors.ModelNotFound("x" * 10_000),
    "MethodNotAllowed": lambda: errors.MethodNotAllowed(frozenset({"GET", "POST"})),
    "PayloadTooLarge": lambda: errors.PayloadTooLarge(1_024),
    "RateLimited": lambda: errors.RateLimited("1 per 1 minute", 12.3),
    "ResponseNotFound": lambda: errors.ResponseNotFound("resp_1"),
}
"""How those errors are made that need to be told something."""

TYPES: Final = {
    "invalid_request_error",
    "permission_error",
    "conflict_error",
    "rate_limit_error",
    "insufficient_quota",
    "server_error",
}


def tree(root: type[GatewayError] = GatewayError) -> Iterator[type[GatewayError]]:
    if inspect.getmodule(root) is errors:
        yield root
    for child in root.__subclasses__():
        yield from tree(child)


KINDS: Final = sorted(set(tree()), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_class_of_the_tree(kind: type[GatewayError]) -> None:
    error = EXAMPLES.get(kind.__name__, kind)()

    async def fail(request: web.Request) -> web.Response:
        raise error

    async with one_route(fail) as asked:
        answer = await asked()
    assert answer.status == kind.status
    assert 400 <= answer.status < 600
    assert answer.error["type"] in TYPES
    assert answer.error["message"] == error.message
    assert len(answer.body) < 1_000
    assert answer.header("x-request-id")
    assert kind.__name__ in (errors.__doc__ or ""), "the tree in the docstring is complete"


PATHS: Final = {
    "no such path": (request("GET", "/v1/nothing"), 404),
    "root": (request("GET", "/"), 404),
    "no such method": (request("DELETE", "/v1/models"), 405),
    "preflight without CORS": (request("OPTIONS", "/v1/models", {"Origin": "http://localhost"}), 405),
    "no key": (request("GET", "/v1/models"), 401),
    "wrong key": (request("GET", "/v1/models", {"X-Api-Key": "wrong"}), 401),
    "not the operator": (request("GET", "/metrics", {"X-Forwarded-For": "203.0.113.7"}), 403),
    "no such model": (request("GET", "/v1/models/nobody", {"X-Api-Key": "sk-one"}), 404),
    "compressed": (request("POST", "/v1/chat/completions", {**JSON, "Content-Encoding": "gzip"}, b"x"), 415),
    "a form": (request("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, b"x"), 415),
    "too large": (request("POST", "/v1/chat/completions", {**JSON, "Content-Length": "999999999999"}), 413),
    "no JSON": (request("POST", "/v1/chat/completions", {**JSON, "X-Api-Key": "sk-one"}, b"x"), 400),
    "no messages": (request("POST", "/v1/chat/completions", {**JSON, "X-Api-Key": "sk-one"}, b"{}"), 400),
    "unsupported": (request("POST", "/v1/chat/completions", {**JSON, "X-Api-Key": "sk-one"}, chat_body(n=3)), 400),
    "slow body": (request("POST", "/v1/chat/completions", {**JSON, "X-Api-Key": "sk-one", "Content-Length": "9"}), 408),
    **{name: (sent, 0) for name, sent in MALFORMED.items()},
}


@pytest.fixture
async def guarded() -> AsyncIterator[Running]:
    async with serving(settings(api_keys=("sk-one",), body_timeout=0.1)) as running:
        yield running


@pytest.mark.parametrize(("sent", "status"), PATHS.values(), ids=PATHS.keys())
async def test_path_that_fails(guarded: Running, sent: bytes, status: int) -> None:
    answer = await guarded.raw(sent)
    assert answer.status == status or (status == 0 and answer.status in (400, 417))
    assert answer.error["type"] in TYPES
    assert answer.code
    assert answer.header("x-content-type-options") == "nosniff"
