"""Prometheus as it is deployed: its rules hold, and a running gateway gives it everything that they ask for."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import pytest_asyncio

from gateway.settings import Settings
from tests.bench.processes import free_port
from tests.server.running import JSON, chat_body
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.services.people import OPERATOR_KEY, Person, ask, registered
from tests.services.prometheus import DEPLOYED, PROGRAMS, Prometheus, running_prometheus, selectors

_DASHBOARD: Final = DEPLOYED.parent / "grafana" / "dashboards" / "letta-gateway.json"
_RULES: Final = sorted((DEPLOYED / "rules").glob("*.yml"))
_CASES: Final = DEPLOYED / "tests" / "alerts.yml"
_AGENT: Final = "Milo"
_UNSET: Final = dict.fromkeys(
    (
        "OPENAI_API_KEY",
        "ANTHROPIC_API_KEY",
        "OPENROUTER_API_KEY",
        "OLLAMA_BASE_URL",
        "OLLAMA_HOST",
        "LMSTUDIO_BASE_URL",
    ),
    "",
)
"""Whoever runs the tests may have a provider; here the scripted model answers."""
_VARIABLES: Final = {"$job": "letta-gateway", "$instance": ".+", "$__rate_interval": "1m"}


class Watched(msgspec.Struct, frozen=True):
    """A gateway that has been used, the Prometheus that looks at it, and one of its users."""

    gateway: GatewayProcess
    prometheus: Prometheus
    person: Person


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Ask for these programs alone, not for all clients and services."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not absent, f"{absent} not set up: run `python -m tests.services.installs`"


def promtool(*arguments: str | Path) -> str:
    """Run it, and return what it says; it must succeed."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# The files -----------------------------------------------------------------------------------------------------------


def test_configuration_and_rules_are_right() -> None:
    said = promtool("check", "config", DEPLOYED / "prometheus.yml")
    assert f"{len(_RULES)} rule files found" in said
    assert len(_RULES) == 2
    promtool("check", "rules", "--lint-fatal", *_RULES)


def alternatives() -> list[str]:
    """Return the jobs that stand in comments behind the job that is used."""
    _, _, rest = (DEPLOYED / "prometheus.yml").read_text("utf-8").partition("# What may stand in place")
    blocks = re.findall(r"^#\n((?:# .+\n?)+)", rest, re.MULTILINE)
    return [re.sub(r"^# ", "", block, flags=re.MULTILINE) for block in blocks]


@pytest.mark.parametrize("number", range(3))
def test_alternative_jobs_in_comments_are_right(number: int, tmp_path: Path) -> None:
    shutil.copytree(DEPLOYED, tmp_path, dirs_exist_ok=True)
    blocks = alternatives()
    assert len(blocks) == 3
    key = tmp_path / "operator-key"
    key.write_text(OPERATOR_KEY)
    block = blocks[number].replace("/etc/prometheus/letta-gateway-operator-key", str(key))
    used, _, _ = (tmp_path / "prometheus.yml").read_text("utf-8").partition("  - job_name: letta-gateway")
    (tmp_path / "prometheus.yml").write_text(used + block)
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_alternative_by_the_operator_key_asks_each_gateway_itself() -> None:
    """A proxy would show one of them, and the one that is shipped shows /metrics to nobody outside."""
    (block,) = (block for block in alternatives() if "credentials_file" in block)
    assert "scheme" not in block
    assert set(re.findall(r':(\d+)"', block)) == {str(Settings().port)}


def alert_names() -> list[str]:
    return re.findall(r"- alert: (\w+)", (DEPLOYED / "rules" / "alerts.yml").read_text("utf-8"))


def test_alerts_fire_and_stay_silent_as_they_should() -> None:
    promtool("test", "rules", _CASES)


@pytest.mark.parametrize("alert", alert_names())
def test_alert_has_a_case_where_it_fires_and_one_where_it_does_not(alert: str) -> None:
    (section,) = re.findall(rf"^  # {alert}\b.*\n((?:(?!  # ).*\n)+)", _CASES.read_text("utf-8"), re.MULTILINE)
    cases = section.split("  - name: ")[1:]
    fires = [f'alertname="{alert}"' in case for case in cases]
    assert {True, False} == set(fires)


def test_case_that_expects_the_wrong_alert_fails(tmp_path: Path) -> None:
    """That is: the cases are looked at."""
    shutil.copytree(DEPLOYED, tmp_path, dirs_exist_ok=True)
    cases = tmp_path / "tests" / "alerts.yml"
    first, _, _ = cases.read_text("utf-8").partition("  # LettaGatewayAbsent")
    cases.write_text(first.replace("eval_time: 7m", "eval_time: 1m", 1))
    done = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "LettaGatewayDown" in done.stdout + done.stderr


# A gateway that is used ----------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    port = free_port()
    environment = {
        "LETTA_GATEWAY_METRICS_PORT": str(port),
        "LETTA_GATEWAY_OPERATOR_KEY": OPERATOR_KEY,
        "LETTA_GATEWAY_RATE_LIMIT": "60/minute",
    }
    async with (
        gateway_process(None, serves=False, env={**_UNSET, **environment}) as gateway,
        running_prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{port}") as prometheus,
    ):
        await serves(gateway)
        await prometheus.waits_for('up{job="letta-gateway"} == 1')
        await used(gateway)
        await prometheus.waits_for('letta_gateway_requests_total{route="other", status="404"}')
        yield Watched(gateway, prometheus, await used_again(gateway))


async def serves(gateway: GatewayProcess) -> None:
    """Wait for it and its local Letta, which take long on a busy machine."""
    for _ in range(5):
        with contextlib.suppress(TimeoutError):
            await gateway.serves()
            return
    await gateway.serves()


