"""The four measurements: each drives one target once and gives one sample. Who alternates them is `__main__.py`."""

import asyncio
import itertools
import math
import random
import time
from typing import NamedTuple

from tests.bench.driver import Tally, ask_in_a_loop, open_streams
from tests.bench.plan import Plan
from tests.bench.processes import Child
from tests.bench.samples import FirstTokenSample, HeldSample, RequestSample, StreamingSample, quantiles
from tests.bench.targets import Asking, Target

_PROBE_AGENTS = 64
_PATIENCE = 15.0
_serial = itertools.count()


class Meter(NamedTuple):
    """What the clocks and counters show at one moment."""

    at: float
    target: float
    upstream: float
    driver: float
    deltas: int
    reads: int


async def streaming(target: Target, upstream: Child, plan: Plan, streams: int, rate: float) -> StreamingSample:
    """Let streams run at a steady beat, and count what a delta costs."""
    tally = Tally()
    await _open_crowd(target, tally, streams, rate, plan)
    await asyncio.sleep(plan.settle)
    tally.latencies.clear()
    before = _meter(target, upstream, tally)
    await asyncio.sleep(plan.window)
    after = _meter(target, upstream, tally)
    latency = quantiles(tally.latencies)
    await tally.all_gone(_PATIENCE + plan.ramp)
    events = after.deltas - before.deltas
    each = 1e6 / max(events, 1)
    return StreamingSample(
        target=target.name,
        streams=streams,
        rate=rate,
        events=events,
        cpu_us=(after.target - before.target) * each,
        upstream_cpu_us=(after.upstream - before.upstream) * each,
        driver_cpu_us=(after.driver - before.driver) * each,
        events_per_read=events / max(after.reads - before.reads, 1),
        kept_up=events / (streams * rate * (after.at - before.at)),
        latency=latency,
        errors=tally.errors,
    )


async def first_token(target: Target, streams: int, rate: float, plan: Plan) -> FirstTokenSample:
    """Send new streams, at random moments, into a crowd of live ones, and date their first delta."""
    crowd, probes = Tally(), Tally()
    await _open_crowd(target, crowd, streams, rate, plan)
    await asyncio.sleep(plan.settle)
    count = int(plan.window * plan.probe_rate)
    words = [_words(3, 0.02, delay=0) for _ in range(count)]
    askings = [Asking(streams + number % _PROBE_AGENTS, text) for number, text in enumerate(words)]
    dice = random.Random(streams)
    await open_streams(
        target.port,
        probes,
        [target.request(asking) for asking in askings],
        3,
        lambda: dice.expovariate(plan.probe_rate),
    )
    await probes.all_gone(_PATIENCE)
    await crowd.all_gone(_PATIENCE)
    return FirstTokenSample(
        target=target.name,
        streams=streams,
        rate=rate,
        probes=len(probes.first_tokens),
        first_token=quantiles(probes.first_tokens),
        errors=crowd.errors + probes.errors,
    )


async def held(target: Target, streams: int, plan: Plan) -> HeldSample:
    """Hold many slow streams, one delta a second each, and weigh them."""
    tally = Tally()
    process = target.process
    base = process.rss()
    await _open_crowd(target, tally, streams, 1.0, plan, ramp=plan.held_ramp, lasting=plan.hold)
    await asyncio.sleep(plan.settle)
    tally.latencies.clear()
    at, cpu = time.monotonic(), process.cpu_seconds()
    await asyncio.sleep(max(plan.hold - plan.settle - plan.tail, 0.5))
    share = (process.cpu_seconds() - cpu) / (time.monotonic() - at)
    rss, latency = process.rss(), quantiles(tally.latencies)
    if len(tally.live) < streams:
        tally.errors.append(f"only {len(tally.live)} of {streams} streams were live")
    await tally.all_gone(_PATIENCE + plan.held_ramp)  # the last stream begins that much later
    return HeldSample(
        target=target.name,
        streams=streams,
        base_rss=base,
        held_rss=rss,
        peak_rss=process.peak_rss(),
        cpu_share=share,
        latency=latency,
        errors=tally.errors,
    )


async def requests(target: Target, workers: int, plan: Plan) -> RequestSample:
    """Ask for whole answers, each worker as fast as it gets them."""
    askings = [Asking(number, _words(3, 0), stream=False) for number in range(workers)]
    latencies, seconds, errors = await ask_in_a_loop(
        target.port, [target.request(asking) for asking in askings], 3, plan.request_seconds
    )
    return RequestSample(
        target=target.name,
        workers=workers,
        per_second=len(latencies) / seconds,
        latency=quantiles(latencies),
        errors=sorted(set(errors)),
    )


async def warm_up(target: Target, agents: int) -> list[str]:
    """Let a target load what it loads late, so that no window sees it; give what went wrong."""
    tally = Tally()
    askings = [Asking(number, _words(5, 0.01)) for number in range(min(agents, 20))]
    await open_streams(target.port, tally, [target.request(asking) for asking in askings], 5, lambda: 0.005)
    await tally.all_gone(60)
    whole = [target.request(Asking(number, _words(3, 0), stream=False)) for number in range(min(agents, 64))]
    _, _, errors = await ask_in_a_loop(target.port, whole, 3, 0.5)
    return tally.errors + errors


def agents_needed(plan: Plan) -> int:
    """Count the agents for the largest crowd and its probes: a turn on an agent's own thread runs alone."""
    return max(plan.streams, plan.workers, *(count + _PROBE_AGENTS for count, _ in plan.crowds))


async def _open_crowd(
    target: Target,
    tally: Tally,
    streams: int,
    rate: float,
    plan: Plan,
    *,
    ramp: float | None = None,
    lasting: float | None = None,
) -> None:
    ramp = plan.ramp if ramp is None else ramp
    lasting = plan.settle + plan.window + plan.tail if lasting is None else lasting
    events = math.ceil((ramp + lasting) * rate)
    requests = [target.request(Asking(number, _words(events, 1 / rate))) for number in range(streams)]
    await open_streams(target.port, tally, requests, events, lambda: ramp / streams, audit=rate > 1)


def _words(events: int, interval: float, *, delay: float | None = None) -> str:
    """Write what the fake upstream reads; the serial number makes every message its own."""
    text = f"message {next(_serial)}: events={events} interval={interval:.6f}"
    return text if delay is None else f"{text} delay={delay:.6f}"


def _meter(target: Target, upstream: Child, tally: Tally) -> Meter:
    return Meter(
        at=time.monotonic(),
        target=target.process.cpu_seconds(),
        upstream=upstream.cpu_seconds(),
        driver=time.process_time(),
        deltas=tally.deltas,
        reads=tally.reads,
    )
