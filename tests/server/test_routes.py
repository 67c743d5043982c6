import pytest

from gateway.server.routes import OPERATIONS, PAGE, ROUTES
from tests.server.running import serving, settings
from tests.server.wire import ask


def test_operations_are_routes_too() -> None:
    assert set(OPERATIONS) <= set(ROUTES)


def test_no_route_stands_twice() -> None:
    every = (*ROUTES, *PAGE)
    assert len({(route.method, route.path) for route in every}) == len(every)


def test_one_path_has_one_rule() -> None:
    """Who may come in is told by the path alone: the methods of one path cannot differ."""
    every = (*ROUTES, *PAGE)
    rules = {(route.path, route.access) for route in every}
    assert len(rules) == len({route.path for route in every})


def test_all_of_the_page_is_below_one_path() -> None:
    """Where its cookie goes, and what a proxy closes."""
    assert all(route.path == "/ui" or route.path.startswith("/ui/") for route in PAGE)
    assert not [route for route in ROUTES if route.path.startswith("/ui")]


@pytest.mark.parametrize(
    "target",
    [
        "/%00",
        "/v1/models%00",
        "//health",
        "/v1//models",
        "/health/",
        "/metrics/",
        "/v1/models/",
        "/v1/chat/completions/",
        "/v1;x/models",
        "/V1/models",
        "/HEALTH",
        "/v1",
        "/",
        "/.env",
        "/v1/agents",
        "/v1/tools/run",
        "/v1/models?x=1;/../..",
        "http://evil.example.com/v1/agents",
    ],
)
async def test_path_that_is_none(target: str) -> None:
    async with serving() as gateway:
        answer = await gateway.ask("GET", target)
        if target.startswith("/v1/models?"):
            assert answer.status in (200, 404)
        else:
            assert (answer.status, answer.code) == (404, "unknown_url")
        assert gateway.backend.searches == []


@pytest.mark.parametrize(
    "target",
    [
        "/..%2fhealth",
        "/v1/..%2f..%2fmetrics",
        "/v1/../metrics",
        "/v1/models/..%2f..%2fv1%2ftools",
        "/v1/models/%2e%2e%2f",
        "/v1/models/.",
        "/ui/%2e%2E",
        "/ui/..%2Fpages.py",
        "/ui/api/models/x/../../../../v1/models",
        "/api/v1/admin/users/..%2f..%2f..%2f..%2fv1%2fmodels",
        "http://evil.example.com/v1/../metrics",
    ],
)
async def test_path_that_climbs(target: str) -> None:
    """A proxy before the gateway may have taken it for another one: nothing is told, not even of a key."""
    async with serving(settings(api_keys=("sk-one",), operator_key="sk-operator")) as gateway:
        for key in ("sk-one", "sk-operator", "sk-guess"):
            answer = await gateway.ask("GET", target, {"Authorization": f"Bearer {key}"})
            assert (answer.status, answer.code) == (400, "malformed_request")
        assert gateway.backend.searches == []


@pytest.mark.parametrize("model", ["v1%2ftools", "agent-..%2ftools%2frun", "a..b", "a;b", "%00"])
async def test_model_that_looks_like_a_path(model: str) -> None:
    async with serving() as gateway:
        answer = await gateway.ask("GET", f"/v1/models/{model}")
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert gateway.backend.listings == 0


async def test_model_with_a_slash_in_its_name() -> None:
    async with serving() as gateway:
        agent = gateway.backend.listed[0]
        gateway.backend.listed = [type(agent)(agent.id, "team/écrivain 1", 5)]
        for target in ("/v1/models/team/%C3%A9crivain%201", "/v1/models/team%2F%C3%A9crivain%201"):
            assert (await gateway.ask("GET", target)).json()["id"] == "team/écrivain 1"


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/friend", "GET, HEAD"),
        ("DELETE", "/v1/models/friend", "GET, HEAD"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("TRACE", "/health", "GET, HEAD"),
        ("PROPFIND", "/v1/models", "GET, HEAD"),
    ],
)
async def test_method_that_a_path_does_not_take(method: str, target: str, allow: str) -> None:
    async with serving() as gateway:
        body = {"Content-Type": "application/json"} if method in ("POST", "PUT") else {}
        answer = await gateway.ask(method, target, {**body, "X-HTTP-Method-Override": "GET"})
        assert (answer.status, answer.header("allow")) == (405, allow)
        if method != "HEAD":
            assert answer.code == "method_not_allowed"


async def test_method_override_is_not_heard() -> None:
    async with serving() as gateway:
        headers = {"X-HTTP-Method-Override": "POST", "X-Method-Override": "POST", "X-HTTP-Method": "POST"}
        assert (await gateway.ask("GET", "/v1/chat/completions", headers)).status == 405
        assert gateway.backend.turns == []


@pytest.mark.parametrize("target", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/friend"])
async def test_head_is_get_without_a_body(target: str) -> None:
    async with serving() as gateway:
        got, head = await gateway.ask("GET", target), await gateway.ask("HEAD", target)
        assert (head.status, head.body) == (200, b"")
        assert head.header("content-type") == got.header("content-type")


async def test_request_for_another_server_is_not_passed_on() -> None:
    async with serving() as gateway:
        assert (await gateway.raw(b"CONNECT evil.example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n")).status == 404
        assert (await ask(gateway.port, "OPTIONS", "*")).status == 404
