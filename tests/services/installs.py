"""Install what the services' tests try, under `.cache/`: `python -m tests.services.installs`.

Clients of the gateway, Open WebUI among them, and services behind it: a LiteLLM proxy, and Supabase's own server of a
few files. What is installed is pinned, with hashes, in `deploy/locks/services-*.txt` and `deploy/locks/services-npm/`.
Each part carries a stamp that names what it was made of: what is as the locks say is left alone. No install script
runs. Node.js is one of the npm packages: many clients need a newer one than the machine has.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]
_CACHE: Final = _ROOT / ".cache"
_LOCKS: Final = _ROOT / "deploy" / "locks"
_UV: Final = _ROOT / ".venv" / "bin" / "uv"
_VENV: Final = _CACHE / "services-python"
_NPM: Final = _CACHE / "services-npm"
_LITELLM: Final = _CACHE / "services-litellm"
_OPEN_WEBUI: Final = _CACHE / "services-open-webui"
_PIPELINE: Final = _CACHE / "services-pipeline"
_PYTHON_LOCK: Final = _LOCKS / "services-python.txt"
_LITELLM_LOCK: Final = _LOCKS / "services-litellm.txt"
_PIPELINE_LOCK: Final = _LOCKS / "services-pipeline.txt"
_OPEN_WEBUI_LOCK: Final = _LOCKS / "services-open-webui.txt"
_NPM_LOCKS: Final = (_LOCKS / "services-npm" / "package.json", _LOCKS / "services-npm" / "package-lock.json")

APT: Final = (
    "chromium",
    "curl",
    "dbus-daemon",
    "docker-compose",
    "kubernetes-client",
    "nginx",
    "prometheus",
    "redis-server",
    "slowhttptest",
    "systemd",
)
"""Debian packages of programs that the tests run by their names."""
_ELSEWHERE: Final = {"kubernetes-client": "kubectl"}
"""Programs that other packages bring as well, and may not both."""
_POLICY: Final = Path("/usr/sbin/policy-rc.d")
"""What packages ask whether they may start their services: 101 is no."""

NODE_MODULES: Final = _NPM / "node_modules"
PYTHON: Final = _VENV / "bin" / "python"
LLM: Final = _VENV / "bin" / "llm"
NODE: Final = NODE_MODULES / ".bin" / "node"
CODEX: Final = NODE_MODULES / "@openai" / "codex" / "bin" / "codex.js"
OPENCODE: Final = NODE_MODULES / "opencode-linux-x64-baseline" / "bin" / "opencode"
"""There for this platform alone."""
AXE: Final = NODE_MODULES / "axe-core" / "axe.min.js"
SUPABASE: Final = NODE_MODULES / "@supabase" / "lite" / "dist" / "cli" / "index.js"
PIPELINE_PYTHON: Final = _PIPELINE / "bin" / "python"
"""With what the pipeline's file names in its first lines, and nothing else."""
OPEN_WEBUI: Final = _OPEN_WEBUI / "bin" / "open-webui"
LITELLM: Final = _LITELLM / "bin" / "litellm"
_PRISMA: Final = NODE_MODULES / "prisma" / "build" / "index.js"
_QUERY_ENGINE: Final = Path(__file__).parent / "litellm" / "query_engine.cjs"


def install() -> None:
    """Make what is missing."""
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "services.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make(_VENV, (_PYTHON_LOCK,), _install_python)
        _make(_NPM, _NPM_LOCKS, _install_npm)
        _make(_LITELLM, (_LITELLM_LOCK, *_NPM_LOCKS), _install_litellm)
        _make(_OPEN_WEBUI, (_OPEN_WEBUI_LOCK,), _install_open_webui)
        _make(_PIPELINE, (_PIPELINE_LOCK,), lambda: _install_venv(_PIPELINE, _PIPELINE_LOCK))
        _install_apt()


