import pytest
from aiohttp import web

from gateway import keys
from gateway.errors import UpstreamUnavailable
from gateway.letta.app_server import AppServerBackend
from gateway.letta.detect import DetectedBackend
from gateway.letta.rest import RestBackend
from gateway.letta.scripted import ScriptedBackend
from gateway.metrics import Metrics
from gateway.server.app import build_app, build_backend, build_operations_app
from gateway.server.descriptors import turns_that_fit
from gateway.server.listener import Listener
from gateway.server.live import turn_policy
from gateway.settings import LETTA_CLOUD, SettingError
from gateway.tasks import TaskSet
from tests.server.running import FRIEND, serving, settings
from tests.server.wire import ask
from tests.storage.late import LateDatabase


async def test_parts_are_put_together() -> None:
    backend = ScriptedBackend([FRIEND])
    chosen = settings()
    app = build_app(chosen, LateDatabase(), backend=backend)
    assert app[keys.SETTINGS] is chosen
    assert app[keys.BACKEND] is backend
    assert len(app[keys.TASKS]) == 0, "nothing runs before the application starts"


async def test_backend_speaks_to_the_server_of_the_settings() -> None:
    chosen = settings(
        letta_api_key="sk-letta",
        letta_project="slug",
        connect_timeout=1.5,
        first_event_timeout=2.5,
        silence_timeout=3.5,
        turn_timeout=4.5,
    )
    detected = build_backend(chosen, Metrics(), TaskSet())
    assert isinstance(detected, DetectedBackend)
    backend = detected._make("rest")
    assert isinstance(backend, RestBackend)
    config = backend.config
    assert (config.base_url, config.api_key, config.project) == ("http://letta.invalid", "sk-letta", "slug")
    limits = config.limits
    assert (limits.connect, limits.first_event, limits.silence, limits.turn) == (1.5, 2.5, 3.5, 4.5)
    await backend.close()
    server = detected._make("app_server")
    assert isinstance(server, AppServerBackend)
    assert (server.config.url, server.config.api_key, server.config.limits) == (
        "http://letta.invalid",
        "sk-letta",
        limits,
    )
    await server.close()


@pytest.mark.parametrize(
    ("url", "kind"), [("ws://letta.invalid", AppServerBackend), (LETTA_CLOUD, RestBackend)], ids=["ws", "cloud"]
)
async def test_url_that_says_what_the_server_is(url: str, kind: type[AppServerBackend | RestBackend]) -> None:
    tools = {"Milo": ("Read",)}
    backend = build_backend(settings(letta_base_url=url, server_tools=tools), Metrics(), TaskSet())
    assert isinstance(backend, kind)
    if isinstance(backend, AppServerBackend):
        assert backend.config.server_tools == tools
    await backend.close()


async def test_no_backend_means_the_one_of_the_settings() -> None:
    app = build_app(settings(), LateDatabase())
    assert isinstance(app[keys.BACKEND], DetectedBackend)
    assert app[keys.LOCAL] is None
    await app[keys.BACKEND].close()


def test_chain_that_cannot_be_built_opens_nothing() -> None:
    """No event loop runs here: a backend could not even be made."""
    with pytest.raises(SettingError):
        build_app(settings(middleware=("nothing",)), LateDatabase())


def test_turns_are_as_many_as_fit_or_as_the_settings_say() -> None:
    assert turn_policy(settings(max_turns=7, queue_depth=3, queue_wait=1.0, on_disconnect="finish")).max_turns == 7
    assert turn_policy(settings()).max_turns == turns_that_fit()


async def test_one_turn_more_than_fit() -> None:
    """Each agent has its own queue, so they do not wait: the whole gateway is full."""
    async with serving(settings(max_turns=0)) as gateway:
        assert (await gateway.chat()).status == 200


class Operations:
    """The metrics port of a gateway, for as long as the context."""

    def __init__(self, main: web.Application) -> None:
        self.listener = Listener(build_operations_app(main), "127.0.0.1", 0)

    async def __aenter__(self) -> int:
        await self.listener.start()
        return self.listener.port

    async def __aexit__(self, *_: object) -> None:
        await self.listener.stop()


async def test_metrics_port_serves_operations_only() -> None:
    async with serving(settings(api_keys=("sk-one",), trusted_networks=())) as gateway, Operations(gateway.app) as port:
        await gateway.ask("GET", "/v1/models")
        metrics = await ask(port, "GET", "/metrics", {"Host": "prometheus.example.com"})
        assert (metrics.status, metrics.header("content-type") or "")[0] == 200
        assert b'status="401"' in metrics.body, "they are the main port's figures"
        ready = await ask(port, "GET", "/ready")
        assert ready.json()["dependencies"]["letta"]["status"] == "ok"
        assert (await ask(port, "GET", "/health")).json() == {"status": "ok"}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/")):
            answer = await ask(port, method, path, {"X-Api-Key": "sk-one", "Content-Type": "application/json"})
            assert (answer.status, answer.code) == (404, "unknown_url")
        assert ready.header("server") is None


async def test_metrics_port_without_keys_is_for_this_machine_too() -> None:
    async with serving() as gateway, Operations(gateway.app) as port:
        assert (await ask(port, "GET", "/metrics")).status == 200
        assert (await ask(port, "GET", "/metrics", {"Host": "rebound.example.com"})).status == 403
        assert (await ask(port, "GET", "/metrics", {"Origin": "https://evil.example.com"})).status == 403


async def test_metrics_port_answers_errors_in_openais_shape() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.down = UpstreamUnavailable()
    async with serving(backend=backend) as gateway, Operations(gateway.app) as port:
        assert (await ask(port, "GET", "/ready")).status == 503
        answer = await ask(port, "DELETE", "/health")
        assert (answer.status, answer.header("allow"), answer.code) == (405, "GET, HEAD", "method_not_allowed")
