import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")
ROOMS = {path.parent for path in (*ROOT.glob("gateway/*/__init__.py"), *ROOT.glob("middleware/__init__.py"))}


def lint(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = (LINTER, "--config", config, "--no-cache")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_point_down() -> None:
    result = lint(ROOT / "setup.cfg", ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_every_room_has_a_contract() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    sources = "\n".join(config[name].get("source_modules", "") for name in config.sections())
    for room in ROOMS - {ROOT / "gateway" / "server"}:  # which may import everything
        assert ".".join(room.relative_to(ROOT).parts) in sources.split()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("gateway/translation/request.py", "import asyncio"),
        ("gateway/errors.py", "from gateway.settings import Settings"),
        ("gateway/handlers/models.py", "from gateway.letta.rest import RestBackend"),
        ("gateway/letta/frames.py", "from gateway import keys"),
        ("gateway/conversations/turns.py", "from gateway.letta import rest"),
        ("gateway/letta/backend.py", "import middleware.contract"),
        ("middleware/auth.py", "from gateway.server import cors"),
    ],
)
def test_import_that_points_up_is_found(tmp_path: Path, module: str, line: str) -> None:
    """The contracts are worth nothing unless they break."""
    for source in (*ROOT.glob("gateway/**/*.py"), *ROOT.glob("middleware/**/*.py"), ROOT / "setup.cfg"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    guilty = tmp_path / module
    guilty.write_text(guilty.read_text() + f"\n{line}\n")
    result = lint(tmp_path / "setup.cfg", tmp_path)
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout
