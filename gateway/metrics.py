"""Every figure the gateway reports, as one table of instruments.

No label has a value that a client can choose: routes are the router's own patterns, methods and codes come from closed
sets, models and users are no labels at all. What alerts count is there from the start: of a series that begins with its
first event, that event is not seen.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from gateway.errors import BackendError, GatewayError, ResponseCancelled

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
OUTCOMES: Final = ("complete", "failed", "client_disconnected")
SURFACES: Final = ("openai", "platform")
_ALERTED_CODES: Final = ("conversation_busy", "overloaded", "invalid_credentials", "too_many_attempts")
"""What alerts count."""
_NOT_CLIENTS: Final = ("/ui", "/health", "/ready", "/metrics", "/api/v1/admin")
_SERVER_FAULT: Final = 500
_TTFT: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_DURATION: Final = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
_LAG: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted since the start; what operators and their machinery look at is no request."""

    requests: float
    errors: float
    chunks: float
    prompt_tokens: float
    completion_tokens: float


class Levels(msgspec.Struct, frozen=True, kw_only=True):
    """What is under way now."""

    open_streams: float
    open_turns: float
    held_turns: float
    waiting_turns: float
    most_turns: float


class Metrics:
    """The instruments of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "letta_gateway_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self.duration = Histogram(
            "letta_gateway_request_seconds",
            "Time to the end of the answer.",
            ("route",),
            buckets=_DURATION,
            registry=registry,
        )
        self.in_flight = Gauge("letta_gateway_requests_in_flight", "Requests under way.", registry=registry)
        self.open_streams = Gauge("letta_gateway_open_streams", "Answers being streamed.", registry=registry)
        self.turns = Gauge("letta_gateway_open_turns", "Turns that Letta works on.", registry=registry)
        self.held_turns = Gauge(
            "letta_gateway_held_turns", "Turns that wait, are open, or being settled.", registry=registry
        )
        self.most_turns = Gauge("letta_gateway_most_turns", "Turns that can be held at once.", registry=registry)
        self.turn_ends = Counter("letta_gateway_turns", "Turns by how they ended.", ("outcome",), registry=registry)
        self.waiting = Gauge("letta_gateway_waiting_turns", "Turns that wait for the one before.", registry=registry)
        self.first_token = Histogram(
            "letta_gateway_first_token_seconds", "Time to the first token.", buckets=_TTFT, registry=registry
        )
        self.chunks = Counter("letta_gateway_chunks", "Chunks streamed to clients.", registry=registry)
        self.tokens = Counter("letta_gateway_tokens", "Tokens that Letta reported.", ("kind",), registry=registry)
        self.errors = Counter("letta_gateway_errors", "Errors answered, by code.", ("code",), registry=registry)
        self.failures = Counter(
            "letta_gateway_failures",
            "Answers that failed, with a 5xx or in-band, by whose fault.",
            ("fault",),
            registry=registry,
        )
        self.rate_limited = Counter(
            "letta_gateway_rate_limited", "Requests over the rate limit, by API.", ("surface",), registry=registry
        )
        self.rate_limit_fallbacks = Counter(
            "letta_gateway_rate_limit_fallbacks",
            "Requests held to a share of the limit, and logins counted here alone, without Redis.",
            registry=registry,
        )
        self.forwarded = Counter(
            "letta_gateway_forwarded_requests",
            "Requests handed on to the gateway that has the turn.",
            registry=registry,
        )
        self.upstream_errors = Counter(
            "letta_gateway_upstream_errors", "Failures of Letta or the way to it.", ("code",), registry=registry
        )
        self.upstream_retries = Counter(
            "letta_gateway_upstream_retries", "Connections to Letta tried again.", registry=registry
        )
        self.breaker_open = Gauge(
            "letta_gateway_breaker_open", "1 while requests to Letta are refused at once.", registry=registry
        )
        self.skipped_frames = Counter(
            "letta_gateway_skipped_frames", "Frames of kinds that are not known.", registry=registry
        )
        self.embedded_restarts = Counter(
            "letta_gateway_embedded_restarts", "Deaths of the local Letta.", registry=registry
        )
        self.rejected_heads = Counter(
            "letta_gateway_rejected_heads", "Requests that were not HTTP, or no whole one in time.", registry=registry
        )
        self.loop_lag = Histogram(
            "letta_gateway_event_loop_lag_seconds", "How late timers fire.", buckets=_LAG, registry=registry
        )
        self.draining = Gauge("letta_gateway_draining", "1 while the gateway is being stopped.", registry=registry)
        self.dependency_up = Gauge(
            "letta_gateway_dependency_up", "1 for a dependency that answers.", ("dependency",), registry=registry
        )
        self.dependency_seconds = Gauge(
            "letta_gateway_dependency_seconds", "How long it took to answer.", ("dependency",), registry=registry
        )
        self.storage_failures = Counter(
            "letta_gateway_storage_failures", "Transactions that the database did not take.", registry=registry
        )
        self.unsettled_turns = Gauge(
            "letta_gateway_unsettled_turns", "Turns that are over, and not settled in the ledger.", registry=registry
        )
        self.ledger_lag = Gauge(
            "letta_gateway_ledger_lag_seconds", "How long the oldest of these has waited.", registry=registry
        )
        self.build = Info("letta_gateway_build", "Which gateway this is.", registry=registry)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._errors_of_clients = 0
        self._begin()

    def _begin(self) -> None:
        self.build.info({"version": gateway_version()})
        for counter, values in (
            (self.turn_ends, OUTCOMES),
            (self.tokens, ("prompt", "completion")),
            (self.errors, _ALERTED_CODES),
            (self.failures, ("gateway", "letta")),
            (self.rate_limited, SURFACES),
        ):
            for value in values:
                counter.labels(value)

    def count_error(self, error: GatewayError, route: str | None = None) -> str:
        """Count an error that was told, as a status of a route or in-band, which clients alone are; return its code."""
        code = error.code or error.type
        is_backend = isinstance(error, BackendError)
        self.errors.labels(code).inc()
        self._errors_of_clients += route is None or _is_for_a_client(route)
        if is_backend:
            self.upstream_errors.labels(code).inc()
        if error.status >= _SERVER_FAULT and not isinstance(error, ResponseCancelled):
            self.failures.labels("letta" if is_backend else "gateway").inc()
        return code

    def totals(self) -> Totals:
        """Return what was counted, summed up."""
        return Totals(
            requests=_sum(self.requests, lambda labels: _is_for_a_client(labels["route"])),
            errors=self._errors_of_clients,
            chunks=_sum(self.chunks),
            prompt_tokens=_sum(self.tokens, lambda labels: labels["kind"] == "prompt"),
            completion_tokens=_sum(self.tokens, lambda labels: labels["kind"] == "completion"),
        )

    def levels(self) -> Levels:
        """Return what is under way."""
        return Levels(
            open_streams=_sum(self.open_streams),
            open_turns=_sum(self.turns),
            held_turns=_sum(self.held_turns),
            waiting_turns=_sum(self.waiting),
            most_turns=_sum(self.most_turns),
        )

    def expose(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)


def _is_for_a_client(route: str) -> bool:
    return route == "/ui/api/chat" or not route.startswith(_NOT_CLIENTS)


def _sum(instrument: Counter | Gauge, counts: Callable[[dict[str, str]], bool] = lambda _: True) -> float:
    """Return the sum over the labels that count; ``_created`` is a time, and no part of it."""
    return sum(
        sample.value
        for family in instrument.collect()
        for sample in family.samples
        if not sample.name.endswith("_created") and counts(sample.labels)
    )


@cache
def gateway_version() -> str:
    """Return which gateway this is."""
    return version("letta-gateway")
