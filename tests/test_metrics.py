import importlib.metadata
import re

import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics as module
from gateway.errors import (
    ClientError,
    ConversationBusy,
    GatewayError,
    Overloaded,
    ResponseCancelled,
    StorageUnavailable,
    TurnFailed,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from gateway.metrics import CONTENT_TYPE, METHODS, Metrics

LABELS = {"route", "method", "status", "outcome", "kind", "code", "fault", "surface", "dependency"}
"""What a figure may be told apart by: values of closed sets, none that a client can choose."""


def instruments(metrics: Metrics) -> dict[str, Counter | Gauge | Histogram]:
    return {name: part for name, part in vars(metrics).items() if isinstance(part, Counter | Gauge | Histogram)}


def test_every_instrument_is_exposed_with_a_name_of_ours_and_a_help() -> None:
    metrics = Metrics()
    families = {family.name: family for family in text_string_to_metric_families(metrics.expose().decode())}
    described = [family for instrument in instruments(metrics).values() for family in instrument.describe()]
    assert {family.name for family in described} <= set(families)
    assert all(family.name.startswith("letta_gateway_") for family in described)
    assert all(family.documentation.endswith(".") for family in described)


def test_no_label_that_a_client_can_choose() -> None:
    assert {label for part in instruments(Metrics()).values() for label in part._labelnames} == LABELS


def test_figures_are_shown() -> None:
    metrics = Metrics()
    metrics.requests.labels("/v1/models", "GET", "200").inc()
    metrics.first_token.observe(0.3)
    metrics.open_streams.set(3)
    exposed = metrics.expose().decode()
    assert 'letta_gateway_requests_total{method="GET",route="/v1/models",status="200"} 1.0' in exposed
    assert 'letta_gateway_first_token_seconds_bucket{le="0.5"} 1.0' in exposed
    assert 'letta_gateway_first_token_seconds_bucket{le="0.25"} 0.0' in exposed
    assert "letta_gateway_open_streams 3.0" in exposed


def test_two_gateways_in_one_process_do_not_share_figures() -> None:
    one, two = Metrics(), Metrics()
    one.chunks.inc(5)
    assert "letta_gateway_chunks_total 5.0" in one.expose().decode()
    assert "letta_gateway_chunks_total 0.0" in two.expose().decode()


def test_buckets_rise() -> None:
    tables = [value for name, value in vars(module).items() if re.fullmatch(r"_[A-Z]+", name)]
    assert len(tables) == 3
    assert all(list(table) == sorted(set(table)) for table in tables)


def test_content_type_is_prometheus_text() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=")


def test_methods_are_a_closed_set() -> None:
    assert {"GET", "POST"} < METHODS
    assert len(METHODS) < 10


# What alerts count ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (UpstreamUnavailable(), "letta"),
        (TurnFailed(), "letta"),
        (StorageUnavailable(), "gateway"),
        (Overloaded(), "gateway"),
        (ConversationBusy(), None),
        (UpstreamRateLimited(), None),
        (ResponseCancelled(), None),
        (ClientError(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, GatewayError) else str(value),
)
def test_failures_are_told_from_refusals_and_by_fault(error: GatewayError, fault: str | None) -> None:
    metrics = Metrics()
    metrics.count_error(error, "/v1/models")
    counted = {name: 1.0 if name == fault else 0.0 for name in ("gateway", "letta")}
    assert {
        name: metrics._registry.get_sample_value("letta_gateway_failures_total", {"fault": name}) for name in counted
    } == counted


@pytest.mark.parametrize(
    "series",
    [
        'letta_gateway_errors_total{code="conversation_busy"}',
        'letta_gateway_errors_total{code="invalid_credentials"}',
        'letta_gateway_failures_total{fault="letta"}',
        'letta_gateway_rate_limited_total{surface="platform"}',
        'letta_gateway_turns_total{outcome="failed"}',
        "letta_gateway_storage_failures_total",
    ],
)
def test_what_is_counted_by_alerts_begins_with_nought(series: str) -> None:
    assert f"\n{series} 0.0\n" in Metrics().expose().decode()


def test_process_and_version_are_shown() -> None:
    families = {family.name: family for family in text_string_to_metric_families(Metrics().expose().decode())}
    assert families["process_open_fds"].samples[0].value > 2
    assert families["process_resident_memory_bytes"].samples[0].value > 1_000_000
    assert families["process_max_fds"].samples[0].value >= families["process_open_fds"].samples[0].value
    assert len(families["python_gc_collections"].samples) == 3
    (build,) = families["letta_gateway_build_info"].samples
    assert build.labels == {"version": importlib.metadata.version("letta-gateway")}


def test_totals_are_of_clients_and_levels_of_now() -> None:
    metrics = Metrics()
    metrics.requests.labels("/ui/api/chat", "POST", "200").inc(10)
    for route in (
        "/v1/models",
        "/api/v1/chat/message",
        "/ui/api/overview",
        "/health",
        "/metrics",
        "/api/v1/admin/users",
    ):
        metrics.requests.labels(route, "GET", "200").inc()
        metrics.requests.labels(route, "GET", "404").inc()
        metrics.count_error(ConversationBusy(), route)
    metrics.count_error(ConversationBusy(), "/ui/api/chat")
    metrics.tokens.labels("prompt").inc(5)
    metrics.tokens.labels("completion").inc(7)
    metrics.chunks.inc(3)
    totals = metrics.totals()
    assert (totals.requests, totals.errors, totals.chunks) == (14, 3, 3)
    assert (totals.prompt_tokens, totals.completion_tokens) == (5, 7)
    metrics.open_streams.inc(2)
    metrics.held_turns.set_function(lambda: 9)
    levels = metrics.levels()
    assert (levels.open_streams, levels.held_turns, levels.open_turns) == (2, 9, 0)
