"""The manifests of deploy/k8s, as kubectl renders them: against Kubernetes' own schemas, and against the gateway."""

import configparser
import functools
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from gateway.__main__ import main
from gateway.conversations.identity import CHAT_HEADERS
from gateway.metrics import Metrics
from gateway.server.routes import OPERATIONS, PAGE, ROUTES, Route
from gateway.settings import SettingError, Settings, load, table
from tests.live.postgres import Postgres
from tests.live.processes import free_port
from tests.server.subprocesses import gateway_process
from tests.server.wire import ask
from tests.services import installs
from tests.services.dockerfile import stages
from tests.services.network_policy import Peer, allows
from tests.shared_state.redis_process import RedisProcess
from tests.storage.databases import new_database, postgres

__all__ = ["postgres"]  # a fixture that is asked for by name

ROOT: Final = Path(__file__).parents[2]
K8S: Final = ROOT / "deploy" / "k8s"
MAX_CONNECTIONS: Final = 100
"""PostgreSQL's default."""
RESERVED: Final = 3
"""Of these, for superusers."""
OVERLAYS: Final = ("single", "scaled", "scaled-by-streams")
SCALED: Final = OVERLAYS[1:]
VERSIONS: Final = ("1.30", "1.37")
"""The first Kubernetes whose preStop can sleep, and a recent one."""
MARGIN: Final = 10
"""Seconds that the gateway may take beyond its grace: the last words to the clients, and the sockets' end."""
_CHECK: Final = Path(__file__).parent / "custom_resource.mjs"
_OF_PROMETHEUS: Final = {"ServiceMonitor", "PrometheusRule"}

Manifest = dict[str, Any]


@functools.cache
def rendered(folder: str) -> tuple[Manifest, ...]:
    """Return what kubectl makes of a kustomization, as the API server would get it."""
    kubectl = subprocess.run(["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, check=False)
    assert kubectl.returncode == 0, kubectl.stderr
    return tuple(read(kubectl.stdout))


def read(text: str, *versions: str) -> list[Manifest]:
    """Return YAML's documents; they are refused where they do not fit these versions of Kubernetes."""
    command: list[str | Path] = [installs.PYTHON, "-m", "tests.services.manifests", *versions]
    reading = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert reading.returncode == 0, reading.stderr
    return msgspec.json.decode(reading.stdout, type=list[Manifest])


def overlay(name: str) -> tuple[Manifest, ...]:
    return rendered(f"overlays/{name}")


def of_kind(name: str, kind: str) -> list[Manifest]:
    return [manifest for manifest in overlay(name) if manifest["kind"] == kind]


def one(name: str, kind: str) -> Manifest:
    (found,) = of_kind(name, kind)
    return found


def templates(name: str) -> list[Manifest]:
    """Return the pods of an overlay, those of the gateway first."""
    return [manifest["spec"]["template"] for kind in ("Deployment", "Job") for manifest in of_kind(name, kind)]


def container(name: str) -> Manifest:
    (found,) = templates(name)[0]["spec"]["containers"]
    return dict(found)


def example_secret() -> dict[str, str]:
    lines = (K8S / "secret.env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def environment(name: str, of: Manifest | None = None) -> dict[str, str]:
    """Return what a container gets, the gateway's if none is named, with a Secret filled in as its example says."""
    filled = {
        "LETTA_GATEWAY_API_KEYS": "sk-one,sk-two",
        "LETTA_GATEWAY_OPERATOR_KEY": "operator",
        "SECRET_KEY": "made at random, 32 characters and more",
    }
    if name in SCALED:
        filled["LETTA_GATEWAY_DATABASE_URL"] = "postgresql://user:password@host/database"
        filled["LETTA_GATEWAY_REDIS_URL"] = "redis://:password@host:6379/0"
    assert filled.keys() <= example_secret().keys()
    own = {given["name"]: given.get("value", "10.0.0.7") for given in (of or container(name)).get("env", [])}
    expanded = {key: re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], value) for key, value in own.items()}
    return {**one(name, "ConfigMap")["data"], **example_secret(), **filled, **expanded}


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no letta-gateway.toml here


def settings(name: str) -> Settings:
    return load(environment(name))


# Schemas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_manifest_fits_kubernetes(name: str, version: str) -> None:
    manifests = [manifest for manifest in overlay(name) if manifest["kind"] not in _OF_PROMETHEUS]
    assert read("".join(map(document, manifests)), version) == manifests


def document(manifest: Manifest) -> str:
    return f"---\n{msgspec.json.encode(manifest).decode()}\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"runAsNonRoot":true', '"runAsNonroot":true'),
        ('"failureThreshold":60', '"failureThreshold":"sixty"'),
        ('"apiVersion":"apps/v1"', '"apiVersion":"apps/v3"'),
        ('"image"', '"images"'),
    ],
)
def test_manifest_that_is_wrong_does_not_fit(before: str, after: str) -> None:
    right = msgspec.json.encode(one("single", "Deployment")).decode()
    read(right, *VERSIONS)
    assert before in right
    with pytest.raises(AssertionError, match="Deployment"):
        read(right.replace(before, after), *VERSIONS)


