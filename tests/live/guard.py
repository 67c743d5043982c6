"""Keep one program running for as long as the process that asked for it lives, and not a moment longer.

    python -I -S guard.py [--signal N] [--user UID:GID] [--log FILE] [--remove FOLDER] -- program argument ...

The owner holds the guard's standard input open; when it is closed, be it by the owner's death, the guard stops the
program and all of its process group, and removes the folder. The first line of the guard's output is the program's
process id. It uses the standard library only, and runs in a session of its own: no Ctrl-C and no `kill` of the owner's
group reaches it.
"""

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PATIENCE = 5.0
_LOOK = 0.2
"""How often the guard looks whether the program has ended by itself, in seconds."""


def main() -> int:
    """Run the program until it ends or its owner goes away."""
    arguments = _parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    with arguments.log.open("ab") as log:
        program = subprocess.Popen(
            arguments.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: _before_exec(arguments.user),  # noqa: PLW1509 - there is one thread only
        )
    sys.stdout.write(f"{program.pid}\n")
    sys.stdout.flush()
    while program.poll() is None and not _owner_is_gone():
        pass
    _stop(program, arguments.signal)
    if arguments.remove:
        shutil.rmtree(arguments.remove, ignore_errors=True)
    return program.returncode


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--signal", type=int, default=int(signal.SIGKILL))
    parser.add_argument("--user")
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    parser.add_argument("--remove", type=Path)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def _before_exec(user: str | None) -> None:
    if user:
        uid, gid = map(int, user.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After the change of user, which would clear it: should the guard itself be killed, the program goes with it.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _owner_is_gone() -> bool:
    try:
        readable = select.select([0], [], [], _LOOK)[0]
        return bool(readable) and not os.read(0, 1024)
    except OSError:
        return True


def _stop(program: subprocess.Popen[bytes], how: int) -> None:
    if program.poll() is None:
        program.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(_PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


if __name__ == "__main__":
    sys.exit(main())
