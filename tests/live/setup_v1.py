"""Install a real Letta V1 server and a PostgreSQL for it under `.cache/`: `python -m tests.live.setup_v1`.

What is installed is pinned, with hashes, in `deploy/locks/v1-server.txt` and `v1-postgres.txt`. Each part carries a
stamp that names what it was made of: a part whose stamp is missing (an interrupted install) or old (a changed pin) is
made anew, the others are left alone. The last part is a PostgreSQL data folder with Letta's schema: each session starts
from a copy of it.
"""

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.live.postgres import CACHE, Postgres, running_postgres
from tests.live.postgres import VENV as POSTGRES_VENV

_ROOT = CACHE.parent
_HERE = Path(__file__).parent
_UV = _ROOT / ".venv" / "bin" / "uv"
_PYTHON = "3.11"
_SERVER_LOCK = _ROOT / "deploy" / "locks" / "v1-server.txt"
_POSTGRES_LOCK = _ROOT / "deploy" / "locks" / "v1-postgres.txt"

SERVER_VENV = CACHE / "v1"
TEMPLATE = CACHE / "v1-database"

# The wheel comes without Letta's migrations, but its ORM knows the tables.
# The sequence is what a migration adds and the ORM does not know.
_MAKE_SCHEMA = """
import asyncio
import letta.orm
from letta.orm.base import Base
from letta.server.db import engine

async def main():
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()

asyncio.run(main())
"""
_AFTER_SCHEMA = (
    "create sequence message_seq_id; alter table messages alter sequence_id set default nextval('message_seq_id')"
)


def set_up() -> None:
    """Make what is missing."""
    CACHE.mkdir(exist_ok=True)
    server, postgres = _digest(_SERVER_LOCK), _digest(_POSTGRES_LOCK)
    with _only_one():
        _make(SERVER_VENV, server, lambda: _install(SERVER_VENV, _SERVER_LOCK))
        _make(POSTGRES_VENV, postgres, lambda: _install(POSTGRES_VENV, _POSTGRES_LOCK))
        _make(TEMPLATE, _digest(_HERE / "setup_v1.py", _HERE / "postgres.py") + server + postgres, _make_template)


def missing() -> str | None:
    """Say what is missing, if anything."""
    absent = [part.name for part in (SERVER_VENV, POSTGRES_VENV, TEMPLATE) if not _stamp(part).exists()]
    return f"{', '.join(absent)} not set up: run `python -m tests.live.setup_v1`" if absent else None


def server_environment(database: Postgres, home: Path) -> dict[str, str]:
    """Give the environment of a Letta server: nothing of ours, and no way out to the internet."""
    nowhere = "http://127.0.0.1:9"
    return {
        "PATH": f"{SERVER_VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LETTA_DIR": str(home / ".letta"),
        "TMPDIR": str(home),
        "LC_ALL": "C.UTF-8",
        "LETTA_PG_URI": database.uri("letta"),
        "LETTA_DISABLE_TRACING": "true",
        # It would download NLTK's data at each start, and tell its makers how it is used.
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1,localhost",
        "DO_NOT_TRACK": "1",
    }


@contextlib.contextmanager
def state_folder() -> Iterator[Path]:
    """Make a temporary folder for a session, outside of whatever private folder TMPDIR names."""
    base = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - mkdtemp makes the folder itself
    with tempfile.TemporaryDirectory(prefix="letta-v1-", dir=base, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    with (CACHE / "v1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(*sources: Path) -> str:
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _stamp(part: Path) -> Path:
    return part.with_name(f"{part.name}.stamp")


def _make(part: Path, made_of: str, make: Callable[[], None]) -> None:
    stamp = _stamp(part)
    if stamp.exists() and stamp.read_text() == made_of:
        return
    sys.stdout.write(f"setting up {part.relative_to(_ROOT)} ...\n")
    sys.stdout.flush()
    stamp.unlink(missing_ok=True)
    make()
    stamp.write_text(made_of)


def _install(venv: Path, lock: Path) -> None:
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([_UV, "venv", "--quiet", "--python", _PYTHON, venv], check=True)
    target: list[str | Path] = ["--quiet", "--python", venv / "bin" / "python"]
    subprocess.run([_UV, "pip", "install", *target, "--require-hashes", "-r", lock], check=True)


def _make_template() -> None:
    with state_folder() as state:
        with running_postgres(state, None, keep=True) as database:
            database.run("create database letta")
            database.run("create extension vector", "letta")
            subprocess.run(
                [SERVER_VENV / "bin" / "python", "-c", _MAKE_SCHEMA],
                check=True,
                cwd=state,
                env=server_environment(database, state),
                stdout=subprocess.DEVNULL,
            )
            database.run(_AFTER_SCHEMA, "letta")
        shutil.rmtree(TEMPLATE, ignore_errors=True)
        shutil.copytree(state / "data", TEMPLATE)


if __name__ == "__main__":
    set_up()
