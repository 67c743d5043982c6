"""What is measured, as one row each: how it starts, and how one asks it for a stream."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.accounts import user_keys
from gateway.accounts.identity.tokens import AUDIENCE, ISSUER
from gateway.accounts.secrets import CHECK
from tests.bench.frames import agent_id, agent_name
from tests.bench.processes import ROOT, Child, free_port, running
from tests.services.nginx import marked, program, write_config

CACHE = ROOT / ".cache"
LOGS = CACHE / "bench" / "logs"
LOCK = ROOT / "deploy" / "locks" / "bench-litellm.txt"
_KEY = "sk-bench"
_LITELLM = CACHE / "litellm"


class Asking(NamedTuple):
    """The words of one request: which agent, what to play, streamed or not."""

    agent: int
    words: str
    stream: bool = True


class Target(NamedTuple):
    """Something that runs and can be asked."""

    name: str
    port: int
    process: Child
    request: Callable[[Asking], bytes]


def _post(path: str, body: object, *headers: str) -> bytes:
    payload = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + payload


def ask_letta(asking: Asking) -> bytes:
    """Ask in Letta's language, as the gateway itself does."""
    body = {"messages": [{"role": "user", "content": asking.words}], "stream_tokens": True, "include_pings": True}
    return _post(f"/v1/agents/{agent_id(asking.agent)}/messages/stream", body)


def ask_openai(asking: Asking) -> bytes:
    """Ask the gateway in OpenAI's language, with a key; each agent is a model."""
    return _ask_model(agent_name(asking.agent), asking)


def ask_as_a_user(asking: Asking) -> bytes:
    """Ask the gateway with a key of one's own, by which the site of `deploy/nginx` chooses where no chat is named.

    A chat that is named would begin another conversation with each request, as the driver says the same again.
    """
    return _ask_model(agent_name(asking.agent), asking, key=_user_key(asking.agent))


def keys_of_users(count: int) -> str:
    """Return the keys of so many users, as the gateway's setting has them."""
    return ",".join(map(_user_key, range(count)))


def _user_key(number: int) -> str:
    return f"{_KEY}-{number}"


def ask_litellm(asking: Asking) -> bytes:
    """Ask LiteLLM, which knows one model."""
    return _ask_model("bench", asking)


def ask_with_key(key: str) -> bytes:
    """Ask the gateway as somebody with that key."""
    return _ask_model(agent_name(0), Asking(0, "Let me in"), key=key)


def guess_a_key(number: int) -> bytes:
    """Ask with a key that was made up."""
    return ask_with_key(f"sk-guess-{number}")


def guess_a_personal_key(number: int) -> bytes:
    """Ask with a key that looks like one that the gateway gave to a user."""
    shape = user_keys.PREFIX + "x" * (user_keys.SECRET + CHECK)
    return ask_with_key(shape[: -len(str(number))] + str(number))


def forge_a_token(number: int) -> bytes:
    """Ask the platform with an access token that somebody else signed."""
    claims = {"sub": str(number), "sid": str(number), "iat": 0, "exp": 1 << 33, "iss": ISSUER, "aud": AUDIENCE}
    token = jwt.encode(claims, Ed25519PrivateKey.generate(), "EdDSA")
    return f"GET /api/v1/auth/me HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


def _ask_model(model: str, asking: Asking, key: str = _KEY) -> bytes:
    body = {"model": model, "stream": asking.stream, "messages": [{"role": "user", "content": asking.words}]}
    return _post("/v1/chat/completions", body, f"Authorization: Bearer {key}")


@contextmanager
def upstream(agents: int) -> Iterator[Target]:
    """Start the fake Letta server; asked without anything between, it is the "direct" target."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.upstream", "--port", str(port), "--agents", str(agents)]
    with running(command, port, log=LOGS / "upstream.log", path="/v1/health/") as process:
        yield Target("direct", port, process, ask_letta)


@contextmanager
def passthrough(upstream_port: int) -> Iterator[Target]:
    """Start aiohttp's byte pass-through."""
    port = free_port()
    address = f"http://127.0.0.1:{upstream_port}"
    command = [sys.executable, "-m", "tests.bench.passthrough", "--port", str(port), "--upstream", address]
    with running(command, port, log=LOGS / "passthrough.log") as process:
        yield Target("pass-through", port, process, ask_letta)


