"""The chain as data: which middleware stands where, and why."""

from importlib.metadata import EntryPoint, entry_points
from typing import Final

import msgspec

from gateway.settings import SettingError, Settings
from middleware.contract import ENTRY_POINTS, AiohttpMiddleware, Plugin

DEFAULT: Final = (
    "request_id",  # outermost: everything after it, its own log line included, carries the id
    "access_log",  # outside the boundary: it sees the status that the client sees
    "metrics",  # likewise
    "error_boundary",  # everything inside refuses by raising; here a failure becomes an answer
    "body_guard",  # refuses by the head alone what is never read; the body waits until a handler asks for it
    "auth",  # before the limits, which count by key
    "rate_limit",  # innermost: what was refused before does not use up anybody's share
)

REQUIRED: Final = frozenset({"error_boundary", "body_guard"})
"""Handlers rely on these: one answers their errors, the other holds their bodies."""


def build_chain(settings: Settings) -> list[AiohttpMiddleware]:
    """Return the middleware that the settings name, outermost first; raises ``SettingError``."""
    names = settings.middleware or DEFAULT
    _check_names(names, settings)
    known = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    return [_build(name, known, settings) for name in names]


def _check_names(names: tuple[str, ...], settings: Settings) -> None:
    if len(set(names)) != len(names):
        raise SettingError("LETTA_GATEWAY_MIDDLEWARE is wrong: a name stands in it twice.")
    missing = REQUIRED - set(names)
    if missing:
        raise SettingError(f"LETTA_GATEWAY_MIDDLEWARE is wrong: {', '.join(sorted(missing))} cannot be left out.")
    for name in settings.middleware_config:
        if name not in names:
            raise SettingError(f"LETTA_GATEWAY_MIDDLEWARE_CONFIG is wrong: {name} is not in the chain.")


def _build(name: str, known: dict[str, EntryPoint], settings: Settings) -> AiohttpMiddleware:
    if name not in known:
        raise SettingError(
            f"LETTA_GATEWAY_MIDDLEWARE is wrong: no middleware {name!r} is installed "
            f"(there are: {', '.join(sorted(known))})."
        )
    plugin: Plugin = known[name].load()
    try:
        config = msgspec.convert(settings.middleware_config.get(name, {}), plugin.Config)
    except msgspec.ValidationError as error:
        raise SettingError(f"LETTA_GATEWAY_MIDDLEWARE_CONFIG is wrong for {name}: {error}.") from None
    return plugin.build(config, settings)
