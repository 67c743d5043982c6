from typing import Final

import pytest
from aiohttp import web

from gateway.errors import ModelNotFound, UpstreamUnavailable
from gateway.letta.scripted import Break, Script
from tests.server.recorded_logs import recorded_logs
from tests.server.running import one_route, serving
from tests.server.wire import Answer

SECRET: Final = "sk-canary-7f3a"


async def answer_to(raised: BaseException) -> Answer:
    """Return what a client gets whose handler raises this."""

    async def fail(request: web.Request) -> web.Response:
        raise raised

    async with one_route(fail) as asked:
        return await asked()


async def test_error_of_ours() -> None:
    answer = await answer_to(ModelNotFound("nobody"))
    assert (answer.status, answer.code, answer.error["param"]) == (404, "model_not_found", "model")


async def test_bug_shows_nothing_and_is_logged() -> None:
    with recorded_logs() as logs:
        answer = await answer_to(RuntimeError(f"{SECRET} at /srv/letta"))
        (line,) = [line for line in logs.lines if line["event"] == "request failed"]
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.header("x-should-retry") == "false"
    assert b"srv" not in answer.body
    assert SECRET not in answer.body.decode()
    assert "RuntimeError" in line["exception"]


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (web.HTTPNotFound(text=SECRET), 404, "unknown_url"),
        (web.HTTPMethodNotAllowed("GET", ["POST", "PUT"]), 405, "method_not_allowed"),
        (web.HTTPBadRequest(text=SECRET), 400, "invalid_value"),
        (web.HTTPFound("https://evil.example.com"), 400, "invalid_value"),
        (web.HTTPServiceUnavailable(text=SECRET), 500, "internal_error"),
    ],
)
async def test_error_of_aiohttps_own(raised: web.HTTPException, status: int, code: str) -> None:
    answer = await answer_to(raised)
    assert (answer.status, answer.code) == (status, code)
    assert SECRET not in answer.body.decode()
    assert answer.header("location") is None
    if status == 405:
        assert answer.header("allow") == "POST, PUT"


async def test_failure_of_letta_is_counted_and_logged_once() -> None:
    with recorded_logs() as logs:
        async with serving() as gateway:
            gateway.backend.play(Script(opening=(Break(UpstreamUnavailable(retry_after=2.0)),)))
            answer = await gateway.chat()
            text = gateway.exposed()
        warnings = [line for line in logs.lines if line["event"] == "upstream failed"]
    assert (answer.status, answer.code, answer.header("retry-after")) == (503, "upstream_unavailable", "2")
    assert 'letta_gateway_errors_total{code="upstream_unavailable"} 1.0' in text
    assert 'letta_gateway_upstream_errors_total{code="upstream_unavailable"} 1.0' in text
    assert len(warnings) == 1


async def test_client_error_is_no_failure_of_letta() -> None:
    async with serving() as gateway:
        await gateway.chat(model="nobody")
        assert 'letta_gateway_errors_total{code="model_not_found"} 1.0' in gateway.exposed()
        assert "letta_gateway_upstream_errors_total{" not in gateway.exposed()
