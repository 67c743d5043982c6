"""The names of functions inside namespaces: two for the client, one for the agent."""

import hashlib

import msgspec

from gateway.translation.tools import LONGEST_NAME

_DIGEST = 8


class FunctionName(msgspec.Struct, frozen=True):
    """A tool as the client names it: a function inside a namespace, or a custom tool, which takes a text alone."""

    namespace: str
    name: str
    is_custom: bool = False


def flat_name(name: str, namespace: str | None) -> str:
    """Return the one name that an agent knows a function by; long ones are cut and told apart by a hash."""
    if not namespace:
        return name
    flat = f"{namespace}__{name}"
    if len(flat) <= LONGEST_NAME:
        return flat
    digest = hashlib.sha256(flat.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    return f"{flat[: LONGEST_NAME - _DIGEST - 1]}_{digest}"
