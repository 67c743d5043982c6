"""Requests that leave no rings behind: what they hold, bodies included, goes with them, not when garbage is looked for.

On uvloop, as the gateway runs: asyncio's own transports are rings.
"""

import asyncio
import gc
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import pytest
import uvloop

from gateway.letta import rest_turn
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_turn import AgentTurn, Text, UserSaid
from tests.faults.chaos_upstream import ANSWER, BEGIN, BadLetta, Script, resets, says, status, until_cancelled
from tests.faults.gateways import Gateway, served
from tests.letta.batches import heard
from tests.letta.fake_app_server import AGENT, FakeAppServer
from tests.server.running import JSON
from tests.server.wire import ask

Doing: TypeAlias = Callable[[Gateway], Awaitable[None]]

OURS: Final = ("gateway", "middleware", "aiohttp", "aiohttp_sse")
TIMES: Final = 5


@contextmanager
def kept_garbage() -> Iterator[list[object]]:
    """Give the list of what only the collector would find at the end."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def place_of(thing: object) -> str:
    """Say where a thing is from."""
    if isinstance(thing, types.FrameType):
        return f"frame of {thing.f_globals.get('__name__')}"
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


async def left_by(url: str, doing: Doing) -> dict[str, int]:
    """Do something a few times, and count what of ours is left for the collector."""
    async with served(url) as gateway:
        await doing(gateway)
        await gateway.settled()
        with kept_garbage() as found:
            for _ in range(TIMES):
                await doing(gateway)
            await gateway.settled()
            await asyncio.sleep(0.1)  # connections end
        places = Counter(map(place_of, found))
        found.clear()
        return {place: many for place, many in places.items() if place.removeprefix("frame of ").startswith(OURS)}


def answered(expected: int = 200, **more: Any) -> Doing:
    async def doing(gateway: Gateway) -> None:
        assert (await gateway.chat(**more)).status == expected

    return doing


def responses(**more: Any) -> Doing:
    async def doing(gateway: Gateway) -> None:
        async with gateway.sdk() as client:
            gateway.requests += 1
            found = await client.responses.create(model="friend", input="Hi", **more)
            if more:
                async for _ in found:
                    pass

    return doing


async def broken_json(gateway: Gateway) -> None:
    gateway.requests += 1
    assert (await ask(gateway.port, "POST", "/v1/chat/completions", JSON, b"{")).status == 400


async def malformed_head(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        await client.send(b"GET /health HTTP/1.1\r\nno header\r\n\r\n" + b"x" * 10_000)
        assert (await client.answer()).status == 400


async def left_early(gateway: Gateway) -> None:
    async with gateway.streaming() as client:
        assert (await client.head()).status == 200
    await gateway.settled()


SITUATIONS: Final[dict[str, tuple[Script, Doing]]] = {
    "whole": (ANSWER, answered()),
    "stream": (ANSWER, answered(stream=True)),
    "response": (ANSWER, responses()),
    "streamed response": (ANSWER, responses(stream=True)),
    "wrong model": (ANSWER, answered(404, model="nobody")),
    "broken JSON": (ANSWER, broken_json),
    "malformed head": (ANSWER, malformed_head),
    "refused by Letta": ((status(500, {}),), answered(502)),
    "broken off": ((*BEGIN, says("Hel"), resets()), answered(stream=True)),
    "left early": ((*BEGIN, says("Hel"), until_cancelled()), left_early),
}


async def left_after(script: Script, doing: Doing) -> dict[str, int]:
    async with BadLetta() as letta:
        letta.plays(*script)
        return await left_by(letta.url, doing)


@pytest.mark.parametrize("name", SITUATIONS)
def test_request_leaves_nothing_to_the_collector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_turn, "SETTLE", 0.2)
    assert uvloop.run(left_after(*SITUATIONS[name])) == {}


def test_turn_of_an_app_server_leaves_nothing_to_the_collector() -> None:
    async def turn(backend: AppServerBackend) -> None:
        running = backend.turn(AgentTurn(agent_id=AGENT, news=(UserSaid((Text("Hi"),)),)))
        await running.open()
        await heard(running)
        running.close()

    async def left() -> dict[str, int]:
        tasks = TaskSet()
        async with FakeAppServer() as server:
            backend = AppServerBackend(AppServerConfig(server.url), Metrics(), tasks)
            await turn(backend)
            with kept_garbage() as found:
                for _ in range(TIMES):
                    await turn(backend)
                await asyncio.sleep(0.1)
            places = Counter(map(place_of, found))
            found.clear()
            await backend.close()
        await tasks.close(1)
        return {place: many for place, many in places.items() if "gateway." in place}

    assert uvloop.run(left()) == {}