def missing() -> str | None:
    """Say what is missing, if anything."""
    absent = [part.name for part in (_VENV, _NPM, _LITELLM, _OPEN_WEBUI, _PIPELINE) if not _stamp(part).exists()]
    return f"{', '.join(absent)} not set up: run `python -m tests.services.installs`" if absent else None


def prisma_environment() -> dict[str, str]:
    """Return what makes LiteLLM's Prisma take the engine that is served by a script, and fetch none."""
    return {
        "PRISMA_QUERY_ENGINE_BINARY": str(_QUERY_ENGINE),
        "PRISMA_QUERY_ENGINE_LIBRARY": str(_QUERY_ENGINE),
        "PRISMA_SCHEMA_ENGINE_BINARY": str(_QUERY_ENGINE),
        "PRISMA_CLI_QUERY_ENGINE_TYPE": "binary",
        "PRISMA_ENGINES_CHECKSUM_IGNORE_MISSING": "1",
        "CHECKPOINT_DISABLE": "1",
        "QUERY_ENGINE_NODE_MODULES": str(NODE_MODULES),
    }


def _stamp(part: Path) -> Path:
    return part.with_name(f"{part.name}.stamp")


def _make(part: Path, locks: tuple[Path, ...], make: Callable[[], None]) -> None:
    stamp, made_of = _stamp(part), hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    if stamp.exists() and stamp.read_text() == made_of:
        return
    sys.stdout.write(f"setting up {part.relative_to(_ROOT)} ...\n")
    sys.stdout.flush()
    stamp.unlink(missing_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    make()
    stamp.write_text(made_of)


def _install_python() -> None:
    _install_venv(_VENV, _PYTHON_LOCK)


def _install_open_webui() -> None:
    # PyTorch, some gigabytes, is left out of the lock: what needs it here is done by nobody.
    _install_venv(_OPEN_WEBUI, _OPEN_WEBUI_LOCK, "--no-deps")


def _install_venv(venv: Path, lock: Path, *more: str) -> None:
    subprocess.run([_UV, "venv", "--quiet", "--python", "3.11", venv], check=True)
    options: list[str | Path] = ["--quiet", "--compile-bytecode", "--python", venv / "bin" / "python", *more]
    subprocess.run([_UV, "pip", "install", *options, "--require-hashes", "-r", lock], check=True)


def _install_npm() -> None:
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is missing: install Node.js of any version that has it; it brings the Node.js that the tests use")
    _NPM.mkdir()
    for lock in _NPM_LOCKS:
        shutil.copy(lock, _NPM)
    # The machine's own Node.js may be older than what the packages ask for: they run with the one among them.
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=_NPM, check=True)


def _install_apt() -> None:
    """Install the Debian packages that are missing, and start none of their services."""
    absent = [p for p in APT if not _is_installed(p) and shutil.which(_ELSEWHERE.get(p, "")) is None]
    if not absent:
        return
    sys.stdout.write(f"setting up {', '.join(absent)} ...\n")
    sys.stdout.flush()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _starting_no_services():
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *absent],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def _starting_no_services() -> Iterator[None]:
    if _POLICY.exists():  # the machine has one of its own, as containers do: it is not ours to change
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


def _is_installed(package: str) -> bool:
    asked = ["dpkg-query", "--show", "--showformat", "${db:Status-Abbrev}", package]
    return subprocess.run(asked, check=False, capture_output=True, text=True).stdout.startswith("ii")


def _install_litellm() -> None:
    """Install the proxy, and generate the client by which it keeps its books."""
    _install_venv(_LITELLM, _LITELLM_LOCK)
    schema = next(_LITELLM.glob("lib/python*/site-packages/litellm/proxy/schema.prisma"))
    programs = f"{_LITELLM / 'bin'}:{NODE.parent}:{os.defpath}"
    subprocess.run(
        [NODE, _PRISMA, "generate", "--schema", schema],
        check=True,
        stdout=subprocess.DEVNULL,
        env={"PATH": programs, "HOME": str(_LITELLM), "LC_ALL": "C.UTF-8", **prisma_environment()},
    )


if __name__ == "__main__":
    install()
