import re
from collections.abc import AsyncIterator

import pytest
import structlog
from structlog.testing import capture_logs

from tests.server.running import Running, serving
from tests.server.wire import Headers

OWN = re.compile(r"req_[0-9a-f]{32}")


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 128])
async def test_sane_id_of_the_client_comes_back(gateway: Running, given: str) -> None:
    assert (await gateway.ask("GET", "/health", {"X-Request-Id": given})).header("x-request-id") == given


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Request-Id": "x" * 129},
        {"X-Request-Id": "a b"},
        {"X-Request-Id": 'a"b'},
        {"X-Request-Id": "<script>"},
        {"X-Request-Id": "=cmd|' /C calc'!A0"},
        {"X-Request-Id": "\u202eabc"},
        [("X-Request-Id", b"\xff\xfe")],
        {"X-Request-Id": "a\tb"},
        {"X-Request-Id": "x" * 8_000},
    ],
)
async def test_other_ids_are_replaced(gateway: Running, headers: Headers) -> None:
    chosen = (await gateway.ask("GET", "/health", headers)).header("x-request-id")
    assert chosen is not None
    assert OWN.fullmatch(chosen)


async def test_id_on_every_kind_of_answer(gateway: Running) -> None:
    for method, path in (("GET", "/v1/nothing"), ("DELETE", "/health"), ("POST", "/v1/chat/completions")):
        assert (await gateway.ask(method, path, {"X-Request-Id": "mine"})).header("x-request-id") == "mine"
    assert (await gateway.chat(stream=True, headers={"X-Request-Id": "mine"})).header("x-request-id") == "mine"


async def test_log_lines_carry_the_id_and_forget_it(gateway: Running) -> None:
    with capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        await gateway.ask("GET", "/v1/models", {"X-Request-Id": "mine"})
        structlog.get_logger().info("another")
    assert [line.get("request_id") for line in lines] == ["mine", None]
