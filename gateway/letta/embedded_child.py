"""What becomes the local Letta: a process that dies with its parent, whatever kills that.

Run as ``python -m gateway.letta.embedded_child PARENT ARGUMENT...``; Letta's launcher then replaces the process, so its
id stays. Letta watches its parent too, but only every few seconds.
"""

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Tie this process to its parent, and become Letta."""
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be watched
        sys.exit(0)
    from letta_code import main as letta  # noqa: PLC0415 - the extra 'embedded': it is there when this runs

    letta()


if __name__ == "__main__":
    main()
