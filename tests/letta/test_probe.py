"""Asking Letta whether it answers."""

import asyncio

import pytest

from gateway.errors import UpstreamUnavailable
from gateway.letta import probe
from gateway.letta.probe import Probe
from gateway.letta.scripted import ScriptedBackend
from gateway.tasks import TaskSet


async def test_server_answers() -> None:
    health = await Probe(ScriptedBackend().ping, TaskSet()).health()
    assert health.failure is None
    assert health.seconds >= 0


async def test_server_is_down() -> None:
    backend = ScriptedBackend()
    backend.down = UpstreamUnavailable()
    assert (await Probe(backend.ping, TaskSet()).health()).failure == "upstream_unavailable"


async def test_a_crowd_asks_once() -> None:
    backend = ScriptedBackend()
    asked = Probe(backend.ping, TaskSet())
    answers = await asyncio.gather(*(asked.health() for _ in range(100)))
    assert backend.pings == 1
    assert set(answers) == {answers[0]}
    await asked.health()
    assert backend.pings == 1


async def test_an_answer_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TTL", 0.05)
    backend = ScriptedBackend()
    asked = Probe(backend.ping, TaskSet())
    assert (await asked.health()).failure is None
    backend.down = UpstreamUnavailable()
    assert (await asked.health()).failure is None
    await asyncio.sleep(0.06)
    assert (await asked.health()).failure == "upstream_unavailable"


async def test_one_who_asks_goes_away() -> None:
    backend = ScriptedBackend()
    asked = Probe(backend.ping, TaskSet())
    impatient = asyncio.get_running_loop().create_task(asked.health())
    await asyncio.sleep(0)
    patient = asyncio.get_running_loop().create_task(asked.health())
    impatient.cancel()
    assert (await patient).failure is None
    assert backend.pings == 1
