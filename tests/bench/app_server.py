"""`python -m tests.bench.app_server`: time to first token, the gateway against the App Server's own OpenAI surface.

One fresh App Server for each crowd, one scripted model behind both; the two take turns within one run. The server's own
surface builds a conversation for each request that names no chat, as the OpenAI SDK's do, and deletes it afterwards.
"""

import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_wire import AgentBody
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from tests.bench.processes import free_port, running
from tests.bench.targets import CACHE
from tests.live.model_thread import demo_model_in_thread

RESULT: Final = CACHE / "bench" / "app-server.json"
REPEATS: Final = 5
CROWDS: Final = (1, 5, 20)
ASK: Final = "Hello there"
_SERVER: Final = ("server", "--backend", "local", "--openai-api", "--listen")


class Sample(msgspec.Struct, frozen=True):
    """Times to first token of one crowd, in milliseconds."""

    target: str
    crowd: int
    milliseconds: list[float]

    @property
    def median(self) -> float:
        """Return the crowd's median."""
        return statistics.median(self.milliseconds)


class Findings(msgspec.Struct):
    """What one run found."""

    samples: list[Sample]

    def median(self, target: str, crowd: int) -> float:
        """Return the median of the repeats' medians."""
        return statistics.median(s.median for s in self.samples if (s.target, s.crowd) == (target, crowd))

    def ratio(self, target: str, other: str, crowd: int) -> float:
        """Return the median of the ratios of two targets within each repeat."""
        ours = [s.median for s in self.samples if (s.target, s.crowd) == (target, crowd)]
        own = [s.median for s in self.samples if (s.target, s.crowd) == (other, crowd)]
        return statistics.median(a / b for a, b in zip(ours, own, strict=True))


@contextmanager
def servers() -> Iterator[tuple[str, str]]:
    """Start the model, the App Server and the gateway before it; give the urls of the last two."""
    app_port, gateway_port = free_port(), free_port()
    logs = CACHE / "bench" / "logs"
    with ExitStack() as stack:
        model = stack.enter_context(demo_model_in_thread())
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="letta-bench-")))
        stack.enter_context(
            running(
                [sys.executable, "-c", "import letta_code; letta_code.main()", *_SERVER, f"ws://127.0.0.1:{app_port}"],
                app_port,
                log=logs / "app-server.log",
                path="/readyz",
                environment={
                    "HOME": str(home),
                    "LMSTUDIO_BASE_URL": model.base_url,
                    "DO_NOT_TRACK": "1",
                    "LETTA_CODE_TELEM": "0",
                },
            )
        )
        stack.enter_context(
            running(
                [str(Path(sys.executable).with_name("letta-gateway")), "serve"],
                gateway_port,
                log=logs / "gateway-app-server.log",
                environment={
                    "LETTA_BASE_URL": f"ws://127.0.0.1:{app_port}",
                    "LETTA_GATEWAY_PORT": str(gateway_port),
                    "LETTA_GATEWAY_RATE_LIMIT": "100000/minute",
                },
            )
        )
        yield f"http://127.0.0.1:{app_port}", f"http://127.0.0.1:{gateway_port}"


async def measure(own: str, gateway: str, crowd: int) -> list[Sample]:
    """Take a crowd's samples; every agent is spoken to once by the gateway before it counts as kept."""
    samples: list[Sample] = []
    names = (f"bench-{number}" for number in itertools.count())
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(total=120)
    ) as session:
        kept = await _make_agents(own, [next(names) for _ in range(crowd)])
        for target in (gateway, own):  # nothing is dated until both are warm
            await _crowd(session, target, kept)
        for _ in range(REPEATS):
            fresh, new = [await _make_agents(own, [next(names) for _ in range(crowd)]) for _ in range(2)]
            for target, url, agents in (
                ("own", own, kept),
                ("kept", gateway, kept),
                ("own, new", own, fresh),
                ("new", gateway, new),
                ("own, again", own, fresh),
                ("first", gateway, fresh),
            ):
                samples.append(Sample(target, crowd, await _crowd(session, url, agents)))
    return samples


async def _make_agents(own: str, names: list[str]) -> list[str]:
    tasks = TaskSet()
    backend = AppServerBackend(AppServerConfig(own.replace("http", "ws", 1)), Metrics(), tasks)
    try:
        return [(await backend.make_agent(AgentBody(name=name, model="lmstudio/demo"))).name for name in names]
    finally:
        await backend.close()


async def _crowd(session: aiohttp.ClientSession, url: str, agents: list[str]) -> list[float]:
    return list(await asyncio.gather(*(_first_token(session, url, agent) for agent in agents)))


async def _first_token(session: aiohttp.ClientSession, url: str, agent: str) -> float:
    body = {"model": agent, "stream": True, "messages": [{"role": "user", "content": ASK}]}
    started, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if (
                not first
                and b'"content":"' in line.replace(b'"content": "', b'"content":"')
                and b'"content":""' not in line
            ):
                first = time.perf_counter() - started
    assert first, f"{url} said nothing"
    return first * 1000


_ROWS: Final = (
    ("kept", "own", "spoken to through it before"),
    ("first", "own, again", "spoken to, but not through it"),
    ("new", "own, new", "just made"),
)


def markdown(findings: Findings) -> str:
    """Write the table."""
    lines = [
        "| chats at once | agents | App Server's own surface | gateway | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for crowd in CROWDS:
        for ours, own, agents in _ROWS:
            times = f"{findings.median(own, crowd):.0f} ms | {findings.median(ours, crowd):.0f} ms"
            lines.append(f"| {crowd} | {agents} | {times} | {findings.ratio(ours, own, crowd):.2f} x |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    findings = Findings([])
    for crowd in CROWDS:  # a fresh server for each: its state grows, and it grows slow
        with servers() as (own, gateway):
            findings.samples += asyncio.run(measure(own, gateway, crowd))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_bytes(msgspec.json.encode(findings))
    sys.stdout.write(markdown(findings) + "\n")


if __name__ == "__main__":
    main()
