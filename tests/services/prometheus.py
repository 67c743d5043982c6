"""A real Prometheus with the deployed configuration, and what it knows."""

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from tests.bench.processes import free_port

DEPLOYED: Final = Path(__file__).parents[2] / "deploy" / "prometheus"
PROGRAMS: Final = ("prometheus", "promtool")
PATIENCE: Final = 60.0
_INTERVALS: Final = {
    "scrape_interval: 15s": "scrape_interval: 1s",
    "scrape_timeout: 10s": "scrape_timeout: 1s",
    "evaluation_interval: 15s": "evaluation_interval: 1s",
}
_TARGET: Final = "127.0.0.1:9464"
_GROUPING: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_SELECTOR: Final = re.compile(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()(?:\{[^}]*\})?")
_WORDS: Final = frozenset({"and", "or", "unless", "bool", "offset", "inf", "nan"})


class Rule(msgspec.Struct, frozen=True):
    """A rule as Prometheus has read it."""

    name: str
    query: str
    type: str
    health: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    lastError: str = ""  # noqa: N815 - as it stands on the wire


class Prometheus:
    """A running one."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self._url = f"http://127.0.0.1:{port}"

    async def api(self, path: str, **query: str) -> Any:
        """Ask its API, and return the data of the answer."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self._url}/api/v1/{path}", data=query)
            if query
            else session.get(f"{self._url}/api/v1/{path}") as answer,
        ):
            said = await answer.json()
        assert said["status"] == "success", (path, query, said)
        return said["data"]

    async def result(self, expression: str) -> list[Any]:
        """Return the series that an expression gives now; what was divided by nought is no data."""
        found: list[Any] = (await self.api("query", query=expression))["result"]
        return [series for series in found if series["value"][1] not in {"NaN", "+Inf", "-Inf"}]

    async def waits_for(self, expression: str, seconds: float = PATIENCE) -> list[Any]:
        """Ask until an expression gives some series."""
        end = asyncio.get_running_loop().time() + seconds
        while not (found := await self.result(expression)):
            assert asyncio.get_running_loop().time() < end, f"no data: {expression}"
            await asyncio.sleep(0.2)
        return found

    async def rules(self) -> list[Rule]:
        """Return all rules."""
        groups = (await self.api("rules"))["groups"]
        return msgspec.convert([rule for group in groups for rule in group["rules"]], list[Rule])

    async def serves(self) -> None:
        """Wait until it answers."""
        async with asyncio.timeout(PATIENCE):
            while True:
                assert self.process.returncode is None, "prometheus ended"
                with contextlib.suppress(aiohttp.ClientError):
                    await self.api("status/buildinfo")
                    return
                await asyncio.sleep(0.1)


def selectors(expression: str) -> Iterator[str]:
    """Yield the vector selectors of an expression."""
    for found in _SELECTOR.finditer(_GROUPING.sub("", re.sub(r"\[[^]]*\]", "", expression))):
        if found[0].lower() not in _WORDS:
            yield found[0]


def deployed_configuration(folder: Path, target: str) -> Path:
    """Copy what is deployed, with another target, looked at every second; return the configuration's path."""
    shutil.copytree(DEPLOYED, folder, dirs_exist_ok=True)
    path = folder / "prometheus.yml"
    text = path.read_text("utf-8")
    for given, chosen in {**_INTERVALS, _TARGET: target}.items():
        assert given in text
        text = text.replace(given, chosen)
    path.write_text(text, "utf-8")
    return path


@contextlib.asynccontextmanager
async def running_prometheus(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    """Run one that scrapes this target for as long as the context."""
    configuration, port = deployed_configuration(folder / "etc", target), free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    prometheus = Prometheus(process, port)
    try:
        await prometheus.serves()
        yield prometheus
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
