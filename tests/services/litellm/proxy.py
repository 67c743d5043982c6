"""A real LiteLLM proxy that bills, on a PostgreSQL of ours, before a model of ours.

LiteLLM keeps its books by Prisma, whose engine is a native program that no package registry has: it gets the engine's
WebAssembly build instead, served by `query_engine.cjs`. The tables come from LiteLLM's own migrations, in one go.
"""

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.live import processes
from tests.live.postgres import Postgres
from tests.services import installs

MASTER_KEY: Final = "sk-master-of-tests"
MODEL: Final = "priced"
"""What the model behind the proxy is called there."""
PROMPT_PRICE: Final = 0.00003
COMPLETION_PRICE: Final = 0.00006
"""US dollars per token."""
_DATABASE: Final = "litellm"
_READY: Final = 180.0


class LitellmProxy(msgspec.Struct, frozen=True):
    """A proxy that answers; ``base_url`` is without a slash at the end."""

    base_url: str
    log: Path

    def call(self, method: str, path: str, body: object = None, *, key: str = MASTER_KEY, timeout: float = 30.0) -> Any:
        """Send one request, and return the decoded answer; raises ``urllib.error.HTTPError``."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.base_url + path, data, headers, method=method)  # noqa: S310 - it is http
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def running_litellm(
    state: Path, database: Postgres, model_base_url: str, upstream_model: str, **general: object
) -> Iterator[LitellmProxy]:
    """Run the proxy, its configuration and log in a folder that is there; ``general`` are settings of its own."""
    _make_tables(state, database)
    config = state / "litellm.json"
    config.write_text(json.dumps(_config(model_base_url, upstream_model, general)))
    port, log = processes.free_port(), state / "litellm.log"
    command: list[str | Path] = [
        installs.LITELLM,
        "--config",
        config,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--telemetry",
        "False",
    ]
    program = processes.start(command, log=log, env=_environment(state, database), cwd=state)
    with processes.running(program):
        proxy = LitellmProxy(f"http://127.0.0.1:{port}", log)
        _wait(proxy, program)
        yield proxy


def _config(model_base_url: str, upstream_model: str, general: Mapping[str, object]) -> dict[str, object]:
    parameters = {
        "model": f"openai/{upstream_model}",
        "api_base": model_base_url,
        "api_key": "sk-model",
        "input_cost_per_token": PROMPT_PRICE,
        "output_cost_per_token": COMPLETION_PRICE,
    }
    return {
        "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
        "litellm_settings": {"telemetry": False, "num_retries": 0, "drop_params": True},
        "general_settings": {"master_key": MASTER_KEY, "proxy_batch_write_at": 1, **general},
    }


def _environment(state: Path, database: Postgres) -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"
    return {
        "PATH": f"{installs.LITELLM.parent}:{installs.NODE.parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(state),
        "TMPDIR": str(state),
        "LC_ALL": "C.UTF-8",
        "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database.port}/{_DATABASE}",
        **installs.prisma_environment(),
        "DISABLE_SCHEMA_UPDATE": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_SALT_KEY": "sk-salt-of-tests",
        "DISABLE_ADMIN_UI": "True",
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _make_tables(state: Path, database: Postgres) -> None:
    """Run LiteLLM's migrations, one after another, as Prisma would: statement by statement."""
    database.run(f"create database {_DATABASE}")
    migrations = next(installs.LITELLM.parents[1].glob("lib/python*/site-packages/litellm_proxy_extras/migrations"))
    everything = state / "migrations.sql"
    everything.write_text("\n".join(file.read_text() for file in sorted(migrations.glob("*/migration.sql"))))
    server = ["-h", "127.0.0.1", "-p", str(database.port), "-U", "postgres", "-d", _DATABASE]
    subprocess.run(
        [database.programs / "psql", *server, "-v", "ON_ERROR_STOP=1", "-q", "-f", everything],
        check=True,
        capture_output=True,
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
    )


def _wait(proxy: LitellmProxy, program: processes.Program) -> None:
    end = time.monotonic() + _READY
    while time.monotonic() < end and program.running:
        with contextlib.suppress(OSError, ValueError):
            if proxy.call("GET", "/health/readiness", timeout=2).get("db") == "connected":
                return
        time.sleep(0.2)
    raise RuntimeError(f"LiteLLM did not get ready; the end of its log:\n{processes.tail(proxy.log)}")
