"""Run pytest, then what failed once more, alone: `python -m tests.run` takes pytest's arguments.

Many tests hold real programs to real deadlines. Beside two other workers on two busy cores one of thousands misses its
deadline now and then. What fails alone too is broken, and what passes alone is named at the end, so that it is mended.
CPython's own test runner does the same (`python -m test --rerun`).
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

_MOST: Final = 6
"""Failures that a busy machine explains; with more of them something is broken."""


class _Failures:
    """A plug-in that keeps which tests failed, by the name that a later run knows them by."""

    def __init__(self) -> None:
        self.tests: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tests[_without_group(report.nodeid)] = None


def _without_group(name: str) -> str:
    """The test's own name: xdist appends "@" and the group, a path or a word (`tests/conftest.py`)."""
    path = str(Path(name.partition("::")[0]).resolve())
    name = name.removesuffix(f"@{path}").removesuffix("@v1")
    # Schemathesis makes its tests, named by method and path, while they are collected: pytest knows their function.
    return name.partition("[")[0] if " /" in name else name


def main(arguments: list[str]) -> int:
    failures = _Failures()
    try:
        code = pytest.main(arguments, plugins=[failures])
    except Exception:
        if not failures.tests:
            raise
        code = pytest.ExitCode.TESTS_FAILED  # what a test that failed did not close is told of at the end, as an error
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(failures.tests) <= _MOST:
        return int(code)
    print(f"\nOnce more, alone: {len(failures.tests)} that failed beside others", flush=True)
    again = subprocess.run([sys.executable, "-m", "pytest", *failures.tests], check=False)
    if again.returncode == pytest.ExitCode.OK:
        print("Failed beside others and passed alone:", *failures.tests, sep="\n  ", flush=True)
    return again.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
