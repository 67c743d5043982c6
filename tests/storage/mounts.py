"""A small file system of its own, to fill up and to make read-only; needs the right to mount."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Volume:
    """A mounted file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make_read_only(self) -> None:
        _run("mount", "-o", "remount,ro", self.path)

    def fill(self) -> Path:
        """Take all the space that is left, and return the file that does."""
        filler = self.path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4_096))
        return filler


@contextlib.contextmanager
def mounted(parent: Path, size: str) -> Iterator[Volume]:
    path = parent / "volume"
    path.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    try:
        yield Volume(path)
    finally:
        _run("umount", "--lazy", path)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
