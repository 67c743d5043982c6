"""What systemd is told of the process: that it serves, that it goes, and that its event loop still turns.

``sd_notify(3)`` in a few lines: datagrams to the socket that the environment names. The heart-beat depends on the event
loop and on nothing else: a gateway whose database, Redis or Letta is gone is not restarted, one that hangs is.
"""

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Final

import structlog

BEATS: Final = 2
"""Heart-beats in the time after which systemd takes the process for hung, as ``sd_watchdog_enabled(3)`` advises."""
AGAIN: Final = 0.1
"""Seconds until a message is sent again for which systemd had no room: to wait would stop the loop."""
_MICROS: Final = 1_000_000

_log: Final = structlog.get_logger("gateway.server")


class ServiceManager:
    """The service manager that started the process, if one did: where the environment names none, nothing is sent."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._period = _period(environ)
        # Opened once: a process that runs out of file descriptors is busy, not hung, and goes on beating.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        self._beating: asyncio.TimerHandle | None = None

    def starting(self, status: str) -> None:
        """Say what the start waits for: who restarts gateways one after the other waits too."""
        self._tell(f"STATUS={status}")

    def ready(self, status: str) -> None:
        """Say that the listeners accept, and begin to beat; called in the event loop that is to be watched."""
        self._tell(f"READY=1\nSTATUS={status}")
        if self._period is not None:
            self._beat(self._period)

    def stopping(self, seconds: float, status: str) -> None:
        """Say that the end has begun, and that it may take so many seconds, whatever the unit says."""
        self._tell(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * _MICROS)}\nSTATUS={status}")

    def close(self) -> None:
        """Beat no more."""
        if self._beating is not None:
            self._beating.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _beat(self, period: float) -> None:
        self._tell("WATCHDOG=1")
        self._beating = asyncio.get_running_loop().call_later(period, self._beat, period)

    def _tell(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), socket.MSG_DONTWAIT, self._address)
        except BlockingIOError:
            asyncio.get_running_loop().call_later(AGAIN, self._tell, message)
        except OSError as error:
            _log.warning(
                "the service manager cannot be told", message=message.split("=", maxsplit=1)[0], reason=str(error)
            )


def _address(name: str) -> str:
    """Return the socket's address as the kernel takes it; a name that begins with ``@`` is in no file system."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def _period(environ: Mapping[str, str]) -> float | None:
    """Return the seconds between heart-beats; None where none are expected, or of another process."""
    timeout, process = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not timeout.isdecimal() or int(timeout) == 0 or process not in ("", str(os.getpid())):
        return None
    return int(timeout) / _MICROS / BEATS
