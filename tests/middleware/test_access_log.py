from typing import Final

import pytest

from gateway.errors import UpstreamUnavailable
from gateway.letta.scripted import Break, Hang, Script, says
from gateway.translation.agent_events import TextDelta
from tests.server.recorded_logs import recorded_logs
from tests.server.running import JSON, chat_body, chat_request, serving, settings
from tests.server.wire import until

NASTY: Final = 'x\r\n{"event":"forged"}\x1b[2J\x00\u2028\u202e\x7f"\\'


async def test_one_line_for_each_request() -> None:
    with recorded_logs(level="INFO") as logs:
        async with serving() as gateway:
            await gateway.chat(headers={"X-Request-Id": "one"})
            await gateway.chat(stream=True)
            await gateway.ask("GET", "/v1/models/friend")
            await gateway.ask("GET", "/v1/nothing")
            await gateway.chat(model="nobody")
        first, stream, model, nothing, nobody = logs.requests
    assert (
        first.items() >= {"method": "POST", "route": "/v1/chat/completions", "status": 200, "model": "friend"}.items()
    )
    assert first.items() >= {"request_id": "one", "outcome": "complete", "client": "127.0.0.1", "level": "info"}.items()
    assert first["ms"] >= 0
    assert stream["chunks"] == 5
    assert stream["first_token_ms"] >= 0
    assert model["route"] == "/v1/models/{model}"
    assert nothing.items() >= {"route": "other", "status": 404, "error_code": "unknown_url"}.items()
    assert nobody.items() >= {"status": 404, "error_code": "model_not_found", "model": "nobody"}.items()


async def test_probes_are_quiet() -> None:
    with recorded_logs(level="INFO") as logs:
        async with serving(settings(middleware_config={"access_log": {"quiet": ["/health", "/v1/models"]}})) as gateway:
            for path in ("/health", "/v1/models", "/ready"):
                await gateway.ask("GET", path)
        assert [line["route"] for line in logs.requests] == ["/ready"]


async def test_a_failure_after_the_first_byte_is_told() -> None:
    with recorded_logs() as logs:
        async with serving() as gateway:
            gateway.backend.play(Script(([TextDelta("Hel")], Break(UpstreamUnavailable()))))
            await gateway.chat(stream=True)
        (line,) = logs.requests
    assert line.items() >= {"status": 200, "outcome": "failed", "error_code": "upstream_unavailable"}.items()


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_does_not_wait(stream: bool) -> None:  # noqa: FBT001
    with recorded_logs() as logs:
        async with serving() as gateway, gateway.connect() as connection:
            gateway.backend.play(Script((Hang(),)))
            await connection.send(chat_request(stream=stream))
            await until(lambda: gateway.backend.turns)
            connection.abort()
            await until(lambda: logs.requests)
        (line,) = logs.requests
    assert line.items() >= {"status": 499, "outcome": "client_disconnected", "model": "friend"}.items()


async def test_control_characters_and_endless_names() -> None:
    """Each request is one line that is one JSON object, and no client makes it long."""
    with recorded_logs() as logs:
        async with serving() as gateway:
            gateway.backend.usual = says("ok")
            for model in (NASTY, "m" * 1_000_000, "\U0001f600" * 100_000):
                await gateway.ask("POST", "/v1/chat/completions", JSON, chat_body(model=model))
            await gateway.ask("GET", "/v1/models/" + "".join(f"%{byte:02x}" for byte in NASTY.encode()))
            await gateway.ask("GET", "/" + "y" * 8_000)
            await gateway.ask("X" * 8_000, "/health")
            for header in ("X-Request-Id", "User-Agent", "X-Forwarded-For", "Origin", "Cookie"):
                await gateway.ask("GET", "/v1/models", [(header, b"\xff\xfe\x80\x1b[2J".replace(b"\x1b", b"\xc2\x9b"))])
                await gateway.ask("GET", "/v1/models", [(header, "z" * 8_000)])
            await gateway.ask("GET", "/v1/models", [("X-Forwarded-For", b"fe80::1%\xff\xfe" + b"a" * 4_000)])
        lines = logs.lines
        longest = max(len(line) for line in logs.text.split("\n"))
    assert len([line for line in lines if line["event"] == "request"]) >= 16
    assert not [line for line in lines if line["event"] == "forged"]
    assert longest < 10_000
    assert "Traceback" not in str(lines)
    assert "\x1b" not in logs.text
