"""Connections by which answers come in: so small that a client who takes nothing soon holds up whoever answers."""

import socket
from typing import Final

import aiohttp

READ_BUFFER: Final = 16_384
"""Bytes read ahead per stream; aiohttp stops reading at twice that, so a slow client slows whoever sends."""
RECEIVE_BUFFER: Final = 32_768
"""The kernel's share of the same bound: a stalled client's stream takes 208 KiB of Letta's bytes in all, kernel
included (measured; 372 with twice of both)."""


def receiving(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket for a connection to this address."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return made