def what_the_crd_says(manifest: Manifest, folder: Path) -> str:
    shutil.copy(_CHECK, folder)
    (folder / "node_modules").symlink_to(installs.NODE_MODULES)
    command = [installs.NODE, folder / _CHECK.name, manifest["kind"]]
    given = msgspec.json.encode(manifest)
    return subprocess.run(command, input=given, capture_output=True, check=True, timeout=60).stdout.decode()


def monitoring(kind: str) -> list[Manifest]:
    return [manifest for manifest in rendered("monitoring") if manifest["kind"] == kind]


def test_rules_fit_their_crd_and_are_those_of_prometheus(tmp_path: Path) -> None:
    rules = monitoring("PrometheusRule")
    assert of_kind("scaled-by-streams", "PrometheusRule") == rules
    groups = []
    for number, rule in enumerate(rules):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert what_the_crd_says(rule, folder) == ""
        assert rule["metadata"]["namespace"] == one("single", "Service")["metadata"]["namespace"]
        groups += rule["spec"]["groups"]
    files = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
    assert groups == [
        group for file in files for (read_file,) in [read(file.read_text("utf-8"))] for group in read_file["groups"]
    ]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('"expr"', '"expression"', "/spec/groups/0/rules/0"),
        ('"for":"1m"', '"for":"a minute"', "/spec/groups/0/rules/0/for"),
    ],
)
def test_rule_that_is_wrong_does_not_fit(before: str, after: str, told: str, tmp_path: Path) -> None:
    right = msgspec.json.encode(monitoring("PrometheusRule")[0]).decode()
    assert before in right
    assert told in what_the_crd_says(msgspec.json.decode(right.replace(before, after, 1)), tmp_path)


def test_service_monitor_fits_its_crd(tmp_path: Path) -> None:
    (monitor,) = monitoring("ServiceMonitor")
    assert what_the_crd_says(monitor, tmp_path) == ""
    assert one("scaled-by-streams", "ServiceMonitor") == monitor
    service = one("single", "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["namespace"] == service["metadata"]["namespace"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] in {route.path for route in OPERATIONS}
    job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    assert f'job="{job}"' in (ROOT / "deploy/prometheus/rules/alerts.yml").read_text("utf-8")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('"interval"', '"intervall"', "/spec/endpoints/0/intervall: unknown"),
        ('"15s"', '"15 seconds"', "/spec/endpoints/0/interval"),
        ('"port":"metrics"', '"port":9464', "/spec/endpoints/0/port"),
        ('"selector"', '"select"', "/spec"),
    ],
)
def test_service_monitor_that_is_wrong_does_not_fit(before: str, after: str, told: str, tmp_path: Path) -> None:
    (monitor,) = monitoring("ServiceMonitor")
    right = msgspec.json.encode(monitor).decode()
    assert before in right
    assert told in what_the_crd_says(msgspec.json.decode(right.replace(before, after)), tmp_path)


