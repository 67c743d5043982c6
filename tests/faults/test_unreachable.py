"""F1, F25: Letta cannot be reached, or is not who it should be."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from gateway import keys
from gateway.letta import breaker, rest_turn
from gateway.letta.backend import Agent
from gateway.letta.catalog import models_of
from gateway.letta.detect import DetectedBackend
from tests.faults.chaos_upstream import ANSWER, BadLetta, Step, breaks_off, resets, status
from tests.faults.gateways import Gateway, nothing_left, served
from tests.server.wire import Answer

PATIENT: dict[str, Any] = {"silence_timeout": 2, "first_event_timeout": 2}
"""Longer than all tries to connect: the silence is counted from the first of them."""
BOTH = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def refusal(answer: Answer, code: str, *, number: int = 503, retry: str | None = "true") -> None:
    """See that an answer refuses as it should."""
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (number, code, retry)
    assert answer.header("x-request-id")


def slept(answer: Answer) -> int:
    """Return what ``Retry-After`` says."""
    return int(answer.header("retry-after") or "0")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the breaker's pauses short enough for a test to see several."""
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE", 0.3)


@contextlib.asynccontextmanager
async def knowing(letta: BadLetta, **changes: Any) -> AsyncIterator[Gateway]:
    """Serve a gateway that has listed the agents already, so that the next question is the turn itself."""
    async with served(letta, models_ttl=600, **{**PATIENT, **changes}) as gateway:
        assert (await gateway.get("/v1/models")).status == 200
        yield gateway


# Refused -------------------------------------------------------------------------------------------------------------


@BOTH
async def test_port_is_closed(letta: BadLetta, *, stream: bool) -> None:
    async with served(letta) as gateway:
        await letta.refuse()
        started = time.monotonic()
        answer = await gateway.chat(stream=stream)
        assert time.monotonic() - started < 1
        refusal(answer, "upstream_unavailable")
        assert slept(answer) == 2
        assert gateway.figure("upstream_errors_total", code="upstream_unavailable") == 1
    assert gateway.logs.requests[-1]["error_code"] == "upstream_unavailable"


@BOTH
async def test_port_is_closed_when_the_turn_begins(letta: BadLetta, *, stream: bool) -> None:
    async with knowing(letta) as gateway:
        await letta.refuse()
        started = time.monotonic()
        answer = await gateway.chat(stream=stream)
        assert time.monotonic() - started < 1
        refusal(answer, "upstream_unavailable")
        assert slept(answer) >= 1
        assert gateway.figure("upstream_retries_total") == len(rest_turn.CONNECT_PAUSES)
        await letta.listen()
        assert (await gateway.chat(stream=stream)).status == 200
    assert len(letta.posted) == 1


async def test_port_opens_while_we_try_again(letta: BadLetta) -> None:
    async with knowing(letta) as gateway:
        await letta.refuse()
        asked = asyncio.get_running_loop().create_task(gateway.chat(stream=True))
        await asyncio.sleep(0.05)
        await letta.listen()
        answer = await asked
        assert (answer.status, answer.text) == (200, "Hello")
    assert len(letta.posted) == 1


async def test_sdk_tries_again_by_itself(letta: BadLetta) -> None:
    async with served(letta) as gateway, gateway.sdk(max_retries=1) as sdk:
        await letta.refuse()
        gateway.requests += 2
        with pytest.raises(openai.InternalServerError) as raised:
            await sdk.chat.completions.create(model="friend", messages=[{"role": "user", "content": "Hi"}])
        assert raised.value.code == "upstream_unavailable"
    assert len(gateway.logs.requests) == 2, "x-should-retry says yes"


# The breaker ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
async def test_breaker_opens_and_recovers(letta: BadLetta) -> None:
    """Every try of a closed port is counted by a listener that hangs up before it says anything."""
    letta.listing = (resets(),)
    async with served(letta) as gateway:
        for _ in range(breaker.FAILURES_TO_OPEN):
            refusal(await gateway.chat(), "upstream_unavailable", retry="true")
        assert gateway.figure("breaker_open") == 1
        before = letta.connections
        for _ in range(20):
            answer = await gateway.chat()
            refusal(answer, "upstream_unavailable")
            assert slept(answer) >= 1
        assert letta.connections - before <= 2, "nobody hammers"
        letta.listing = BadLetta().listing
        async with asyncio.timeout(2 * 0.3 + 1):
            while (await gateway.chat()).status != 200:  # noqa: ASYNC110 - the client's own way of waiting
                await asyncio.sleep(0.02)
        assert gateway.figure("breaker_open") == 0
        assert (await gateway.chat()).status == 200


@pytest.mark.usefixtures("patient")
async def test_many_ask_while_the_breaker_is_open(letta: BadLetta) -> None:
    async with knowing(letta) as gateway:
        letta.plays(resets())
        for _ in range(breaker.FAILURES_TO_OPEN):
            refusal(await gateway.chat(), "upstream_unavailable", retry="false")
        before, started = len(letta.posted), time.monotonic()
        answers: list[Answer] = []
        while time.monotonic() - started < 1.0:
            answers += await asyncio.gather(*(gateway.chat(model=name) for name in ("friend", "other")))
            await asyncio.sleep(0.01)
        assert {answer.code for answer in answers} == {"upstream_unavailable"}
        probes = len(letta.posted) - before
        assert 2 <= probes <= 8, f"{probes} probes for {len(answers)} requests"
        letta.plays(*ANSWER)
        started = time.monotonic()
        while (await gateway.chat(stream=True)).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert time.monotonic() - started < 1.5
        assert gateway.figure("breaker_open") == 0