async def used(gateway: GatewayProcess) -> Person:
    """Let it do what it is for, and what it refuses."""
    for stream in (True, False, True):
        assert (await chat(gateway, "Hello there", stream=stream)) == 200
    assert await chat(gateway, "fail with 401") >= 500
    ann = await registered(gateway)
    assert (await ann.say("Hello there")).status == 200
    wrong = {"email": ann.email, "password": "not what it is"}
    assert (await ask(gateway, "POST", "/api/v1/auth/login", wrong)).status == 401
    assert (await ask(gateway, "GET", f"/nowhere/{ann.id}")).status == 404
    return ann


async def used_again(gateway: GatewayProcess) -> Person:
    """Do it once more, and too much: of a series that is new its first events are no rate."""
    person = await used(gateway)
    assert 429 in [(await gateway.ask("GET", "/v1/models")).status for _ in range(70)]
    return person


async def chat(gateway: GatewayProcess, text: str, *, stream: bool = False) -> int:
    body = chat_body(text, model=_AGENT, stream=stream)
    return (await gateway.ask("POST", "/v1/chat/completions", JSON, body)).status


def panels() -> list[tuple[str, str]]:
    """Return the expressions of the dashboard's panels, as Grafana sends them."""
    board: dict[str, Any] = json.loads(_DASHBOARD.read_text("utf-8"))
    return [
        (panel["title"], filled(target["expr"])) for panel in board["panels"] for target in panel.get("targets", [])
    ]


def filled(expression: str) -> str:
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


@pytest.mark.asyncio(loop_scope="module")
async def test_every_rule_is_evaluated_without_an_error(watched: Watched) -> None:
    async with asyncio.timeout(30):
        while "unknown" in {rule.health for rule in await watched.prometheus.rules()}:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    rules = await watched.prometheus.rules()
    assert {rule.name for rule in rules if rule.type == "alerting"} == set(alert_names())
    assert [(rule.name, rule.lastError) for rule in rules if rule.health != "ok"] == []


@pytest.mark.asyncio(loop_scope="module")
async def test_every_recording_rule_gives_data(watched: Watched) -> None:
    names = [rule.name for rule in await watched.prometheus.rules() if rule.type == "recording"]
    assert len(names) > 20
    for name in names:
        await watched.prometheus.waits_for(name)


@pytest.mark.asyncio(loop_scope="module")
async def test_every_panel_gives_data(watched: Watched) -> None:
    asked = panels()
    assert len(asked) > 40
    for title, expression in asked:
        assert await watched.prometheus.waits_for(expression), title


@pytest.mark.asyncio(loop_scope="module")
async def test_every_operand_of_every_alert_gives_data(watched: Watched) -> None:
    alerts = [rule for rule in await watched.prometheus.rules() if rule.type == "alerting"]
    assert alerts
    for alert in alerts:
        operands = list(selectors(alert.query))
        assert operands, alert.name
        for operand in operands:
            await watched.prometheus.waits_for(operand)


@pytest.mark.asyncio(loop_scope="module")
async def test_every_alert_tells_how_urgent_it_is_and_what_to_do(watched: Watched) -> None:
    for alert in await watched.prometheus.rules():
        if alert.type == "alerting":
            assert alert.labels["severity"] in {"page", "ticket"}, alert.name
            assert alert.annotations["summary"].endswith("."), alert.name
            assert len(alert.annotations["description"]) > 100, alert.name


@pytest.mark.asyncio(loop_scope="module")
async def test_choices_and_marks_of_the_dashboard_give_data(watched: Watched) -> None:
    board = json.loads(_DASHBOARD.read_text("utf-8"))
    queries = [one["definition"] for one in board["templating"]["list"] if one["type"] == "query"]
    for query in queries:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert found, query
        rows = await watched.prometheus.waits_for(filled(found[1]))
        assert all(found[2] in row["metric"] for row in rows)
    (mark,) = board["annotations"]["list"]
    assert await watched.prometheus.waits_for(filled(mark["expr"]).replace("> 0", ">= 0"))


@pytest.mark.asyncio(loop_scope="module")
async def test_figures_hold_what_was_done(watched: Watched) -> None:
    for series, least in (
        ('letta_gateway_turns_total{outcome="complete"}', 4),
        ('letta_gateway_turns_total{outcome="failed"}', 1),
        ('letta_gateway_failures_total{fault="letta"}', 1),
        ('letta_gateway_errors_total{code="invalid_credentials"}', 1),
        ('letta_gateway_rate_limited_total{surface="openai"}', 1),
        ('letta_gateway_requests_total{route="other", status="404"}', 1),
        ('letta_gateway_dependency_up{dependency="database"}', 1),
        ('letta_gateway_dependency_up{dependency="letta"}', 1),
        ("letta_gateway_first_token_seconds_count", 2),
        ("letta_gateway_event_loop_lag_seconds_count", 4),
    ):
        await watched.prometheus.waits_for(f"{series} >= {least}")


@pytest.mark.asyncio(loop_scope="module")
async def test_nothing_of_a_user_is_a_label(watched: Watched) -> None:
    series = json.dumps(await watched.prometheus.api("series", **{"match[]": '{job="letta-gateway"}'}))
    person = watched.person
    for secret in (person.id, person.email, person.token, OPERATOR_KEY, _AGENT, "nowhere"):
        assert secret not in series


@pytest.mark.asyncio(loop_scope="module")
async def test_gateway_that_is_gone_is_seen(watched: Watched) -> None:
    """The last one: it ends the gateway."""
    watched.gateway.process.kill()
    await watched.gateway.process.wait()
    await watched.prometheus.waits_for('up{job="letta-gateway"} == 0')
    await watched.prometheus.waits_for('ALERTS{alertname="LettaGatewayDown"}')
