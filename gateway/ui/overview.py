"""``/ui/api/overview``: what goes on in this gateway now, and went wrong lately."""

import asyncio
import time
from typing import Final, Literal

import msgspec
from aiohttp import web

from gateway import keys
from gateway.conversations.turns import OpenTurn
from gateway.handlers.json_answers import json_answer
from gateway.letta.probe import Health, Probe
from gateway.metrics import Levels, Totals, gateway_version
from gateway.ui.recent_errors import RecentError
from gateway.ui.traffic import Interval

PATIENCE: Final = 2.0
"""Seconds that a dependency has to answer: the page asks again soon."""
MOST_TURNS: Final = 100
"""Open turns that are listed, the oldest ones."""


class DependencyAnswer(msgspec.Struct, frozen=True):
    """How one dependency fares; latency is in milliseconds."""

    name: str
    status: Literal["ok", "failed"]
    latency_ms: float
    code: str | None


class OverviewAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What this gateway does; others that share its database have figures of their own.

    ``turns`` are at most ``MOST_TURNS``, ``note`` says who answers where the gateway runs a Letta of its own.
    """

    version: str
    now: float
    draining: bool
    note: str | None
    levels: Levels
    totals: Totals
    traffic: tuple[Interval, ...]
    turns: tuple[OpenTurn, ...]
    errors: tuple[RecentError, ...]
    dependencies: tuple[DependencyAnswer, ...]


async def overview(request: web.Request) -> web.Response:
    """Answer all of it at once: the page asks every few seconds."""
    app = request.app
    probes, metrics, local = app[keys.PROBES], app[keys.METRICS], app[keys.LOCAL]
    found = await asyncio.gather(*(_look(probe) for probe in probes.values()))
    return json_answer(
        OverviewAnswer(
            version=gateway_version(),
            now=time.time(),
            draining=app[keys.DRAIN].draining,
            note=None if local is None else local.note,
            levels=metrics.levels(),
            totals=metrics.totals(),
            traffic=app[keys.TRAFFIC].intervals(),
            turns=tuple(app[keys.TURNS].open[:MOST_TURNS]),
            errors=app[keys.RECENT_ERRORS].newest(),
            dependencies=tuple(_dependency(name, health) for name, health in zip(probes, found, strict=True)),
        )
    )


async def _look(probe: Probe) -> Health:
    try:
        async with asyncio.timeout(PATIENCE):
            return await probe.health()
    except TimeoutError:
        return Health("not_answered", PATIENCE)


def _dependency(name: str, health: Health) -> DependencyAnswer:
    status: Literal["ok", "failed"] = "ok" if health.failure is None else "failed"
    return DependencyAnswer(name, status, round(health.seconds * 1000, 1), health.failure)
