"""What a release is made of (S16): every part is locked by its hash, and the bill of materials names all of them."""

import re
import subprocess
from pathlib import Path
from typing import Final

import msgspec
import pytest

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
