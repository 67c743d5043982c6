"""The settings as they are now: those that were configured, under the changes that the operator made since.

There is one place for them, and whoever depends on a setting that can change asks it for each request. ``Settings``
itself stays frozen: a change replaces it as a whole.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeAlias

import msgspec
import structlog

from gateway.audit_log import audit_log
from gateway.settings import Origin, Setting, SettingError, Settings, key_owner, show_value, table, with_change

EDITABLE: Final = {setting.field: setting for setting in table() if setting.row.live}
"""The settings that can change, by their fields."""

Hear: TypeAlias = Callable[[Settings], None]
"""Called with the new settings after each change."""

_log: Final = structlog.get_logger("gateway.settings")
_audit: Final = audit_log()


class Change(msgspec.Struct, frozen=True):
    """A stored change: the value as the environment would hold it, and when it was made, in UTC seconds."""

    value: str
    changed_at: float


class LiveSettings:
    """What holds now; ``configured`` is what was read at the start, ``origins`` tell where it came from."""

    def __init__(self, configured: Settings, origins: Mapping[str, Origin] | None = None) -> None:
        self.configured: Final = configured
        self.origins: Final = dict(origins or {})
        self.changes: Mapping[str, Change] = {}
        self._current = configured
        self._hears: list[Hear] = []

    @property
    def current(self) -> Settings:
        """Return the settings that hold now."""
        return self._current

    def key_owners(self) -> tuple[str, ...]:
        """Return what the holders of the API keys are called."""
        return tuple(key_owner(key) for key in self.configured.api_keys)

    def on_change(self, hear: Hear) -> None:
        """Have somebody told who cannot ask for each request."""
        self._hears.append(hear)

    def take(self, changes: Mapping[str, Change], client: str | None = None) -> None:
        """Have these changes hold, and no others; what differs from before is written to the log.

        ``client`` is the address of whoever makes the change; None where it is read from the database.
        """
        before, settings = self._current, self.configured
        # Others may be there for another version of the gateway, which shares the database.
        known = {field: change for field, change in changes.items() if field in EDITABLE}
        for field, change in known.items():
            settings = self._changed(settings, field, change)
        self.changes = known
        self._current = settings
        differences = list(_differences(before, settings))
        for setting, old, new in differences:
            by = {} if client is None else {"client": client}
            _audit.info("setting changed", setting=setting.row.env, old=old, new=new, **by)
        if differences:
            for hear in self._hears:
                hear(settings)

    def _changed(self, settings: Settings, field: str, change: Change) -> Settings:
        """Return the settings with a change; without it where it does not fit what is configured now."""
        setting = EDITABLE[field]
        try:
            return with_change(settings, setting, change.value)
        except SettingError as error:
            if self.changes.get(field) != change:
                _log.warning("stored setting left out", setting=setting.row.env, reason=str(error))
            return settings


def _differences(before: Settings, after: Settings) -> Iterator[tuple[Setting, str, str]]:
    for field, setting in EDITABLE.items():
        old, new = show_value(getattr(before, field)), show_value(getattr(after, field))
        if old != new:
            yield setting, old, new
