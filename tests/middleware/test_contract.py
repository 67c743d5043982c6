import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from gateway.settings import Settings
from middleware import access_log, auth, body_guard, error_boundary, metrics, rate_limit, request_id
from middleware.chain import DEFAULT
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig, Plugin
from tests.server.running import settings
from tests.server.subprocesses import gateway_process
from tests.server.upstream import Upstream

BUILT_INS: tuple[Plugin, ...] = (
    request_id.middleware,
    access_log.middleware,
    metrics.middleware,
    error_boundary.middleware,
    body_guard.middleware,
    auth.middleware,
    rate_limit.middleware,
)
PACKAGE = Path(__file__).parents[1] / "data" / "plugin_package"


@pytest.mark.parametrize("plugin", BUILT_INS, ids=lambda plugin: plugin.name)
def test_built_in_keeps_the_contract(plugin: Plugin) -> None:
    assert plugin.name in DEFAULT
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"no such key": 1}, plugin.Config)
    assert callable(plugin.build(plugin.Config(), settings()))


def test_plugin_made_of_its_parts() -> None:
    def build(config: NoConfig, chosen: Settings) -> AiohttpMiddleware:
        @web.middleware
        async def nothing(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await handler(request)

        return nothing

    plugin: Plugin = Middleware("nothing", NoConfig, build)
    assert (plugin.name, plugin.Config, plugin.build) == ("nothing", NoConfig, build)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package of a third party, as its user would, into a folder of its own."""
    folder = tmp_path_factory.mktemp("third-party")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    uv = Path(sys.executable).with_name("uv")
    how = ("--offline", "--no-cache", "--quiet", "--no-deps", "--no-build-isolation", "--python", sys.executable)
    command = (uv, "pip", "install", *how, "--target", folder / "target", folder / "source")
    subprocess.run(command, check=True, cwd=folder)
    return folder / "target"


CHAIN = ",".join((*DEFAULT, "curfew"))


async def test_installed_middleware_named_in_the_settings(installed: Path) -> None:
    async with (
        Upstream() as letta,
        gateway_process(letta.url, PYTHONPATH=str(installed), LETTA_GATEWAY_MIDDLEWARE=CHAIN) as gateway,
    ):
        answer = await gateway.ask("GET", "/v1/models")
    assert answer.status == 200
    assert answer.header("x-curfew") == "day"


async def test_installed_middleware_with_its_config(installed: Path) -> None:
    config = '{"curfew": {"night": true, "message": "Come back at eight."}}'
    async with (
        Upstream() as letta,
        gateway_process(
            letta.url,
            PYTHONPATH=str(installed),
            LETTA_GATEWAY_MIDDLEWARE=CHAIN,
            LETTA_GATEWAY_MIDDLEWARE_CONFIG=config,
        ) as gateway,
    ):
        answer = await gateway.ask("GET", "/v1/models")
    assert (answer.status, answer.code) == (403, "curfew")
    assert answer.error["message"] == "Come back at eight."
    assert answer.header("x-curfew") == "night"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"LETTA_GATEWAY_MIDDLEWARE_CONFIG": '{"curfew": {"nite": true}}'}, "nite"),
        ({"LETTA_GATEWAY_MIDDLEWARE_CONFIG": '{"curfew": {"night": "yes please"}}'}, "curfew"),
        ({"PYTHONPATH": ""}, "curfew"),
    ],
)
async def test_installed_middleware_refuses_what_it_does_not_know(
    installed: Path, changes: dict[str, str], named: str
) -> None:
    environment = {"PYTHONPATH": str(installed), "LETTA_GATEWAY_MIDDLEWARE": CHAIN, **changes}
    async with gateway_process("http://127.0.0.1:9", serves=False, env=environment) as gateway:
        assert await gateway.ended() == 2
    (line,) = gateway.errors.splitlines()
    assert named in line