async def test_refused_credentials_do_not_open_the_breaker(letta: BadLetta) -> None:
    """Letta answers: that it refuses is the operator's affair, and the client must keep hearing so."""
    letta.listing = (status(401, {}, '{"detail":"Unauthorized"}'),)
    async with served(letta) as gateway:
        for _ in range(breaker.FAILURES_TO_OPEN + 2):
            refusal(await gateway.chat(), "upstream_auth_failed", number=502, retry="false")
        assert gateway.figure("breaker_open") == 0


# Reset before the answer ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("fault", [resets(), breaks_off()], ids=["rst", "fin"])
async def test_gone_before_the_answer(letta: BadLetta, fault: Step, *, stream: bool) -> None:
    async with knowing(letta) as gateway:
        letta.plays_next(fault)
        answer = await gateway.chat(stream=stream)
        refusal(answer, "upstream_unavailable", retry="false")
        assert len(letta.posted) == 1, "it may have been delivered: never twice"
        assert (await gateway.chat(stream=stream)).status == 200


async def test_sdk_does_not_send_twice_what_may_have_been_delivered(letta: BadLetta) -> None:
    async with knowing(letta) as gateway, gateway.sdk(max_retries=2) as sdk:
        letta.plays(resets())
        gateway.requests += 1
        with pytest.raises(openai.InternalServerError):
            await sdk.chat.completions.create(model="friend", messages=[{"role": "user", "content": "Hi"}])
    assert len(letta.posted) == 1


async def test_accepts_nothing(letta: BadLetta) -> None:
    """A port whose queue is full: the connection itself hangs."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)  # noqa: FBT003 - the socket API's own signature
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        async with served(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=0.3) as gateway:
            started = time.monotonic()
            answer = await gateway.chat()
            assert time.monotonic() - started < 1
            refusal(answer, "upstream_timeout", number=504)


# Who is it -----------------------------------------------------------------------------------------------------------


async def test_name_does_not_resolve(letta: BadLetta) -> None:
    async with served("http://letta.invalid:8283", **PATIENT) as gateway:
        started = time.monotonic()
        answer = await gateway.chat()
        assert time.monotonic() - started < 2
        refusal(answer, "upstream_name_not_resolved", number=502)
        await turn_alone(gateway, "upstream_name_not_resolved", retry="true")


async def turn_alone(gateway: Gateway, code: str, retry: str) -> None:
    """Ask for a turn where the listing is known from elsewhere, and with it that this is a V1 server."""
    detected = gateway.app[keys.BACKEND]
    assert isinstance(detected, DetectedBackend)
    detected._found = detected._make("rest")
    gateway.app[keys.CATALOG]._models = models_of([Agent("agent-1", "friend", 0)])
    gateway.app[keys.CATALOG]._expires = time.monotonic() + 600
    refusal(await gateway.chat(stream=True), code, number=502, retry=retry)


class Certificates(msgspec.Struct):
    """Certificates that sign themselves, all of them trusted: what is wrong with one is what its name says."""

    folder: Path

    def make(self, name: str, *, host: str = "IP:127.0.0.1", days: int = 2) -> ssl.SSLContext:
        """Make a certificate and return a server's context with it; ``days`` below zero: it is over."""
        key, request, made = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "pem"))
        names = self.folder / "names"
        names.write_text(f"subjectAltName={host}")
        for command in (
            ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-keyout", str(key), "-out", str(request), "-subj", f"/CN={name}"],
            ["x509", "-req", "-in", str(request), "-signkey", str(key), "-days", str(days), "-extfile", str(names),
             "-out", str(made)],
        ):  # fmt: skip
            subprocess.run(["openssl", *command], check=True, capture_output=True)
        with (self.folder / "trusted.pem").open("a") as trusted:
            trusted.write(made.read_text())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made, key)
        return context


@pytest.fixture
def certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certificates:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    return Certificates(tmp_path)


async def test_certificate_of_a_private_authority(certificates: Certificates) -> None:
    """What the machine trusts is trusted, by the control plane and by the token stream."""
    async with nothing_left(), BadLetta(tls=certificates.make("good")) as letta, served(letta) as gateway:
        assert (await gateway.chat(stream=True)).text == "Hello"


@pytest.mark.parametrize("wrong", [{"days": -1}, {"host": "DNS:letta.example.com"}], ids=["expired", "other host"])
async def test_certificate_is_wrong(certificates: Certificates, wrong: dict[str, Any]) -> None:
    async with (
        nothing_left(),
        BadLetta(tls=certificates.make("bad", **wrong)) as letta,
        served(letta, **PATIENT) as gateway,
    ):
        refusal(await gateway.chat(), "upstream_tls_failed", number=502, retry="false")
        await turn_alone(gateway, "upstream_tls_failed", retry="false")
        assert letta.lines == [], "not a word is said to whoever that is"


async def test_certificate_of_nobody(certificates: Certificates) -> None:
    context = certificates.make("unknown")
    (certificates.folder / "trusted.pem").unlink()
    certificates.make("other")
    async with nothing_left(), BadLetta(tls=context) as letta, served(letta, **PATIENT) as gateway:
        refusal(await gateway.chat(), "upstream_tls_failed", number=502, retry="false")
        await turn_alone(gateway, "upstream_tls_failed", retry="false")
        assert letta.lines == []


async def test_it_speaks_no_tls(letta: BadLetta) -> None:
    async with served(letta.url.replace("http", "https")) as gateway:
        answer = await gateway.chat()
        assert answer.status in (502, 503, 504)
        assert letta.lines == []
