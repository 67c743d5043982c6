"""The settings as the operator's page shows them: no secret, and no password within a URL."""

import re
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from gateway.live_settings.current import LiveSettings
from gateway.settings import Setting, show_value, table

_PASSWORD: Final = re.compile(r"(?<=//)[^/@\s]*@")


class SettingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One setting: ``source`` tells where its value comes from, ``found`` by which name.

    Of a secret, ``value`` and ``configured`` are null and ``is_set`` tells whether it has one. ``configured`` is what
    holds once a change is taken back; ``changed_at`` is in UTC seconds.
    """

    name: str
    help: str
    value: str | None
    configured: str | None
    is_secret: bool
    is_set: bool
    is_editable: bool
    source: Literal["default", "environment", "credential", "file", "changed"]
    found: str | None
    changed_at: float | None
    choices: tuple[str, ...]


class SettingsAnswer(msgspec.Struct, frozen=True):
    """All settings, in the order of their table."""

    data: tuple[SettingAnswer, ...]


def settings_answer(live: LiveSettings) -> SettingsAnswer:
    """Return all settings as they hold now."""
    return SettingsAnswer(tuple(setting_answer(live, setting) for setting in table()))


def setting_answer(live: LiveSettings, setting: Setting) -> SettingAnswer:
    """Return one setting as it holds now."""
    value, configured = getattr(live.current, setting.field), getattr(live.configured, setting.field)
    change, origin = live.changes.get(setting.field), live.origins.get(setting.field)
    return SettingAnswer(
        name=setting.row.env,
        help=setting.row.help,
        value=None if setting.row.secret else _shown(value),
        configured=None if setting.row.secret else _shown(configured),
        is_secret=setting.row.secret,
        is_set=bool(value),
        is_editable=setting.row.live,
        source="changed" if change is not None else "default" if origin is None else origin.kind,
        found=None if origin is None else origin.name,
        changed_at=None if change is None else change.changed_at,
        choices=_choices(setting.type),
    )


def _shown(value: Any) -> str:
    return _PASSWORD.sub("***@", show_value(value))


def _choices(kind: Any) -> tuple[str, ...]:
    while get_origin(kind) is not Literal:
        arguments = get_args(kind)
        if not arguments or not hasattr(kind, "__metadata__"):
            return ()
        kind = arguments[0]
    return get_args(kind)
