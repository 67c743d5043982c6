import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"


def says_something(source: Path) -> bool:
    """Tell whether a file holds more than its docstring."""
    body = ast.parse(source.read_text("utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def pair_of(source: Path) -> Path:
    """Return where the test of a source stands: the same folder below ``tests``, ``gateway`` left out."""
    parts = source.relative_to(ROOT).parts
    folders = parts[1:-1] if parts[0] == "gateway" else parts[:-1]
    return TESTS.joinpath(*folders, f"test_{source.stem.strip('_')}.py")


SOURCES = sorted(
    source
    for package in ("gateway", "middleware")
    for source in (ROOT / package).rglob("*.py")
    if source.name != "__init__.py" or says_something(source)
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_source_has_its_test(source: Path) -> None:
    assert pair_of(source).is_file(), f"no {pair_of(source).relative_to(ROOT)}"


def test_names() -> None:
    assert pair_of(ROOT / "gateway/__main__.py") == TESTS / "test_main.py"
    assert pair_of(ROOT / "gateway/letta/rest.py") == TESTS / "letta/test_rest.py"
    assert pair_of(ROOT / "middleware/auth.py") == TESTS / "middleware/test_auth.py"


def test_no_two_sources_share_a_test() -> None:
    assert len({pair_of(source) for source in SOURCES}) == len(SOURCES)
