"""What an operator and the machinery around a process ask: alive, ready, figures."""

import asyncio
from typing import Final, Literal

import msgspec
from aiohttp import web

from gateway import keys
from gateway.accounts.errors import TooManyAttempts
from gateway.handlers.json_answers import json_answer
from gateway.letta.probe import Health, Probe
from gateway.metrics import CONTENT_TYPE, Metrics

PATIENCE: Final = 2.0
"""Seconds that figures wait for dependencies: a scraper gives up after ten, and then has no figures at all."""


class Dependency(msgspec.Struct, omit_defaults=True):
    """How one dependency fares; latency is in milliseconds."""

    status: Literal["ok", "failed"]
    latency_ms: float
    code: str | None = None


class Readiness(msgspec.Struct, omit_defaults=True):
    """Whether requests make sense now; the dependencies are shown to the operator.

    ``note`` says who answers where the gateway runs a Letta of its own.
    """

    status: Literal["ready", "not_ready", "draining"]
    note: str | None = None
    dependencies: dict[str, Dependency] | None = None


async def health(request: web.Request) -> web.Response:
    """Answer that the process is alive, and nothing else."""
    _ = request
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Answer whether the gateway can serve: 200, or 503 while a dependency does not answer or the process is ending."""
    probes = request.app[keys.PROBES]
    if request[keys.NOTES].is_forwarded:  # it is another gateway that asks: whether Redis answers this one
        redis = await probes["redis"].health()
        return _readiness(Readiness("ready" if redis.failure is None else "not_ready"))
    if request.app[keys.DRAIN].draining:
        return _readiness(Readiness("draining"))  # whatever the others say, and without asking them
    found = await asyncio.gather(*(probe.health() for probe in probes.values()))
    is_ready = all(health.failure is None for health in found)
    details = None
    if await _may_see(request):
        details = {name: _dependency(health) for name, health in zip(probes, found, strict=True)}
    local = request.app[keys.LOCAL]
    return _readiness(
        Readiness("ready" if is_ready else "not_ready", local.note if local is not None else None, details)
    )


async def _may_see(request: web.Request) -> bool:
    try:
        return await request.app[keys.IS_OPERATOR](request)
    except TooManyAttempts:
        return False  # whether it is ready is said to everybody


async def metrics(request: web.Request) -> web.Response:
    """Answer all figures in Prometheus' text format."""
    figures = request.app[keys.METRICS]
    await asyncio.gather(*(_look(name, probe, figures) for name, probe in request.app[keys.PROBES].items()))
    return web.Response(body=figures.expose(), headers={"Content-Type": CONTENT_TYPE})


async def _look(name: str, probe: Probe, figures: Metrics) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            health = await probe.health()
    except TimeoutError:
        health = Health("not_answered", PATIENCE)
    figures.dependency_up.labels(name).set(health.failure is None)
    figures.dependency_seconds.labels(name).set(health.seconds)


def _readiness(readiness: Readiness) -> web.Response:
    status = 200 if readiness.status == "ready" else 503
    return json_answer(readiness, status=status)


def _dependency(health: Health) -> Dependency:
    return Dependency("ok" if health.failure is None else "failed", round(health.seconds * 1000, 1), health.failure)
