"""Turns findings into the tables of the README: what was promised, what was measured, and how the peers do."""

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

from tests.bench.plan import Plan
from tests.bench.samples import Findings, FirstTokenSample, Quantiles, RequestSample, StreamingSample, median

_MIB = 1 << 20
_S = TypeVar("_S")


class Load(NamedTuple):
    """How many streams, and how many deltas a second on each."""

    streams: int
    rate: float

    def __str__(self) -> str:
        return f"{self.streams} x {self.rate:g}/s"


class Row(NamedTuple):
    """One promise: what it is, what was measured, and whether that keeps it (None: nothing was promised)."""

    figure: str
    target: str
    measured: str
    kept: bool | None

    def markdown(self) -> str:
        """Write the row as a line of a table."""
        return f"| {self.figure} | {self.target} | {self.measured} | {_PASS[self.kept]} |"


_PASS = {True: "yes", False: "**no**", None: "-"}


def hardware() -> str:
    """Name what the figures were taken on."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop"))
    python = platform.python_version()
    model = cpus[0].partition(":")[2].strip() if cpus else platform.machine()
    return f"{len(cpus)} cores {model}, Linux {platform.release()}, Python {python}, {libraries}"


def markdown(findings: Findings, plan: Plan) -> str:
    """Write the whole report."""
    how = (
        f"Measured on {findings.hardware}; upstream, driver and target share these cores, nothing is pinned. "
        f"Repeats: {plan.repeats}, targets alternating; medians, and medians of the ratios and differences within "
        "each repeat. What is added is a quantile of the target less the median of the direct way in the same repeat."
    )
    lines = [
        how,
        "",
        "| figure | target | measured | kept |",
        "| --- | --- | --- | --- |",
        *(row.markdown() for row in promises(findings)),
        "",
        *_side_by_side(findings),
        "",
        *(f"- {note}" for note in [*findings.notes, *_driver_notes(findings)]),
        *(f"- NOT MEASURED {reason}" for reason in findings.unmeasured),
        *(f"- ERROR {error}" for error in findings.errors()),
    ]
    return "\n".join(lines)


def promises(findings: Findings) -> Iterator[Row]:
    """Hold every budget of the design against what the gateway did."""
    yield from _streaming_rows(findings)
    for crowd in sorted({(sample.streams, sample.rate) for sample in _of(findings.first_token, "gateway")}):
        yield _first_token_row(findings, *crowd)
    yield from _held_rows(findings)
    yield from _request_rows(findings)
    yield from _start_rows(findings)


def _streaming_rows(findings: Findings) -> Iterator[Row]:
    loads = _loads(findings, "gateway")
    if not loads:
        return
    load = loads[0]
    ours = _streams_of(findings, "gateway", load)
    for peer, limit, label in (("pass-through", 1.15, "CPU per event"), ("nginx", 2.0, "the same, further goal")):
        theirs = _streams_of(findings, peer, load)
        if theirs:
            ratio = _cpu_ratio(ours, theirs)
            costs = f"{_cpu(ours):.1f} against {_cpu(theirs):.1f} microseconds"
            yield Row(f"{label}, {load}", f"<= {limit:g} x {peer}", f"{ratio:.2f} x ({costs})", ratio <= limit)
    added = _added(ours, _streams_of(findings, "direct", load), lambda sample: sample.latency)
    yield Row(f"added latency per event, {load}", "-", _pair(added), None)


def _first_token_row(findings: Findings, streams: int, rate: float) -> Row:
    added = _added_first_token(findings, "gateway", streams)
    name = f"added time to first token, among {streams} streams x {rate:g}/s"
    return Row(name, "<= 3 / 15 ms p50 / p99", _pair(added), added.p50 <= 3 and added.p99 <= 15)


def _held_rows(findings: Findings) -> Iterator[Row]:
    for ours in _of(findings.held, "gateway"):
        faults = len(ours.errors)
        share = f"{ours.cpu_share:.0%} of a core, p99 {ours.latency.p99:.1f} ms from upstream to client"
        yield Row(f"{ours.streams} streams held at 1 event/s", "0 errors", f"{faults} errors, {share}", not faults)
        each = (ours.held_rss - ours.base_rss) / ours.streams / 1024
        peak = f"{ours.peak_rss / _MIB:.0f} MiB peak in all"
        yield Row("RSS per held stream", "<= 64 KiB", f"{each:.1f} KiB ({peak})", each <= 64)


def _request_rows(findings: Findings) -> Iterator[Row]:
    for workers in sorted({sample.workers for sample in _of(findings.requests, "gateway")}):
        ours = _requests_of(findings, "gateway", workers)
        if workers > 1:
            rate = median(sample.per_second for sample in ours)
            yield Row(f"non-streaming requests, c={workers}", ">= 800/s", f"{rate:.0f}/s", rate >= 800)
            continue
        added = _added(ours, _requests_of(findings, "direct", 1), lambda sample: sample.latency)
        yield Row("added latency, non-streaming, c=1", "<= 1 / 3 ms", _pair(added), added.p50 <= 1 and added.p99 <= 3)


def _start_rows(findings: Findings) -> Iterator[Row]:
    starts = _of(findings.starts, "gateway")
    if starts:
        rss = median(sample.rss for sample in starts) / _MIB
        ready = median(sample.seconds_to_ready for sample in starts)
        yield Row("base RSS", "<= 120 MiB", f"{rss:.0f} MiB", rss <= 120)
        yield Row("start to ready", "< 2 s", f"{ready:.2f} s", ready < 2)


def _side_by_side(findings: Findings) -> Iterator[str]:
    names = dict.fromkeys(["direct", *(sample.target for sample in [*findings.starts, *findings.samples()])])
    loads = sorted({load for name in names for load in _loads(findings, name)}, reverse=True)
    crowds = sorted({sample.streams for sample in findings.first_token})
    columns: dict[str, Callable[[Findings, str], str]] = {
        **{f"CPU per event, {load}": partial(_cpu_cell, load) for load in loads},
        **{f"added latency, {load}": partial(_latency_cell, load) for load in loads},
        **{f"added first token among {streams}": partial(_first_token_cell, streams) for streams in crowds},
        "KiB per held stream": _held_cell,
        "requests/s": _rate_cell,
        "added latency at c=1": _request_cell,
        "base RSS": _rss_cell,
        "ready": _ready_cell,
    }
    yield "| side by side (p50 / p99) | " + " | ".join(columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for name in names:
        yield f"| {name} | " + " | ".join(cell(findings, name) for cell in columns.values()) + " |"


def _cpu_cell(load: Load, findings: Findings, name: str) -> str:
    ours, base = _streams_of(findings, name, load), _streams_of(findings, "pass-through", load)
    if not ours or name == "direct":
        return "-"
    return f"{_cpu(ours):.1f} us" + (f" = {_cpu_ratio(ours, base):.2f} x" if base else "")


def _latency_cell(load: Load, findings: Findings, name: str) -> str:
    ours, direct = _streams_of(findings, name, load), _streams_of(findings, "direct", load)
    return _cell(name, ours, direct, lambda sample: sample.latency)


def _first_token_cell(streams: int, findings: Findings, name: str) -> str:
    ours, direct = _first_tokens_of(findings, name, streams), _first_tokens_of(findings, "direct", streams)
    return _cell(name, ours, direct, lambda sample: sample.first_token)


def _held_cell(findings: Findings, name: str) -> str:
    found = _of(findings.held, name)
    return f"{(found[0].held_rss - found[0].base_rss) / found[0].streams / 1024:.1f}" if found else "-"


def _rate_cell(findings: Findings, name: str) -> str:
    found = [sample for sample in _of(findings.requests, name) if sample.workers > 1]
    return f"{median(sample.per_second for sample in found):.0f}" if found else "-"


def _request_cell(findings: Findings, name: str) -> str:
    ours = _requests_of(findings, name, 1)
    return _cell(name, ours, _requests_of(findings, "direct", 1), lambda sample: sample.latency)


def _rss_cell(findings: Findings, name: str) -> str:
    found = _of(findings.starts, name)
    return f"{median(sample.rss for sample in found) / _MIB:.0f} MiB" if found else "-"


def _ready_cell(findings: Findings, name: str) -> str:
    found = _of(findings.starts, name)
    return f"{median(sample.seconds_to_ready for sample in found):.2f} s" if found else "-"


def _driver_notes(findings: Findings) -> Iterator[str]:
    for load in sorted({load for sample in findings.streaming for load in _loads(findings, sample.target)})[-1:]:
        samples = [sample for sample in findings.streaming if _load(sample) == load]
        driver = median(sample.driver_cpu_us for sample in samples)
        upstream = median(sample.upstream_cpu_us for sample in samples)
        yield f"At {load} the driver costs {driver:.1f} and the fake upstream {upstream:.1f} microseconds per event."
    for sample in findings.streaming:
        if sample.kept_up < 0.97 or sample.events_per_read > 1.1:
            bunched = f"{sample.events_per_read:.2f} events per read"
            yield f"{sample.target} kept {sample.kept_up:.0%} of the pace, {bunched}: its figure is flattered."


def _cell(name: str, ours: Sequence[_S], direct: Sequence[_S], read: Callable[[_S], Quantiles]) -> str:
    if not ours:
        return "-"
    if name == "direct":
        return f"({median(read(one).p50 for one in ours):.2f} / {median(read(one).p99 for one in ours):.2f} ms)"
    return _pair(_added(ours, direct, read))


def _added(ours: Sequence[_S], direct: Sequence[_S], read: Callable[[_S], Quantiles]) -> Quantiles:
    """Take the direct median from both quantiles: a bad moment of the machine counts against the target, not for it."""
    return Quantiles(
        _paired(ours, direct, lambda mine, other: read(mine).p50 - read(other).p50),
        _paired(ours, direct, lambda mine, other: read(mine).p99 - read(other).p50),
    )


def _added_first_token(findings: Findings, name: str, streams: int) -> Quantiles:
    ours = _first_tokens_of(findings, name, streams)
    return _added(ours, _first_tokens_of(findings, "direct", streams), lambda sample: sample.first_token)


def _paired(ours: Sequence[_S], theirs: Sequence[_S], compare: Callable[[_S, _S], float]) -> float:
    """Compare each repeat with the neighbour it alternated with, and take the median."""
    return median(compare(mine, other) for mine, other in zip(ours, theirs, strict=False))


def _cpu_ratio(ours: Sequence[StreamingSample], theirs: Sequence[StreamingSample]) -> float:
    return _paired(ours, theirs, lambda mine, other: mine.cpu_us / other.cpu_us)


def _cpu(samples: Sequence[StreamingSample]) -> float:
    return median(sample.cpu_us for sample in samples)


def _pair(value: Quantiles) -> str:
    return f"{value.p50:.2f} / {value.p99:.2f} ms"


def _load(sample: StreamingSample) -> Load:
    return Load(sample.streams, sample.rate)


def _loads(findings: Findings, name: str) -> list[Load]:
    """Give the loads that a target has carried, the heaviest first."""
    return sorted({_load(sample) for sample in _of(findings.streaming, name)}, reverse=True)


def _streams_of(findings: Findings, name: str, load: Load) -> list[StreamingSample]:
    return [sample for sample in _of(findings.streaming, name) if _load(sample) == load]


def _first_tokens_of(findings: Findings, name: str, streams: int) -> list[FirstTokenSample]:
    return [sample for sample in _of(findings.first_token, name) if sample.streams == streams]


def _requests_of(findings: Findings, name: str, workers: int) -> list[RequestSample]:
    return [sample for sample in _of(findings.requests, name) if sample.workers == workers]


def _of(samples: Sequence[_S], name: str) -> list[_S]:
    return [sample for sample in samples if getattr(sample, "target", None) == name]
