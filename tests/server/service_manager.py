"""What systemd is to a service: a socket that it writes datagrams to."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final

import msgspec

PATIENCE: Final = 10.0


class Told(msgspec.Struct):
    """The listening side of ``NOTIFY_SOCKET``."""

    listening: socket.socket
    name: str

    async def next(self) -> dict[str, str]:
        """Wait for a datagram and return its assignments."""
        async with asyncio.timeout(PATIENCE):
            datagram = await asyncio.get_running_loop().sock_recv(self.listening, 4_096)
        return _assignments(datagram)

    def so_far(self) -> list[dict[str, str]]:
        """Return what has come and was not read."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(_assignments(self.listening.recv(4_096)))
        return found


def _assignments(datagram: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in datagram.decode().split("\n"))  # type: ignore[misc, unused-ignore]


@contextlib.contextmanager
def told(name: str) -> Iterator[Told]:
    """Listen under a name as ``NOTIFY_SOCKET`` holds it, a path or ``@`` and anything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        listening.setblocking(False)  # noqa: FBT003 - the socket API's own signature
        yield Told(listening, name)
