"""What a release is made of (S16): every part is locked by its hash, named in the bill of materials, and audited."""

import contextlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

import msgspec
import pytest

from tests.audit import audit
from tests.live.processes import free_port

pytestmark = pytest.mark.services

ROOT: Final = Path(__file__).parents[2]
RUNTIME: Final = ROOT / "deploy" / "locks" / "runtime.txt"
_REQUIREMENT: Final = re.compile(
    r"^([a-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+)((?: ; [^\\\n]+)?) \\\n"  # name, version, where it is wanted
    r"((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    re.MULTILINE,
)


class Hash(msgspec.Struct):
    alg: str
    content: str


class Reference(msgspec.Struct):
    hashes: list[Hash]


class Component(msgspec.Struct):
    name: str
    version: str
    purl: str
    references: list[Reference] = msgspec.field(name="externalReferences")


class Bill(msgspec.Struct):
    format: str = msgspec.field(name="bomFormat")
    components: list[Component] = []


@pytest.mark.parametrize("lock", sorted((ROOT / "deploy" / "locks").glob("*.txt")), ids=lambda path: path.name)
def test_every_line_of_a_lock_carries_hashes(lock: Path) -> None:
    assert re.sub(r"^#.*\n", "", _REQUIREMENT.sub("", lock.read_text()), flags=re.MULTILINE).strip() == ""


def test_bill_of_materials_names_what_is_locked_with_its_hashes() -> None:
    made = subprocess.run(["make", "sbom"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert made.returncode == 0, made.stderr
    bill = msgspec.json.decode((ROOT / "build" / "sbom.cdx.json").read_bytes(), type=Bill)
    locked = {
        (name, version): set(re.findall(r"sha256:([0-9a-f]{64})", hashes))
        for name, version, _, hashes in _REQUIREMENT.findall(RUNTIME.read_text())
    }
    assert len(locked) > 30
    named = {
        (each.name, each.version): {found.content for reference in each.references for found in reference.hashes}
        for each in bill.components
    }
    assert bill.format == "CycloneDX"
    assert named == locked
    assert all(each.purl == f"pkg:pypi/{each.name}@{each.version}" for each in bill.components)


# The audit -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def advisories(status: HTTPStatus, body: bytes) -> Iterator[str]:
    """Answer for PyPI for as long as the context; the value is where to ask."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's own name
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.mark.parametrize("found", [0, 1])
def test_what_the_advisories_say_counts(found: int) -> None:
    command = [sys.executable, "-c", f"raise SystemExit({found})"]
    with advisories(HTTPStatus.OK, b'{"vulnerabilities": [{"id": "CVE"}]}') as known:
        assert [audit(known, command, may_be_unreachable=tolerant) for tolerant in (True, False)] == [found, found]


@pytest.mark.parametrize("body", [None, b'{"info": {}}', b"<html>"])
def test_advisories_that_cannot_be_asked_are_told_of(body: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    never = ["/no/such/program"]
    with contextlib.ExitStack() as stack:
        known = f"http://127.0.0.1:{free_port()}/"
        if body is not None:
            known = stack.enter_context(advisories(HTTPStatus.OK, body))
        assert [audit(known, never, may_be_unreachable=tolerant) for tolerant in (True, False)] == [0, 1]
    first, second = capsys.readouterr().err.splitlines()
    assert first == second
    assert first.startswith("audit: PyPI's advisories cannot be asked (")


def test_advisories_that_are_not_kept_there(capsys: pytest.CaptureFixture[str]) -> None:
    with advisories(HTTPStatus.NOT_FOUND, b"") as known:
        assert audit(known, ["/no/such/program"], may_be_unreachable=True) == 0
    assert "404" in capsys.readouterr().err


def test_ci_audits() -> None:
    assert "make audit MAY_BE_UNREACHABLE=1\n" in (ROOT / ".ci" / "run").read_text("utf-8")
