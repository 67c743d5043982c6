import pytest

from tests.server.running import serving, settings
from tests.server.wire import request

ANSWERS = (
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/v1/nothing"),
    ("DELETE", "/v1/models"),
    ("POST", "/v1/chat/completions"),
)


@pytest.mark.parametrize(("method", "path"), ANSWERS)
async def test_headers_of_every_answer(method: str, path: str) -> None:
    async with serving() as gateway:
        answer = await gateway.ask(method, path)
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("cache-control") == "no-store"
    assert answer.header("x-request-id")
    for banner in ("server", "via", "x-powered-by"):
        assert answer.header(banner) is None
    assert b"aiohttp" not in answer.body or path == "/metrics"


async def test_headers_of_a_stream() -> None:
    async with serving() as gateway:
        answer = await gateway.chat(stream=True)
    assert answer.header("content-type") == "text/event-stream"
    assert answer.header("cache-control") == "no-cache"
    assert answer.header("x-accel-buffering") == "no"
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("x-request-id")
    assert answer.header("server") is None
    assert answer.header("connection") is None


async def test_notes_name_the_client_for_the_limits() -> None:
    async with serving(settings(rate_limit="1/minute", api_keys=("sk-1", "sk-2", "sk-3"))) as gateway:
        for key, address, status in (("1", "203.0.113.7", 200), ("2", "203.0.113.7", 429), ("3", "203.0.113.8", 200)):
            headers = {"X-Forwarded-For": address, "X-Api-Key": f"sk-{key}"}
            assert (await gateway.ask("GET", "/v1/models", headers)).status == status


async def test_http_1_0_client_gets_its_stream_and_its_end() -> None:
    """As nginx asks unless it is told ``proxy_http_version 1.1``."""
    async with serving() as gateway, gateway.connect() as connection:
        body = b'{"model":"friend","stream":true,"messages":[{"role":"user","content":"Hi"}]}'
        sent = request("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, body)
        await connection.send(sent.replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = await connection.answer()
    assert answer.status == 200
    assert answer.header("transfer-encoding") is None
    assert answer.events[-1] == "[DONE]"


async def test_operator_rule_without_a_client_address() -> None:
    """Where nobody knows who asks, nobody is the operator."""
    async with serving(settings(api_keys=("sk-one",), operator_key="sk-op")) as gateway:
        stranger = {"X-Forwarded-For": "unknown"}
        assert (await gateway.ask("GET", "/metrics", stranger)).status == 403
        assert (await gateway.ask("GET", "/metrics", {**stranger, "X-Api-Key": "sk-op"})).status == 200


async def test_version_that_is_not_spoken_here() -> None:
    """HTTP/2 is no text: who writes it as text is told so by the fixed answer to what is not HTTP."""
    async with serving() as gateway:
        answer = await gateway.raw(request("GET", "/health").replace(b"HTTP/1.1", b"HTTP/2.0"))
        assert (answer.status, answer.code) == (400, "malformed_request")
        assert "letta_gateway_rejected_heads_total 1.0" in gateway.exposed()
