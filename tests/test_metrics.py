import re

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics as module
from gateway.metrics import CONTENT_TYPE, METHODS, Metrics

LABELS = {"route", "method", "status", "outcome", "kind", "code"}
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
