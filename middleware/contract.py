"""What a middleware is to the gateway.

A middleware is a module-level object with a ``name``, a ``Config`` (a msgspec Struct that refuses unknown keys) and a
``build(config, settings)`` that returns an aiohttp middleware. It is found by the entry-point group
``letta_gateway.middleware`` and put into the chain by its name (``LETTA_GATEWAY_MIDDLEWARE``); its Config is read from
``LETTA_GATEWAY_MIDDLEWARE_CONFIG`` or the TOML table ``[middleware_config.NAME]``. Built-ins come in by the same door.

Observers (request id, log, metrics) stand outside ``error_boundary`` and see the final status; gates stand inside and
refuse by raising an error of ``gateway.errors``. ``gateway.keys`` names what a middleware may read of a request.
"""

from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

import msgspec
from aiohttp.typedefs import Handler
from aiohttp.typedefs import Middleware as AiohttpMiddleware

from gateway.settings import Settings

__all__ = ["ENTRY_POINTS", "AiohttpMiddleware", "Handler", "Middleware", "NoConfig", "Plugin"]

ENTRY_POINTS: Final = "letta_gateway.middleware"

C = TypeVar("C", bound=msgspec.Struct)
C_contra = TypeVar("C_contra", bound=msgspec.Struct, contravariant=True)


class Plugin(Protocol):
    """What the chain asks of an entry point; ``Middleware`` is the easy way to be one."""

    @property
    def name(self) -> str:
        """The name by which settings put it into the chain."""
        ...

    @property
    def Config(self) -> type[msgspec.Struct]:  # noqa: N802 - it is a class
        """The type of its configuration, unknown keys refused."""
        ...

    @property
    def build(self) -> Callable[..., AiohttpMiddleware]:
        """Return the aiohttp middleware for a Config and the gateway's settings."""
        ...


class NoConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The Config of a middleware that needs none of its own."""


class Middleware(Generic[C]):
    """A plug-in made of its parts."""

    def __init__(self, name: str, config: type[C], build: Callable[[C, Settings], AiohttpMiddleware]) -> None:
        self.name = name
        self.Config = config
        self.build = build