# The gateway ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_variable_is_a_setting(name: str, nowhere: None) -> None:
    known = {env for setting in table() for env in (setting.row.env, *setting.row.aliases)}
    assert environment(name).keys() - known <= {"POD_IP"}
    ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
    assert (settings(name).port, settings(name).metrics_port) == (ports["http"], ports["metrics"])
    assert settings(name).host == "0.0.0.0"  # noqa: S104 - the pod's own address


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_is_written_down(name: str) -> None:
    secrets = {env for setting in table() if setting.row.secret for env in (setting.row.env, *setting.row.aliases)}
    assert not of_kind(name, "Secret")
    assert not secrets & one(name, "ConfigMap")["data"].keys()
    assert not secrets & {given["name"] for given in container(name).get("env", [])}
    assert secrets >= example_secret().keys()
    assert set(example_secret().values()) == {""}
    for pod in templates(name):
        references = pod["spec"]["containers"][0]["envFrom"]
        config = one(name, "ConfigMap")["metadata"]["name"]
        assert references == [{"configMapRef": {"name": config}}, {"secretRef": {"name": "letta-gateway"}}]


@pytest.mark.parametrize("name", OVERLAYS)
def test_end_of_a_pod_leaves_time_for_the_grace(name: str, nowhere: None) -> None:
    sleep = container(name)["lifecycle"]["preStop"]["sleep"]["seconds"]
    probe = container(name)["readinessProbe"]
    assert sleep >= probe["periodSeconds"]
    given = templates(name)[0]["spec"]["terminationGracePeriodSeconds"]
    assert given >= sleep + settings(name).grace + MARGIN


@pytest.mark.parametrize("name", OVERLAYS)
async def test_gateway_with_this_environment_answers_the_probes(name: str, tmp_path: Path) -> None:
    """On ports of its own, and with the one store that is there."""
    metrics = free_port()
    chosen = {
        **environment(name),
        "LETTA_GATEWAY_HOST": "127.0.0.1",
        "LETTA_GATEWAY_PORT": "0",
        "LETTA_GATEWAY_METRICS_PORT": str(metrics),
        "LETTA_GATEWAY_HOME": str(tmp_path),
        "LETTA_GATEWAY_DATABASE_URL": "",
        "LETTA_GATEWAY_REDIS_URL": "",
        "LETTA_GATEWAY_ADVERTISE": "",
    }
    probes = {kind: container(name)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"metrics"}
    async with gateway_process("http://127.0.0.1:9", env=chosen):
        for kind, status in (("startup", 200), ("liveness", 200), ("readiness", 503)):
            assert (await ask(metrics, "GET", probes[kind]["path"])).status == status, f"{kind}: Letta does not answer"


@pytest.mark.parametrize("name", SCALED)
def test_replicas_whose_secret_was_not_filled_in_do_not_start(name: str, nowhere: None) -> None:
    """Each would have a database of its own, and users would come and go."""
    stores = dict.fromkeys(("LETTA_GATEWAY_DATABASE_URL", "LETTA_GATEWAY_REDIS_URL"), "")
    with pytest.raises(SettingError, match="set LETTA_GATEWAY_REDIS_URL"):
        load({**environment(name), **stores})


