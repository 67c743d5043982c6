"""The file that SQLite is given: for our own eyes only, and told apart from another of its name."""

import os
from pathlib import Path


def prepare(path: Path) -> None:
    """Make the file and its folder, for our own eyes only, where they are missing; raises ``OSError``.

    A file that is there is not opened: closing it again would drop the locks that this process has on it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(0o600)


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells this file from another of the same name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
