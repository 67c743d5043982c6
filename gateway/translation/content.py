"""Texts and images of a request -> the parts of what an agent is told; each refusal names the field at fault."""

import binascii
import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

from gateway.errors import InvalidRequest
from gateway.translation.agent_turn import ImageData, ImageUrl

IMAGE_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})

LEFT_OUT: Final = "[An image or a file, left out: a tool's result is text here.]"
"""What stands for such a part of a result: refusing it would end the chat for good, as clients send it ever again."""

_COMMON_NAMES: Final = {"image/jpg": "image/jpeg"}


def text(value: str, path: str) -> str:
    """Return a text that says something; raises ``InvalidRequest`` where it is blank."""
    if not value.strip():
        raise InvalidRequest(f"'{path}' is empty: an agent is not asked nothing.", param=path)
    return storable(value, path)


def storable(value: str, path: str) -> str:
    """Return a text that databases take; raises ``InvalidRequest`` where it holds a NUL character."""
    if "\0" in value:
        raise InvalidRequest(f"'{path}' contains a NUL character, which cannot be stored: remove it.", param=path)
    return value


def replaced(value: str) -> str:
    """Return a text as databases take it: NUL characters and half surrogates become U+FFFD.

    For what machines wrote, and clients send ever again.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value.replace("\0", "\ufffd")


def image(url: str, path: str) -> ImageData | ImageUrl:
    """Return an image by its data: URL or its public https: URL."""
    if url.startswith("data:"):
        return _inline_image(url, path)
    if not _is_public_https(url):
        raise InvalidRequest(
            f"Invalid '{path}': expected a data: URL with base64 data, or a public https: URL.",
            param=path,
            code="invalid_image_url",
        )
    return ImageUrl(url)


def _inline_image(url: str, path: str) -> ImageData:
    header, comma, data = url[len("data:") :].partition(",")
    media_type, _, encoding = header.partition(";")
    media_type = _COMMON_NAMES.get(media_type.strip().lower(), media_type.strip().lower())
    if not comma or encoding.strip().lower() != "base64" or media_type not in IMAGE_TYPES:
        raise InvalidRequest(
            f"Invalid '{path}': expected data:<type>;base64,<data> with a type of {', '.join(sorted(IMAGE_TYPES))}.",
            param=path,
            code="invalid_image_format",
        )
    try:
        empty = not binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError):
        empty = True
    if empty:
        raise InvalidRequest(f"Invalid '{path}': the data is not base64.", param=path, code="invalid_base64")
    return ImageData(media_type, data)


def _is_public_https(url: str) -> bool:
    """Tell whether Letta may be asked to fetch this: it fetches from where it runs, inside somebody's network.

    A name that resolves to a private address cannot be told from here; an address or a local name can.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        _ = parts.port
    except ValueError:
        return False
    if parts.scheme.lower() != "https" or parts.username is not None or not url.isprintable() or " " in url:
        return False
    try:
        return _is_public_address(ipaddress.ip_address(host))
    except ValueError:
        return _PUBLIC_NAME.fullmatch(host) is not None and host.rpartition(".")[2] not in _LOCAL_NAMES


# Names with a dot and a letter at the head of the last label: no local name, no address in disguise (0x7f.1), and no
# characters that one reader takes for another's dot, slash or digit.
_PUBLIC_NAME: Final = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z][a-z0-9-]*")
_LOCAL_NAMES: Final = frozenset({"local", "internal", "localhost", "localdomain"})


def _is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tell whether an address is everybody's, and hides no IPv4 address (mapped, NAT64 and the like are reserved)."""
    if isinstance(address, ipaddress.IPv6Address) and address.sixtofour is not None:
        return False
    return address.is_global and not address.is_reserved and not address.is_multicast
