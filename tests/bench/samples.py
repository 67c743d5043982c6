"""The figures that the measurements leave, one frozen row per target and repeat, and the arithmetic over them."""

import statistics
from collections.abc import Iterable, Sequence

from msgspec import Struct


class Quantiles(Struct, frozen=True):
    """Where a distribution of seconds lies, in milliseconds."""

    p50: float
    p99: float


class StreamingSample(Struct, frozen=True):
    """One steady window of many streams."""

    target: str
    streams: int
    rate: float
    events: int
    cpu_us: float
    """CPU of the target per delta it delivered, in microseconds."""
    upstream_cpu_us: float
    driver_cpu_us: float
    events_per_read: float
    """More than one means that deltas bunch up, which flatters a target that cannot keep up."""
    kept_up: float
    """Deltas that came, over those that were due."""
    latency: Quantiles
    errors: list[str]


class FirstTokenSample(Struct, frozen=True):
    """New streams, dated while others run."""

    target: str
    streams: int
    rate: float
    probes: int
    first_token: Quantiles
    errors: list[str]


class HeldSample(Struct, frozen=True):
    """Many slow streams, held."""

    target: str
    streams: int
    base_rss: int
    held_rss: int
    peak_rss: int
    cpu_share: float
    """CPU seconds per second while nothing but the slow streams ran."""
    latency: Quantiles
    errors: list[str]


class RequestSample(Struct, frozen=True):
    """Closed loops of non-streaming requests."""

    target: str
    workers: int
    per_second: float
    latency: Quantiles
    errors: list[str]


class StartSample(Struct, frozen=True):
    """How long a fresh process took to answer its health check, and what it weighs once it is warm."""

    target: str
    seconds_to_ready: float
    rss: int


Sample = StreamingSample | FirstTokenSample | HeldSample | RequestSample


class Findings(Struct):
    """Everything that one run found."""

    hardware: str
    streaming: list[StreamingSample] = []
    first_token: list[FirstTokenSample] = []
    held: list[HeldSample] = []
    requests: list[RequestSample] = []
    starts: list[StartSample] = []
    notes: list[str] = []
    unmeasured: list[str] = []
    """Who did not come up, and why."""

    def samples(self) -> list[Sample]:
        """Give all samples that can carry errors."""
        return [*self.streaming, *self.first_token, *self.held, *self.requests]

    def errors(self) -> list[str]:
        """Give each kind of error once, with its target."""
        return sorted({f"{sample.target}: {error}" for sample in self.samples() for error in sample.errors})


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Sum a distribution up; no values give NaN, which no target passes."""
    if len(seconds) < 2:
        return Quantiles(float("nan"), float("nan"))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return Quantiles(cuts[49] * 1000, cuts[98] * 1000)


def median(values: Iterable[float]) -> float:
    """Give the median, or NaN of nothing."""
    found = list(values)
    return statistics.median(found) if found else float("nan")
