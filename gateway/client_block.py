"""Which addresses are one client's: a leaf, as both what counts requests and what counts passwords ask it."""

import ipaddress
from typing import Final

IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that are one client: whoever has one address has its whole /64."""


def client_block(address: str) -> str:
    """Return what counts as one client of an address: an IPv6 network, or the address itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))
    return address
