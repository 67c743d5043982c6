import time

import pytest

from gateway.errors import UpstreamTimeout, UpstreamUnavailable
from gateway.handlers import operations
from gateway.letta import probe
from gateway.letta.scripted import Hang, ScriptedBackend
from gateway.server import drain
from tests.server.running import FRIEND, local_letta, serving, settings


async def test_health_asks_nobody() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.down = UpstreamUnavailable()
    async with serving(backend=backend) as gateway:
        answer = await gateway.ask("GET", "/health")
    assert (answer.status, answer.json()) == (200, {"status": "ok"})
    assert (backend.pings, backend.listings) == (0, 0)


async def test_ready_with_details_for_the_operator() -> None:
    async with serving() as gateway:
        answer = await gateway.ask("GET", "/ready")
    body = answer.json()
    assert (answer.status, body["status"]) == (200, "ready")
    letta = body["dependencies"]["letta"]
    assert letta["status"] == "ok"
    assert 0 <= letta["latency_ms"] < 1_000


@pytest.fixture(autouse=True)
def _every_answer_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TTL", 0.0)


async def test_ready_is_bare_for_others() -> None:
    async with serving(settings(api_keys=("sk-one",), trusted_networks=())) as gateway:
        assert (await gateway.ask("GET", "/ready")).json() == {"status": "ready"}
        gateway.backend.down = UpstreamUnavailable()
        answer = await gateway.ask("GET", "/ready")
        assert (answer.status, answer.json()) == (503, {"status": "not_ready"})


@pytest.mark.parametrize(
    ("model", "note"),
    [(None, "a scripted model answers: no provider is configured"), ("openai/gpt-5", "openai/gpt-5 answers")],
)
async def test_ready_says_who_answers_where_the_letta_is_local(model: str | None, note: str) -> None:
    async with serving(local=local_letta(model=model)) as gateway:
        assert (await gateway.ask("GET", "/ready")).json()["note"] == note
        drain.begin(gateway.app)
        assert "note" not in (await gateway.ask("GET", "/ready")).json()


async def test_letta_does_not_answer() -> None:
    backend = ScriptedBackend([FRIEND])
    async with serving(backend=backend) as gateway:
        for error in (UpstreamUnavailable(), UpstreamTimeout()):
            backend.down = error
            answer = await gateway.ask("GET", "/ready")
            assert (answer.status, answer.json()["status"]) == (503, "not_ready")
            assert answer.json()["dependencies"]["letta"].items() >= {"status": "failed", "code": error.code}.items()
            assert (await gateway.ask("GET", "/health")).status == 200
        backend.down = None
        assert (await gateway.ask("GET", "/ready")).status == 200


async def test_going_away_is_told_at_once_even_if_letta_hangs() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.holding = Hang()
    async with serving(backend=backend) as gateway:
        drain.begin(gateway.app)
        started = time.monotonic()
        answer = await gateway.ask("GET", "/ready")
        assert (answer.status, answer.json()) == (503, {"status": "draining"})
        assert time.monotonic() - started < 0.5
        assert (await gateway.ask("GET", "/health")).status == 200


async def test_metrics_in_the_format_of_prometheus() -> None:
    async with serving() as gateway:
        answer = await gateway.ask("GET", "/metrics")
    assert answer.status == 200
    assert (answer.header("content-type") or "").startswith("text/plain; version=")
    assert b"# TYPE letta_gateway_requests_total counter" in answer.body


async def test_figures_tell_whether_dependencies_answer() -> None:
    backend = ScriptedBackend([FRIEND])
    async with serving(backend=backend) as gateway:
        figures = (await gateway.ask("GET", "/metrics")).body.decode()
        assert 'letta_gateway_dependency_up{dependency="letta"} 1.0' in figures
        assert 'letta_gateway_dependency_up{dependency="database"} 1.0' in figures
        assert 'letta_gateway_dependency_seconds{dependency="letta"} ' in figures
        backend.down = UpstreamUnavailable()
        figures = (await gateway.ask("GET", "/metrics")).body.decode()
        assert 'letta_gateway_dependency_up{dependency="letta"} 0.0' in figures
        assert 'letta_gateway_dependency_up{dependency="database"} 1.0' in figures


async def test_silent_letta_does_not_hold_up_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PATIENCE", 0.05)
    backend = ScriptedBackend([FRIEND])
    backend.holding = Hang()
    async with serving(backend=backend) as gateway:
        started = time.monotonic()
        figures = (await gateway.ask("GET", "/metrics")).body.decode()
        assert time.monotonic() - started < 1
        assert 'letta_gateway_dependency_up{dependency="letta"} 0.0' in figures
        assert 'letta_gateway_dependency_seconds{dependency="letta"} 0.05' in figures
