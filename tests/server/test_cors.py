from collections.abc import AsyncIterator

import pytest

from tests.server.running import JSON, Running, serving, settings

PAGE = "https://chat.example.com"
ALLOWING = ("access-control-allow-origin", "access-control-allow-methods", "access-control-allow-headers")


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving(settings(api_keys=("sk-one",), cors_origins=(PAGE, "http://localhost:3000"))) as running:
        yield running


async def test_no_origins_are_configured() -> None:
    async with serving(settings(api_keys=("sk-one",))) as gateway:
        answer = await gateway.ask("GET", "/v1/models", {"Origin": PAGE, "X-Api-Key": "sk-one"})
        assert answer.status == 200
        preflight = await gateway.ask("OPTIONS", "/v1/models", {"Origin": PAGE, "Access-Control-Request-Method": "GET"})
        assert preflight.status == 405
        for given in (answer, preflight):
            assert not [name for name, _ in given.headers if name.startswith("access-control") or name == "vary"]


async def test_preflight_of_an_allowed_page(gateway: Running) -> None:
    asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # as OpenAI's SDK does in a page
    headers = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    answer = await gateway.ask("OPTIONS", "/v1/chat/completions", headers)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.header("access-control-allow-origin") == PAGE
    assert "POST" in (answer.header("access-control-allow-methods") or "")
    assert answer.header("access-control-allow-headers") == asked
    assert answer.header("access-control-max-age") == "600"
    assert answer.header("access-control-allow-credentials") is None
    assert answer.header("vary") == "Origin"


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example.com",
        "null",
        "",
        "https://chat.example.com.evil.com",
        "https://chat.example.com:8443",
        "http://chat.example.com",
        "https://CHAT.example.com",
        "https://chat.example.com/",
        "*",
        f"{PAGE} https://evil.example.com",
    ],
)
async def test_any_other_page(gateway: Running, origin: str) -> None:
    for method, path in (("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/health")):
        answer = await gateway.ask(method, path, {"Origin": origin, "X-Api-Key": "sk-one"})
        assert not [name for name, _ in answer.headers if name in ALLOWING]
        assert answer.header("vary") == "Origin", "a cache must not mix them up"


async def test_allowed_page_sees_streams_and_errors(gateway: Running) -> None:
    headers = {"Origin": PAGE, "X-Api-Key": "sk-one"}
    stream = await gateway.chat(stream=True, headers=headers)
    refused = await gateway.ask("GET", "/v1/models", {"Origin": PAGE})
    unknown = await gateway.ask("GET", "/v1/nothing", headers)
    assert [answer.status for answer in (stream, refused, unknown)] == [200, 401, 404]
    for answer in (stream, refused, unknown):
        assert answer.header("access-control-allow-origin") == PAGE
        assert "X-Request-Id" in (answer.header("access-control-expose-headers") or "")


async def test_preflight_takes_no_other_route_away(gateway: Running) -> None:
    headers = {**JSON, "X-Api-Key": "sk-one"}
    assert (await gateway.ask("GET", "/v1/nothing", headers)).code == "unknown_url"
    answer = await gateway.ask("DELETE", "/v1/models", headers)
    assert (answer.status, answer.header("allow")) == (405, "GET, HEAD, OPTIONS")
