import asyncio
import contextlib
import threading
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Final

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.server.api_document import api_document, path_of
from gateway.server.routes import ROUTES
from tests.server.people import API_KEY, OPERATOR_KEY, Town, bearer, town

DOCUMENT: Final[dict[str, Any]] = msgspec.json.decode(api_document())


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_file_is_current() -> None:
    """``make openapi`` writes it anew."""
    assert files("gateway").joinpath("openapi.json").read_bytes() == api_document()


def test_every_route_is_described_and_nothing_else() -> None:
    assert {(method, path) for method, path, _ in operations()} == {(r.method, path_of(r)) for r in ROUTES}


def test_every_operation_says_what_it_does_and_who_may() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(names)) == len(names)
    for method, path, operation in operations():
        assert operation["summary"].endswith((".", "``")), (method, path)
        assert "``" not in operation["summary"]
        assert {"4XX", "5XX"} < operation["responses"].keys()
        placed = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
        assert placed == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert ("requestBody" in operation) <= (method in ("POST", "PATCH"))
        is_open = operation["security"] == []
        is_auth = path.startswith("/api/v1/auth/") and path.rpartition("/")[2] in ("register", "login", "refresh")
        assert is_open == (is_auth or path in ("/health", "/ready", "/.well-known/jwks.json", "/api/v1/openapi.json"))


def test_references_lead_somewhere() -> None:
    schemas = DOCUMENT["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(DOCUMENT))
    assert found
    assert {reference.removeprefix("#/components/schemas/") for reference in found} <= schemas.keys()


def test_nothing_of_a_server_is_in_it() -> None:
    text = api_document().decode()
    for word in ("letta.invalid", "password_hash", "litellm_key", "127.0.0.1", "site-packages", "msgspec"):
        assert word not in text


async def test_it_is_served_to_everybody() -> None:
    async with town(talks=False) as gateway:
        answer = await gateway.send("GET", "/api/v1/openapi.json", None)
        assert (answer.status, answer.header("content-type")) == (200, "application/json")
        assert answer.body == api_document()


# What is served is what is described --------------------------------------------------------------------------------


class Thread(threading.Thread):
    """A gateway with users that serves on a loop of its own, as the schema's requests are not asynchronous."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_ready = threading.Event()
        self.gateway: Town | None = None
        self.loop = asyncio.new_event_loop()
        self.over = asyncio.Event()

    def run(self) -> None:
        """Serve until it is over."""
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        async with town() as gateway:
            self.gateway = gateway
            self.is_ready.set()
            await self.over.wait()

    def stop(self) -> None:
        """End it."""
        self.loop.call_soon_threadsafe(self.over.set)
        self.join(20)


@contextlib.contextmanager
def gateway_thread() -> Iterator[Town]:
    thread = Thread()
    thread.start()
    try:
        assert thread.is_ready.wait(20)
        assert thread.gateway is not None
        yield thread.gateway
    finally:
        thread.stop()


SCHEMA: Final = schemathesis.openapi.from_dict(DOCUMENT)
ENDING: Final = ("/api/v1/user", "/api/v1/auth/logout")
"""What would end the session of all other requests."""


@pytest.fixture(scope="module")
def served() -> Iterator[Town]:
    with gateway_thread() as gateway:
        yield gateway


def credential(gateway: Town, path: str) -> str:
    if path.startswith("/api/v1/admin") or path == "/metrics":
        return OPERATOR_KEY
    return API_KEY if path.startswith("/v1/") else gateway.ann.token


@SCHEMA.exclude(path=list(ENDING)).parametrize()
@settings(max_examples=10, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_answered_as_described(case: schemathesis.Case[Any], served: Town) -> None:
    case.call_and_validate(
        base_url=f"http://127.0.0.1:{served.port}",
        headers=bearer(credential(served, case.path)),
        checks=[not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance],
        timeout=20,
    )


def test_streamed_chat_says_what_its_events_are() -> None:
    operation = DOCUMENT["paths"]["/api/v1/chat/message"]["post"]
    schema = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    names = {item["properties"]["event"]["const"]: item["properties"]["data"] for item in schema["oneOf"]}
    assert list(names) == ["start", "reasoning", "text", "tool", "usage", "done", "error"]
    assert names["start"] == {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": "#/components/schemas/Started"},
    }
    assert {"Started", "Piece", "Done", "TokenCounts"} <= DOCUMENT["components"]["schemas"].keys()


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/api/v1/chat/message", ["Idempotency-Key"]),
        ("/v1/chat/completions", ["Idempotency-Key", "X-Letta-Chat-Key", "X-OpenWebUI-Chat-Id"]),
        ("/v1/responses", ["Idempotency-Key", "X-Letta-Chat-Key", "X-OpenWebUI-Chat-Id"]),
    ],
)
def test_headers_that_mean_something_are_parameters(path: str, names: list[str]) -> None:
    parameters = DOCUMENT["paths"][path]["post"]["parameters"]
    assert [parameter["name"] for parameter in parameters if parameter["in"] == "header"] == names