@pytest.mark.parametrize("name", SCALED)
async def test_job_and_gateway_run_with_what_their_manifests_give_them(
    name: str, postgres: Postgres, tmp_path: Path
) -> None:
    """Each by its own arguments and its own environment; ports, folders and the stores' addresses are of here."""
    address, metrics, port = new_database(postgres), free_port(), free_port()
    with RedisProcess() as redis:
        here = {
            "LETTA_GATEWAY_PORT": str(port),
            "LETTA_GATEWAY_METRICS_PORT": str(metrics),
            "LETTA_GATEWAY_DATABASE_URL": address.url,
            "LETTA_GATEWAY_REDIS_URL": redis.url,
        }
        gateway_pod, job_pod = (pod["spec"]["containers"][0] for pod in templates(name))
        given = {**environment(name, job_pod), **here, "LETTA_GATEWAY_HOME": str(tmp_path / "job")}
        assert "LETTA_GATEWAY_ADVERTISE" not in given, "nobody reaches a job"
        async with gateway_process(None, *job_pod["args"], serves=False, env=given) as job:
            assert await job.ended() == 0, job.errors
        assert re.fullmatch(r"schema \S+, from none\n", job.output)
        async with gateway_process(None, "users", "list", serves=False, env=given) as by_hand:
            assert await by_hand.ended() == 0, by_hand.errors
        given = {**environment(name, gateway_pod), **here, "LETTA_GATEWAY_HOME": str(tmp_path / "pod")}
        async with gateway_process(None, *gateway_pod["args"], serves=False, env=given) as gateway:
            await gateway.says(f"Letta Gateway serves http://0.0.0.0:{port}/v1")
            ready = await ask(metrics, "GET", container(name)["readinessProbe"]["httpGet"]["path"])
            states = {part: state["status"] for part, state in ready.json()["dependencies"].items()}
            assert (states["database"], states["redis"]) == ("ok", "ok"), states
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0, gateway.errors


