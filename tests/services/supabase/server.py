"""Supabase's own small server, with Auth and REST over SQLite (`@supabase/lite`, an alpha).

Where it is known to differ from Supabase Auth itself, nothing is learnt from it: its tokens name no issuer, errors have
the older shape, and there is no admin API.
"""

import contextlib
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.live import processes
from tests.services import installs

ANON_KEY: Final = "sb_publishable_aaaaaaaaaaaaaaaaaaaaaa_bbbbbbbb"
SERVICE_KEY: Final = "sb_secret_aaaaaaaaaaaaaaaaaaaaaa_bbbbbbbb"
JWT_SECRET: Final = "a-secret-of-tests-with-more-than-32-characters"
_READY: Final = 30.0

# `notes` shows that it is the same token which the server itself takes.
_TABLES: Final = """
create table notes (id uuid primary key default gen_random_uuid(), user_id uuid not null, text text not null);
alter table notes enable row level security;
create policy own on notes for all using (auth.uid() = user_id) with check (auth.uid() = user_id);
"""


class SupabaseServer:
    """A server that answers."""

    def __init__(self, port: int, log: Path, program: processes.Program) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.program = program

    def stop(self) -> None:
        """Stop it before its time."""
        self.program.stop()


@contextlib.contextmanager
def running_supabase(state: Path, *, confirms: bool = False) -> Iterator[SupabaseServer]:
    """Run one in a folder that is there; ``confirms`` has new users open a link first."""
    port, log = processes.free_port(), state / "supabase.log"
    _write_project(state, port, confirms=confirms)
    environment = {"PATH": f"{installs.NODE.parent}:{os.defpath}", "HOME": str(state), "LC_ALL": "C.UTF-8"}
    command: list[str | Path] = [installs.NODE, installs.SUPABASE, "--no-telemetry"]
    subprocess.run([*command, "migration", "up"], check=True, capture_output=True, env=environment, cwd=state)
    program = processes.start([*command, "start", "--no-admin"], log=log, env=environment, cwd=state)
    with processes.running(program):
        server = SupabaseServer(port, log, program)
        _wait(server)
        yield server


def _write_project(state: Path, port: int, *, confirms: bool) -> None:
    project = state / "supabase"
    (project / "migrations").mkdir(parents=True)
    (project / "migrations" / "20261120000000_notes.sql").write_text(_TABLES)
    (project / "config.toml").write_text(
        f"""
[api]
port = {port}
[db]
driver = "sqlite-postgres"
url = "file:./supabase/data.db"
[auth]
enabled = true
jwt_secret = "{JWT_SECRET}"
jwt_expiry = 3600
enable_signup = true
publishable_key = "{ANON_KEY}"
secret_key = "{SERVICE_KEY}"
[auth.email]
enable_confirmations = {str(confirms).lower()}
"""
    )


def _wait(server: SupabaseServer) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{server.url}/auth/v1/health", headers={"apikey": ANON_KEY})  # noqa: S310 - http
    end = time.monotonic() + _READY
    while time.monotonic() < end and server.program.running:
        with contextlib.suppress(OSError), opener.open(request, timeout=2):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the Supabase server did not get ready; the end of its log:\n{processes.tail(server.log)}")
