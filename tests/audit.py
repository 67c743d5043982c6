"""Look for known vulnerabilities in what a release is made of: `python -m tests.audit [--may-be-unreachable]`.

PyPI's advisories are first asked about a release that is known to be vulnerable. Where they do not say so, they cannot
be relied on: that fails, or with `--may-be-unreachable` is told in one line. What they then say of the locked releases
always counts.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

import msgspec

ROOT: Final = Path(__file__).parents[1]
KNOWN: Final = "https://pypi.org/pypi/requests/2.31.0/json"
"""Where PyPI tells of CVE-2024-35195."""
AUDIT: Final = (
    str(ROOT / ".cache" / "audits" / "bin" / "pip-audit"),
    *("--strict", "--disable-pip", "--require-hashes", "-r", str(ROOT / "deploy" / "locks" / "runtime.txt")),
)
_PATIENCE: Final = 30.0


class _Release(msgspec.Struct):
    vulnerabilities: list[msgspec.Raw] = []


def unreachable(known: str = KNOWN) -> str | None:
    """Say why the advisories cannot be relied on, if so."""
    try:
        with urlopen(known, timeout=_PATIENCE) as answer:  # noqa: S310 - the address is of here
            told = msgspec.json.decode(answer.read(), type=_Release).vulnerabilities
    except (URLError, OSError, msgspec.MsgspecError) as error:
        return str(error)
    return None if told else "nothing is said of a release that is known to be vulnerable"


def audit(known: str = KNOWN, command: Sequence[str] = AUDIT, *, may_be_unreachable: bool = False) -> int:
    """Return the exit status."""
    if reason := unreachable(known):
        sys.stderr.write(f"audit: PyPI's advisories cannot be asked ({reason}): nothing was looked for\n")
        return 0 if may_be_unreachable else 1
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(audit(may_be_unreachable="--may-be-unreachable" in sys.argv[1:]))