@contextmanager
def gateway(upstream_port: int, **more: str) -> Iterator[Target]:
    """Start the gateway with its full chain: a key, and a limit that never refuses; ``more`` are settings."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as home:
        environment = {
            "LETTA_BASE_URL": f"http://127.0.0.1:{upstream_port}",
            "LETTA_GATEWAY_HOST": "127.0.0.1",
            "LETTA_GATEWAY_PORT": str(port),
            "LETTA_GATEWAY_API_KEYS": _KEY,
            "LETTA_GATEWAY_RATE_LIMIT": "1000000/second",
            "LETTA_GATEWAY_HOME": home,
            "ENVIRONMENT": "production",
            **more,
        }
        command = [str(Path(sys.executable).parent / "letta-gateway"), "serve"]
        # One whose database is not open yet is alive, and answers 503.
        with running(command, port, log=LOGS / "gateway.log", path="/ready", environment=environment) as process:
            yield Target("gateway", port, process, ask_openai)


@contextmanager
def nginx(upstream_port: int) -> Iterator[Target]:
    """Start nginx with one worker that hands the Letta route on, unbuffered, over kept-alive connections."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, port=port, upstream=upstream_port, user=_nginx_user()))
        with _nginx(folder, config, port) as process:
            yield Target("nginx", port, process, ask_letta)


@contextmanager
def balancer(ports: Sequence[int]) -> Iterator[tuple[int, Child]]:
    """Start nginx with the site of `deploy/nginx` before gateways, but without TLS, which the driver does not speak."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as folder:
        plain = marked("listen").replace("443 ssl http2", f"127.0.0.1:{port}")
        config = write_config(Path(folder), port, free_port(), ports, "", {"listen": plain, "listen_ipv6": ""})
        with _nginx(folder, config, port) as process:
            yield port, process


@contextmanager
def _nginx(folder: str, config: Path, port: int) -> Iterator[Child]:
    command = [program(), "-p", folder, "-e", f"{folder}/error.log", "-c", str(config)]
    with running(command, port, log=LOGS / "nginx.log") as process:
        yield process


@contextmanager
def litellm(upstream_port: int) -> Iterator[Target]:
    """Start a LiteLLM proxy with one worker and a key, without a database."""
    port = free_port()
    _install_litellm()
    with tempfile.TemporaryDirectory(prefix="bench-litellm-") as folder:
        config = Path(folder) / "litellm.yaml"
        config.write_text(json.dumps(_litellm_config(upstream_port)))
        arguments = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        command = [str(_LITELLM / "bin" / "litellm"), *arguments, "--telemetry", "False"]
        environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DISABLE_ADMIN_UI": "True", "LITELLM_LOG": "ERROR"}
        log = LOGS / "litellm.log"
        path = "/health/liveliness"
        with running(command, port, log=log, path=path, environment=environment, patience=120) as process:
            yield Target("litellm", port, process, ask_litellm)


def _nginx_user() -> str:
    """Let the worker read its folder: as root, nginx would otherwise become somebody else."""
    return "user root;" if os.geteuid() == 0 else ""


def _litellm_config(upstream_port: int) -> dict[str, object]:
    """Write LiteLLM's settings; JSON is YAML."""
    parameters = {"model": "openai/bench", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    return {
        "model_list": [{"model_name": "bench", "litellm_params": parameters}],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        "general_settings": {"master_key": _KEY},
    }


def _install_litellm() -> None:
    """Build LiteLLM's own environment once, from hashes."""
    done = _LITELLM / f"installed-{LOCK.stat().st_size}"
    if done.exists():
        return
    uv = str(Path(sys.executable).parent / "uv")
    python = str(_LITELLM / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(_LITELLM)], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", str(LOCK)]
    subprocess.run(install, check=True)
    done.touch()


_NGINX = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream letta {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /health {{ return 200; }}
        location / {{
            proxy_pass http://letta;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 3600s;
        }}
    }}
}}
"""
