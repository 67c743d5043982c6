import asyncio
import contextlib
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from gateway.letta.scripted import Hang, Script, ScriptedBackend
from gateway.translation.agent_events import TextDelta
from tests.bench.processes import free_port
from tests.server.recorded_logs import RecordedLogs, recorded_logs
from tests.server.running import FRIEND, JSON, Running, chat_body, chat_request, serving, settings
from tests.server.wire import Answer, ask, request, until
from tests.services.nginx import (
    API_KEY,
    KEY,
    PROXY,
    SERVER_NAME,
    SITE,
    Nginx,
    client_context,
    nginx,
    program,
    write_config,
)

OUTSIDE: Final = "127.0.0.2"
OPERATOR: Final = "127.0.0.3"
OPERATOR_KEY: Final = "sk-operator"
CANARY: Final = "sk-canary-7f3a"
MAX_BODY: Final = 20_971_520


class Site:
    """A gateway, the nginx before it, and what the gateway logs."""

    def __init__(self, gateway: Running, nginx: Nginx, logs: RecordedLogs) -> None:
        self.gateway = gateway
        self.nginx = nginx
        self.logs = logs

    async def chat(self, text: str = "Hi", *, source: str = OUTSIDE, **headers: str) -> Answer:
        """Ask for one chat completion, from outside."""
        given = {**JSON, **KEY, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return await self.nginx.ask("POST", "/v1/chat/completions", given, chat_body(text), source=source)


@contextlib.asynccontextmanager
async def site(
    folder: Path,
    *,
    backend: ScriptedBackend | None = None,
    before: str = "",
    of_nginx: Mapping[str, str] = {},
    **of: Any,
) -> AsyncIterator[Site]:
    usual = {"api_keys": (API_KEY,), "operator_key": OPERATOR_KEY, "trusted_networks": (f"{PROXY}/32",)}
    with recorded_logs() as logs:
        async with (
            serving(settings(**{**usual, **of}), backend) as gateway,
            nginx(folder, gateway.port, before=before, **of_nginx) as running,
        ):
            yield Site(gateway, running, logs)


def test_nginx_accepts_the_file(tmp_path: Path) -> None:
    main = write_config(tmp_path, free_port(), free_port(), [8080, 8081], "", {})
    said = subprocess.run(
        [program(), "-t", "-p", tmp_path, "-e", tmp_path / "error.log", "-c", main],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    warnings = [line for line in said.stderr.splitlines() if "[warn]" in line]
    assert all('the "listen ... http2" directive is deprecated' in line for line in warnings), warnings


def test_bounds_are_those_of_the_gateway() -> None:
    usual, text = settings(), SITE.read_text("utf-8")

    def seconds(directive: str) -> float:
        return float(re.findall(rf"^    {directive} (\d+)s;", text, re.MULTILINE)[0])

    assert f"client_max_body_size {usual.max_body};" in text
    assert f"limit of {usual.max_body} bytes" in text
    assert seconds("client_body_timeout") <= usual.body_timeout
    assert seconds("send_timeout") <= usual.write_timeout
    assert seconds("proxy_read_timeout") > usual.turn_timeout + usual.queue_wait


async def test_answer_of_the_agent(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        answer = await here.chat(X_Request_Id="from-the-client")
        listed = await here.nginx.ask("GET", "/v1/models?after=x", KEY, source=OUTSIDE)
    assert (answer.status, listed.status) == (200, 200)
    assert answer.header("server") == "nginx", "without its version"
    assert answer.header("x-request-id") == "from-the-client"
    assert answer.header("strict-transport-security")
    assert [line["request_id"] for line in here.nginx.requests] == [
        "from-the-client",
        listed.header("x-request-id"),
    ]
    assert [line["path"] for line in here.nginx.requests] == ["/v1/chat/completions", "/v1/models"]


async def test_body_in_chunks(tmp_path: Path) -> None:
    body = chat_body("Hello in chunks")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7))
    async with site(tmp_path) as here:
        headers = {**JSON, **KEY, "Transfer-Encoding": "chunked"}
        answer = await here.nginx.ask("POST", "/v1/chat/completions", headers, chunks + b"0\r\n\r\n")
        assert answer.status == 200
        assert len(here.gateway.backend.turns) == 1


async def test_http2_is_offered(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        offering = client_context(tmp_path)
        offering.set_alpn_protocols(["h2", "http/1.1"])
        here.nginx.tls = offering
        async with here.nginx.connect() as connection:
            chosen = connection.writer.get_extra_info("ssl_object").selected_alpn_protocol()
        offering.maximum_version = ssl.TLSVersion.TLSv1_2
        async with here.nginx.connect() as connection:
            version = connection.writer.get_extra_info("ssl_object").version()
    assert (chosen, version) == ("h2", "TLSv1.2")


async def test_client_that_leaves_is_known_to_the_gateway(tmp_path: Path) -> None:
    backend = ScriptedBackend([FRIEND], usual=Script(([TextDelta("Hel")], Hang())))
    async with site(tmp_path, backend=backend) as here:
        async with here.nginx.connect() as client:
            await client.send(chat_request(stream=True, headers=KEY))
            await client.head()
            assert not backend.turns[0].closed
        await until(lambda: backend.turns[0].closed)


async def test_connections_to_the_gateway_are_kept(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for _ in range(40):
            assert (await here.nginx.ask("GET", "/health")).status == 200
        assert 1 <= len(here.gateway.listener._crowd) <= 2, "one for each worker"
        assert len(here.logs.requests) == 40


# Who is asking -------------------------------------------------------------------------------------------------------

CLAIMS: Final = (
    {"X-Forwarded-For": "9.9.9.9"},
    {"X-Forwarded-For": f"{PROXY}, {PROXY}"},
    {"X-Real-IP": "9.9.9.9"},
    {"Forwarded": "for=9.9.9.9"},
    {"X_Forwarded_For": "9.9.9.9"},
    {"X-Forwarded-For": PROXY, "Forwarded": f"for={PROXY}", "X-Real-IP": PROXY},
)


async def test_address_that_a_client_claims_is_not_believed(tmp_path: Path) -> None:
    async with site(tmp_path, rate_limit=f"{len(CLAIMS)}/hour") as here:
        for claim in CLAIMS:
            assert (await here.nginx.ask("GET", "/v1/models", {**KEY, **claim}, source=OUTSIDE)).status == 200
        over = await here.nginx.ask("GET", "/v1/models", {**KEY, "X-Forwarded-For": "8.8.8.8"}, source=OUTSIDE)
        assert (over.status, over.code) == (429, "rate_limit_exceeded")
        assert {line["client"] for line in here.logs.requests} == {OUTSIDE}


async def test_what_the_gateway_is_told_of_the_client(tmp_path: Path) -> None:
    """Nothing of what the client says of itself, and nothing that gateways tell one another."""
    heads: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    claims = {
        **dict.fromkeys(("X-Forwarded-For", "X-Real-IP", "X-Forwarded-Host", "X-Forwarded-Port"), "9.9.9.9"),
        **dict.fromkeys(("X-Forwarded-Proto", "X-Letta-Gateway-Forwarded", "X_Forwarded_For"), "9.9.9.9"),
        "Forwarded": "for=9.9.9.9",
    }
    async with (
        await asyncio.start_server(note, "127.0.0.1", 0) as server,
        nginx(tmp_path, server.sockets[0].getsockname()[1]) as running,
    ):
        answer = await running.ask("GET", "/v1/models", {**KEY, **claims, "Host": SERVER_NAME}, source=OUTSIDE)
    assert answer.status == 204
    told = dict(line.split(": ", 1) for line in heads[0].decode().split("\r\n")[1:-2])
    assert told.pop("X-Request-Id").startswith("req_")
    assert told == {"Host": SERVER_NAME, "X-Forwarded-For": OUTSIDE, "X-Forwarded-Proto": "https", **KEY}


CLOSED: Final = (
    "/metrics",
    "/metrics?x=/v1/",
    "/%6Detrics",
    "//metrics",
    "/metrics/",
    "http://gateway.example.com/metrics",
    "/ready",
    "/ui",
    "/ui/",
    "/ui/app.js",
    "/ui/api/session",
    "/",
    "/api/v1/admin",
    "/api/v1/admin/users",
    "/api/v1//admin/users",
    "/api/v1/%61dmin/users",
    "/letta-gateway-error/malformed",
)


CLIMBING: Final = (
    "/v1/../metrics",
    "/v1/%2e%2e/metrics",
    "/v1/..%2fmetrics",
    "/v1/../ui",
    "/v1/./models",
    "/v1/models/..",
    "/v1/models/x%2F%2E%2E?x=1",
    "/api/v1/auth/../admin/users",
    "/api/v1/admin/users/..%2f..%2f..%2f..%2fv1%2fmodels",
    "/api/v1/admin/users/%2e%2e/../../../v1/models",
    "/ui/api/models/x/../../../../v1/models",
    "/ui/../v1/models",
    "/ui/..%2F..%2Fv1/models",
    "/metrics/../v1/models",
    "http://gateway.example.com/ui/../v1/models",
    "//ui/../v1/models",
)


async def test_paths_that_climb_reach_no_gateway(tmp_path: Path) -> None:
    """Or a wrong operator key and the right one would get different answers from anywhere."""
    async with site(tmp_path, of_nginx={"inside": f"{OPERATOR} 1;"}) as here:
        for target in CLIMBING:
            for key in (OPERATOR_KEY, "sk-guess"):
                headers = {"Authorization": f"Bearer {key}"}
                for source in (OUTSIDE, OPERATOR):
                    answer = await here.nginx.ask("GET", target, headers, source=source)
                    assert (answer.status, answer.code) == (400, "malformed_request"), target
        assert here.logs.requests == []
        for target in ("/v1/models/a..b", "/v1/models/...", "/v1/models/team%2Fa?x=/../y", "/v1/models/.hidden"):
            assert (await here.nginx.ask("GET", target, KEY, source=OUTSIDE)).code == "model_not_found", target


async def test_what_is_not_for_clients_is_closed_from_outside(tmp_path: Path) -> None:
    """Whoever has the operator's key, too; and none of it reaches the gateway."""
    headers = {"Authorization": f"Bearer {OPERATOR_KEY}", "X-Forwarded-For": PROXY}
    async with site(tmp_path, of_nginx={"inside": f"{OPERATOR} 1;"}) as here:
        for target in CLOSED:
            for source in (OUTSIDE, PROXY):
                answer = await here.nginx.ask("GET", target, headers, source=source)
                assert (answer.status, answer.code) == (404, "unknown_url"), target
        assert here.logs.requests == []
        for target in ("/metrics", "/ready", "/api/v1/admin/users"):
            assert (await here.nginx.ask("GET", target, headers, source=OPERATOR)).status == 200, target
        assert (await here.nginx.ask("GET", "/ui", source=OPERATOR)).status == 200
        key = msgspec.json.encode({"key": OPERATOR_KEY})
        session = await here.nginx.ask("POST", "/ui/api/sign-in", JSON, key, source=OPERATOR)
        assert session.status == 200
        assert "; Secure" in (session.header("set-cookie") or "")
        outside = await here.nginx.ask("POST", "/ui/api/sign-in", JSON, key, source=OUTSIDE)
        assert (outside.status, outside.header("set-cookie")) == (404, None)


async def test_what_is_for_anybody_is_open(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for target in ("/health", "/.well-known/jwks.json", "/api/v1/openapi.json"):
            assert (await here.nginx.ask("GET", target, source=OUTSIDE)).status == 200, target
        assert (await here.nginx.ask("GET", "/v1/models", source=OUTSIDE)).status == 401


# Its own errors ------------------------------------------------------------------------------------------------------

REFUSED: Final = {
    "URL of 9 KiB": request("GET", f"/v1/models?{CANARY}{'x' * 9_000}", KEY),
    "header of 9 KiB": request("GET", "/v1/models", {**KEY, "X-Long": CANARY + "x" * 9_000}),
    "cookie of a megabyte": request("GET", "/v1/models", {**KEY, "Cookie": CANARY * 70_000}),
    "200 headers": request("GET", "/v1/models", [*KEY.items(), *[("X-Many", CANARY)] * 200]),
    "no host": b"GET /v1/models HTTP/1.1\r\nX-Key: " + CANARY.encode() + b"\r\n\r\n",
    "body that says it is too long": request(
        "POST", "/v1/chat/completions", {**KEY, **JSON, "Content-Length": str(MAX_BODY + 1)}
    ),
    "path that is none": request("GET", f"/{CANARY}", KEY),
    "method that is none": request("TRACE", f"/v1/models?{CANARY}", KEY),
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED.keys())
async def test_refused_as_the_gateway_refuses(tmp_path: Path, sent: bytes) -> None:
    """The same status, type and code; and nothing of the request in the answer or a log."""
    async with site(tmp_path) as here:
        async with here.gateway.connect() as direct:
            with contextlib.suppress(ConnectionError):
                await direct.send(sent)
            expected = await direct.answer()
        async with here.nginx.connect(OUTSIDE) as through:
            with contextlib.suppress(ConnectionError):
                await through.send(sent)
            answer = await through.answer()
        assert answer.status == expected.status >= 400
        assert {**answer.error, "message": ""} == {**expected.error, "message": ""}
        assert answer.header("content-type") == "application/json"
        assert answer.header("x-content-type-options") == "nosniff"
        assert CANARY not in f"{answer}{here.nginx.errors}"
        assert all(CANARY not in str(line["path"]) for line in here.nginx.requests if line["status"] != 404)


async def test_body_that_turns_out_too_long(tmp_path: Path) -> None:
    """In chunks, without a length: no turn comes of it."""
    async with site(tmp_path) as here:
        piece = b"%x\r\n%b\r\n" % (1 << 20, b" " * (1 << 20))
        headers = {**JSON, **KEY, "Transfer-Encoding": "chunked"}
        answer = await here.nginx.ask("POST", "/v1/chat/completions", headers, piece * 21 + b"0\r\n\r\n")
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert here.gateway.backend.turns == []


async def test_too_many_at_once_from_one_address(tmp_path: Path) -> None:
    backend = ScriptedBackend([FRIEND], usual=Script(([TextDelta("Hel")], Hang())))
    few = {"connections": "limit_conn letta_gateway_clients 2;", "front_ends": f"{OPERATOR} 1;"}
    async with site(tmp_path, backend=backend, of_nginx=few) as here, contextlib.AsyncExitStack() as stack:
        for source in (OUTSIDE, OUTSIDE, *[OPERATOR] * 4):
            client = await stack.enter_async_context(here.nginx.connect(source))
            named = {**KEY, "X-Letta-Chat-Key": f"{id(client)}"}
            await client.send(chat_request(stream=True, headers=named))
            assert (await client.head()).status == 200
        over = await here.chat(source=OUTSIDE)
        assert (over.status, over.code, over.error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert (over.header("retry-after"), over.header("x-should-retry")) == ("2", "true")
        assert (await here.nginx.ask("GET", "/v1/models", KEY, source="127.0.0.4")).status == 200
        assert len(backend.turns) == 6


ADDRESSES: Final = {
    "the same network": (("2001:db8:0:1::1", "2001:db8:0:1:ffff::2"), 429),
    "two networks": (("2001:db8:0:1::1", "2001:db8:0:2::1"), 200),
    "a network of zeros and line ends": (("2001:db8:a0a:a0a::1", "2001:db8:a0a:a0a::a0a"), 429),
    "IPv4": (("192.0.2.1", "192.0.2.2"), 200),
}


@pytest.mark.parametrize(("addresses", "status"), ADDRESSES.values(), ids=ADDRESSES.keys())
async def test_an_ipv6_network_is_one_client(tmp_path: Path, addresses: tuple[str, str], status: int) -> None:
    backend = ScriptedBackend([FRIEND], usual=Script(([TextDelta("Hel")], Hang())))
    named_by_header = "set_real_ip_from 127.0.0.0/8; real_ip_header X-Test-Address;"
    one = {"connections": "limit_conn letta_gateway_clients 1;"}
    async with (
        site(tmp_path, backend=backend, before=named_by_header, of_nginx=one) as here,
        here.nginx.connect() as client,
    ):
        await client.send(chat_request(stream=True, headers={**KEY, "X-Test-Address": addresses[0]}))
        assert (await client.head()).status == 200
        second = await here.nginx.ask("GET", "/v1/models", {**KEY, "X-Test-Address": addresses[1]})
        assert second.status == status


async def test_gateway_that_is_not_there(tmp_path: Path) -> None:
    async with nginx(tmp_path, free_port()) as alone:
        answer = await alone.ask("POST", "/v1/chat/completions", {**JSON, **KEY}, chat_body())
    assert (answer.status, answer.code, answer.error["type"]) == (503, "gateway_unavailable", "server_error")
    assert (answer.header("retry-after"), answer.header("x-should-retry")) == ("2", "true")
    assert answer.header("x-request-id")


async def test_gateway_that_does_not_accept(tmp_path: Path) -> None:
    """As a host that has vanished: nothing answers to the first packet, and nothing was sent."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)  # noqa: FBT003 - the socket API's own signature
            waiting.connect_ex(full.getsockname())
        async with nginx(tmp_path, full.getsockname()[1]) as alone:
            answer = await alone.ask("POST", "/v1/chat/completions", {**JSON, **KEY}, chat_body())
    assert (answer.status, answer.code) == (503, "gateway_unavailable")
    assert answer.header("x-should-retry") == "true"


@pytest.mark.parametrize(
    ("method", "status", "code", "should_retry"),
    [("POST", 502, "gateway_failed", "false"), ("GET", 503, "gateway_unavailable", "true")],
)
async def test_gateway_that_ends_before_it_answers(
    tmp_path: Path, method: str, status: int, code: str, should_retry: str
) -> None:
    """It may have heard the message: the one thing nobody may do is to say it again."""
    heard = 0

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        await reader.readuntil(b"\r\n\r\n")
        heard += 1
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(await asyncio.start_server(hear, "127.0.0.1", 0)) for _ in range(2)]
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        running = await stack.enter_async_context(nginx(tmp_path, *ports))
        answer = await running.ask(method, "/v1/models", {**JSON, **KEY}, b"{}")
        assert [line["method"] for line in running.requests] == [method]
    assert heard == (1 if method == "POST" else 2)
    assert (answer.status, answer.code) == (status, code)
    assert answer.header("x-should-retry") == should_retry
    assert answer.header("retry-after") == ("2" if should_retry == "true" else None)


# Slow bodies ---------------------------------------------------------------------------------------------------------


async def test_body_that_drips_ends_when_the_gateway_says(tmp_path: Path) -> None:
    """A byte now and then keeps no deadline between two pieces busy: the one for all of them counts."""
    async with site(tmp_path, body_timeout=0.6) as here, here.nginx.connect(OUTSIDE) as client:
        head = request("POST", "/v1/chat/completions", {**JSON, **KEY, "Content-Length": "1000"})
        await client.send(head + b"{")
        answering = asyncio.get_running_loop().create_task(client.answer())
        started = asyncio.get_running_loop().time()
        while not answering.done():
            with contextlib.suppress(ConnectionError):
                await client.send(b" ")
            await asyncio.sleep(0.05)
            assert asyncio.get_running_loop().time() - started < 5
        answer = await answering
    assert (answer.status, answer.code) == (408, "request_timeout")


async def test_body_of_a_stranger_is_not_waited_for(tmp_path: Path) -> None:
    """The gateway sees that the key is wrong before the body is there."""
    async with site(tmp_path) as here, here.nginx.connect(OUTSIDE) as client:
        headers = {**JSON, "Authorization": "Bearer sk-wrong", "Content-Length": str(MAX_BODY)}
        await client.send(request("POST", "/v1/chat/completions", headers) + b"{")
        answer = await client.answer()
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert not [path for path in (tmp_path / "body").rglob("*") if path.is_file()], "nothing of it is stored"


# Plain HTTP ----------------------------------------------------------------------------------------------------------


async def test_plain_http_redirects_what_holds_no_secret(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for method in ("GET", "HEAD"):
            answer = await ask(here.nginx.plain_port, method, "/v1/models?limit=2", {"Host": "elsewhere.example.com"})
            assert answer.status == 301
            assert answer.header("location") == f"https://{SERVER_NAME}/v1/models?limit=2"
        assert here.logs.requests == []


async def test_challenge_of_a_certificate_authority_is_answered(tmp_path: Path) -> None:
    """By HTTP, as it is asked: there may be no certificate that holds yet."""
    path = "/.well-known/acme-challenge/token-1"
    file = tmp_path / "challenges" / path[1:]
    file.parent.mkdir(parents=True)
    file.write_text("token-1.thumbprint")
    async with site(tmp_path, of_nginx={"challenges": f"root {tmp_path}/challenges;"}) as here:
        answer = await ask(here.nginx.plain_port, "GET", path, {"Host": SERVER_NAME})
        assert (answer.status, answer.body) == (200, b"token-1.thumbprint")
        assert (await ask(here.nginx.plain_port, "GET", f"{path}0", {"Host": SERVER_NAME})).status == 404
        assert (await ask(here.nginx.plain_port, "GET", f"{path}/../../x", {"Host": SERVER_NAME})).status == 301
        assert here.logs.requests == []


SECRETS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "a message": ("POST", {}),
    "a key": ("GET", KEY),
    "a key in the other header": ("GET", {"X-Api-Key": API_KEY}),
    "a memory": ("PATCH", {}),
}


@pytest.mark.parametrize(("method", "headers"), SECRETS.values(), ids=SECRETS.keys())
async def test_plain_http_refuses_what_holds_a_secret(tmp_path: Path, method: str, headers: dict[str, str]) -> None:
    async with site(tmp_path) as here:
        answer = await ask(here.nginx.plain_port, method, "/v1/chat/completions", {**JSON, **headers}, chat_body())
        assert (answer.status, answer.code) == (403, "https_required")
        assert here.logs.requests == []
