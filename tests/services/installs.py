"""Install the clients that the services' tests try, under `.cache/`: `python -m tests.services.installs`.

What is installed is pinned, with hashes, in `deploy/locks/services-python.txt` and `deploy/locks/services-npm/`. Each
part carries a stamp that names what it was made of: what is as the locks say is left alone. No install script runs.
Node.js is one of the npm packages: many clients need a newer one than the machine has.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]
_CACHE: Final = _ROOT / ".cache"
_LOCKS: Final = _ROOT / "deploy" / "locks"
_UV: Final = _ROOT / ".venv" / "bin" / "uv"
_VENV: Final = _CACHE / "services-python"
_NPM: Final = _CACHE / "services-npm"
_PYTHON_LOCK: Final = _LOCKS / "services-python.txt"
_NPM_LOCKS: Final = (_LOCKS / "services-npm" / "package.json", _LOCKS / "services-npm" / "package-lock.json")

NODE_MODULES: Final = _NPM / "node_modules"
PYTHON: Final = _VENV / "bin" / "python"
LLM: Final = _VENV / "bin" / "llm"
NODE: Final = NODE_MODULES / ".bin" / "node"
CODEX: Final = NODE_MODULES / "@openai" / "codex" / "bin" / "codex.js"
OPENCODE: Final = NODE_MODULES / "opencode-linux-x64-baseline" / "bin" / "opencode"
"""There for this platform alone."""


def install() -> None:
    """Make what is missing."""
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "services.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make(_VENV, (_PYTHON_LOCK,), _install_python)
        _make(_NPM, _NPM_LOCKS, _install_npm)


def missing() -> str | None:
    """Say what is missing, if anything."""
    absent = [part.name for part in (_VENV, _NPM) if not _stamp(part).exists()]
    return f"{', '.join(absent)} not set up: run `python -m tests.services.installs`" if absent else None


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
    subprocess.run([_UV, "venv", "--quiet", "--python", "3.11", _VENV], check=True)
    options: list[str | Path] = ["--quiet", "--compile-bytecode", "--python", PYTHON, "--require-hashes"]
    subprocess.run([_UV, "pip", "install", *options, "-r", _PYTHON_LOCK], check=True)


def _install_npm() -> None:
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is missing: install Node.js of any version that has it; it brings the Node.js that the tests use")
    _NPM.mkdir()
    for lock in _NPM_LOCKS:
        shutil.copy(lock, _NPM)
    # The machine's own Node.js may be older than what the packages ask for: they run with the one among them.
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=_NPM, check=True)


if __name__ == "__main__":
    install()
