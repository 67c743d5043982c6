"""Who is asking, by address: forwarded headers are believed only from trusted networks.

``X-Forwarded-For`` is read from the right, as everything left of the last untrusted hop is the client's own text
(https://developer.mozilla.org/docs/Web/HTTP/Headers/X-Forwarded-For#selecting_an_ip_address).
"""

import ipaddress
import re
from functools import lru_cache
from typing import Final, TypeAlias

from aiohttp import web

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORT: Final = re.compile(r"(?:([0-9.]+)|\[([0-9a-fA-F:.]+)\])(?::[0-9]{1,5})?")


class TrustedNetworks:
    """The networks of proxies and scrapers."""

    def __init__(self, networks: tuple[str, ...]) -> None:
        self._networks: list[Network] = [ipaddress.ip_network(network) for network in networks]

    def client_of(self, request: web.BaseRequest) -> str:
        """Return the address of the client behind all trusted proxies; empty where it cannot be known."""
        client = _parse(request.remote or "")
        if client is not None and client in self and _forwarded_otherwise(request):
            return ""
        hops = [hop.strip() for hop in ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")]
        while client is not None and client in self and hops:
            hop = hops.pop()
            # A proxy forwards for somebody: where it does not say for whom readably, that is not the proxy itself.
            client = _parse(hop) if hop else client
        return "" if client is None else str(client)

    def __contains__(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)

    def trusts(self, address: str) -> bool:
        """Tell whether an address is in a trusted network."""
        parsed = _parse(address)
        return parsed is not None and parsed in self


def _forwarded_otherwise(request: web.BaseRequest) -> bool:
    """Tell whether a proxy names its client, but not by the header that is read here."""
    headers = request.headers
    return "X-Forwarded-For" not in headers and ("Forwarded" in headers or "X-Real-IP" in headers)


@lru_cache(maxsize=4_096)  # the same few proxies and clients, over and over
def _parse(text: str) -> Address | None:
    """Read an address; some proxies add the port."""
    with_port = _WITH_PORT.fullmatch(text)
    try:
        parsed = ipaddress.ip_address((with_port[1] or with_port[2]) if with_port else text)
    except ValueError:
        return None
    if "%" in text:
        return None  # a zone is any text at all, and names no client
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