@pytest.mark.parametrize("name", OVERLAYS)
def test_image_is_this_release_of_the_dockerfile(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    user = stages(ROOT / "deploy/docker/Dockerfile")[-1].last("USER").value
    for pod in templates(name):
        assert pod["spec"]["containers"][0]["image"] == f"letta-gateway:{setup['metadata']['version']}"
        context = pod["spec"]["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


@pytest.mark.parametrize("name", OVERLAYS)
def test_commands_are_those_of_the_command_line(name: str) -> None:
    for pod in templates(name):
        command: Any = main
        for word in pod["spec"]["containers"][0]["args"]:
            command = command.commands[word]
        assert command.callback is not None


# Pods -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_are_restricted(name: str) -> None:
    """By the Pod Security Standards' level of that name, which the namespace demands, and with a root that is read."""
    labels = one(name, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {manifest["metadata"].get("namespace", "letta-gateway") for manifest in overlay(name)} == {"letta-gateway"}
    for pod in (template["spec"] for template in templates(name)):
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (own,) = pod["containers"]
        assert own["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert all(volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])
        mounts = {mount["mountPath"]: mount["name"] for mount in own["volumeMounts"]}
        assert mounts.keys() == {"/tmp", environment(name)["LETTA_GATEWAY_HOME"]}  # noqa: S108 - in the container
        assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_find_the_gateways_and_nothing_else(name: str) -> None:
    server, *others = [template["metadata"]["labels"] for template in templates(name)]
    deployment, service = one(name, "Deployment"), one(name, "Service")
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    if name in SCALED:
        selectors.append(one(name, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
        spec = deployment["spec"]["template"]["spec"]
        (apart,) = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        (spread,) = spec["topologySpreadConstraints"]
        selectors.extend(where["labelSelector"]["matchLabels"] for where in (apart["podAffinityTerm"], spread))
    for selector in selectors:
        assert selector.items() <= server.items()
        assert not any(selector.items() <= labels.items() for labels in others)
    ports = {port["name"] for port in container(name)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports


def test_single_has_one_gateway_per_file(nowhere: None) -> None:
    spec = one("single", "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container("single")["volumeMounts"]}
    claim = volumes[mounts[settings("single").home]]["persistentVolumeClaim"]["claimName"]
    assert one("single", "PersistentVolumeClaim")["metadata"]["name"] == claim
    assert spec["template"]["spec"]["securityContext"]["fsGroup"] == 10001
    kinds = {manifest["kind"] for manifest in overlay("single")}
    assert not kinds & {"HorizontalPodAutoscaler", "PodDisruptionBudget", "Job"}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_has_three_gateways_and_more(name: str, nowhere: None) -> None:
    deployment, autoscaler = one(name, "Deployment"), one(name, "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in deployment["spec"], "an apply would take back what the autoscaler did"
    assert autoscaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert 3 == autoscaler["minReplicas"] < autoscaler["maxReplicas"]
    assert one(name, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    (going,) = autoscaler["behavior"]["scaleDown"]["policies"]
    end = templates(name)[0]["spec"]["terminationGracePeriodSeconds"]
    assert (going["value"], going["periodSeconds"] >= end) == (1, True)
    assert "cpu" in container(name)["resources"]["requests"], "what utilization is a share of"
    assert not of_kind(name, "PersistentVolumeClaim")


@pytest.mark.parametrize("name", SCALED)
def test_as_many_gateways_as_there_may_be_fit_into_a_usual_postgresql(name: str, nowhere: None) -> None:
    most = one(name, "HorizontalPodAutoscaler")["spec"]["maxReplicas"]
    come_and_go = 1 + 3
    assert (most + come_and_go) * settings(name).database_connections <= MAX_CONNECTIONS - RESERVED


@pytest.mark.parametrize("name", SCALED)
def test_gateway_tells_the_others_its_own_address(name: str, nowhere: None) -> None:
    address, advertise = container(name)["env"][:2]
    assert address == {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    assert advertise["value"] == f"http://$(POD_IP):{settings(name).port}"
    assert settings(name).advertise == "http://10.0.0.7:8080"


def test_autoscaler_reads_what_the_adapter_offers() -> None:
    cpu, streams = one("scaled-by-streams", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [cpu] == one("scaled", "HorizontalPodAutoscaler")["spec"]["metrics"]
    ((rule,),) = [values["rules"]["custom"] for values in read((K8S / "prometheus-adapter.yaml").read_text("utf-8"))]
    name = streams["pods"]["metric"]["name"]
    assert (rule["name"]["as"], streams["pods"]["target"]["type"]) == (name, "AverageValue")
    exposed = [line.split()[0] for line in Metrics().expose().decode().splitlines() if not line.startswith("#")]
    assert [series for series in exposed if re.fullmatch(rule["name"]["matches"], series)] == [name]
    assert rule["seriesQuery"].startswith(f"{name}{{")


def test_adapters_query_has_one_value_for_each_pod(tmp_path: Path) -> None:
    """Its template filled in as the adapter does, and asked of Prometheus' own engine."""
    (values,) = read((K8S / "prometheus-adapter.yaml").read_text("utf-8"))
    query = values["rules"]["custom"][0]["metricsQuery"]
    for place, text in {
        "<<.Series>>": "letta_gateway_open_streams",
        "<<.LabelMatchers>>": 'namespace="here",pod=~"a|b"',
        "<<.GroupBy>>": "pod",
    }.items():
        assert place in query
        query = query.replace(place, text)
    series = {("here", "a"): 3, ("here", "b"): 5, ("here", "c"): 7, ("there", "a"): 11}
    tests = {
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'letta_gateway_open_streams{{namespace="{space}",pod="{pod}"}}', "values": str(value)}
                    for (space, pod), value in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "0m",
                        "exp_samples": [{"labels": '{pod="a"}', "value": 3}, {"labels": '{pod="b"}', "value": 5}],
                    }
                ],
            }
        ]
    }
    file = tmp_path / "tests.yml"
    file.write_bytes(msgspec.json.encode(tests))
    promtool = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert promtool.returncode == 0, promtool.stdout + promtool.stderr


# The way in, and out --------------------------------------------------------------------------------------------------


def is_routed(path: str, rules: list[Manifest]) -> bool:
    """Tell whether an Ingress has a path, by the words of its documentation."""
    return any(
        path == rule["path"] or (rule["pathType"] == "Prefix" and path.startswith(f"{rule['path']}/")) for rule in rules
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_ingress_leads_to_what_is_for_clients(name: str) -> None:
    (rule,) = one(name, "Ingress")["spec"]["rules"]
    paths = rule["http"]["paths"]
    service = one(name, "Service")
    for path in paths:
        assert path["backend"]["service"] == {"name": service["metadata"]["name"], "port": {"name": "http"}}
    reached = {route.path for route in ROUTES if is_routed(route.path, paths)}
    assert reached >= {route.path for route in ROUTES if is_for_clients(route)}
    assert not reached & {route.path for route in ROUTES if route.access in ("admin", "operator")}
    assert not reached & {route.path for route in OPERATIONS}
    assert not [route.path for route in PAGE if is_routed(route.path, paths)]
    assert {"/v1/models", "/api/v1/auth/login", "/.well-known/jwks.json"} <= reached


def is_for_clients(route: Route) -> bool:
    return route.access in ("api", "user")


@pytest.mark.parametrize("name", OVERLAYS)
def test_ingress_lets_streams_and_bodies_through(name: str, nowhere: None) -> None:
    prefix = "nginx.ingress.kubernetes.io/"
    given = one(name, "Ingress")["metadata"]["annotations"]
    told = {key.removeprefix(prefix): value for key, value in given.items()}
    assert (told["proxy-buffering"], told["proxy-next-upstream"]) == ("off", "error")
    assert int(told["proxy-read-timeout"]) > settings(name).turn_timeout + settings(name).queue_wait
    assert int(told["proxy-body-size"].removesuffix("m")) * 1024**2 == settings(name).max_body
    by = re.findall(r"\$(\w+)", told["upstream-hash-by"])
    assert by[: len(CHAT_HEADERS)] == [f"http_{header.lower().replace('-', '_')}" for header in CHAT_HEADERS]
    assert "".join(f"${variable}" for variable in by) == told["upstream-hash-by"]


CONTROLLER = Peer("ingress-nginx")
PROMETHEUS = Peer("monitoring")
STRANGER = Peer("default")


@pytest.mark.parametrize("name", OVERLAYS)
def test_who_may_come_in(name: str) -> None:
    policies, labels = of_kind(name, "NetworkPolicy"), templates(name)[0]["metadata"]["labels"]
    replica = Peer("letta-gateway", labels)
    peers = {"controller": CONTROLLER, "prometheus": PROMETHEUS, "stranger": STRANGER, "replica": replica}
    coming = {
        (who, port)
        for who, peer in peers.items()
        for port in ("http", "metrics")
        if allows(policies, "ingress", labels, peer, port)
    }
    always = {("controller", "http"), ("prometheus", "metrics")}
    assert coming == always | ({("replica", "http")} if name in SCALED else set())


@pytest.mark.parametrize("name", OVERLAYS)
def test_where_a_gateway_may_go(name: str) -> None:
    policies, labels = of_kind(name, "NetworkPolicy"), templates(name)[0]["metadata"]["labels"]

    def may_go(to: Peer, port: str | int, protocol: str = "TCP") -> bool:
        return allows(policies, "egress", labels, to, port, protocol)

    assert may_go(Peer("kube-system"), 53, "UDP")
    assert may_go(Peer(address="169.254.20.10"), 53, "UDP")
    assert not may_go(Peer(address="169.254.169.254"), 53, "UDP")
    assert may_go(Peer("letta"), 8283)
    assert may_go(Peer("letta"), 4500)
    assert may_go(Peer(address="203.0.113.5"), 443)
    assert not may_go(Peer(address="203.0.113.5"), 80)
    assert may_go(Peer(address="2001:db8::5"), 443)
    assert not may_go(Peer(address="169.254.169.254"), 443)
    assert not may_go(Peer(address="fd00:ec2::254"), 443)
    assert not may_go(STRANGER, 8283)
    for store in (5432, 6379):
        assert may_go(Peer(address="203.0.113.5"), store) is (name in SCALED)
    assert may_go(Peer("letta-gateway", labels), "http") is (name in SCALED)


@pytest.mark.parametrize("name", SCALED)
def test_migrations_reach_the_database_and_nobody_reaches_them(name: str) -> None:
    policies, labels = of_kind(name, "NetworkPolicy"), templates(name)[1]["metadata"]["labels"]
    assert allows(policies, "egress", labels, Peer(address="203.0.113.5"), 5432)
    assert not allows(
        policies, "ingress", labels, Peer("letta-gateway", templates(name)[0]["metadata"]["labels"]), "http"
    )
