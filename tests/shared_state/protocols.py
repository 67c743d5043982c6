"""What a protocol asks of those that have it."""

import inspect
from collections.abc import Callable
from typing import Any


def asked_of(protocol: type) -> dict[str, Callable[..., Any]]:
    """Return a protocol's methods by their names."""
    return {name: method for name, method in vars(protocol).items() if inspect.isfunction(method) and name[0] != "_"}
