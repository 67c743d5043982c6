"""What an operator and the machinery around a process ask: alive, ready, figures."""

from typing import Final, Literal

import msgspec
from aiohttp import web

from gateway import keys
from gateway.letta.probe import Health
from gateway.metrics import CONTENT_TYPE

_encode: Final = msgspec.json.Encoder().encode


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
    """Answer whether the gateway can serve: 200, or 503 while Letta does not answer or the process is going away."""
    if request.app[keys.DRAIN].draining:
        return _readiness(Readiness("draining"))  # whatever Letta says, and without asking it
    letta = await request.app[keys.PROBE].health()
    details = {"letta": _dependency(letta)} if request.app[keys.IS_OPERATOR](request) else None
    local = request.app[keys.LOCAL]
    note = local.note if local is not None else None
    return _readiness(Readiness("ready" if letta.failure is None else "not_ready", note, details))


async def metrics(request: web.Request) -> web.Response:
    """Answer all figures in Prometheus' text format."""
    return web.Response(body=request.app[keys.METRICS].expose(), headers={"Content-Type": CONTENT_TYPE})


def _readiness(readiness: Readiness) -> web.Response:
    status = 200 if readiness.status == "ready" else 503
    return web.Response(body=_encode(readiness), status=status, content_type="application/json")


def _dependency(health: Health) -> Dependency:
    return Dependency("ok" if health.failure is None else "failed", round(health.seconds * 1000, 1), health.failure)
