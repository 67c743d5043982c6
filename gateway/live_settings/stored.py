"""Changed settings in the database: kept over a restart, and the same for all gateways that share it."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from msgspec import UNSET, UnsetType
from sqlalchemy import bindparam, delete, select

from gateway.errors import InvalidRequest, SettingChanged
from gateway.live_settings.current import EDITABLE, Change, LiveSettings
from gateway.settings import Setting, SettingError, show_value, with_change
from gateway.storage.engine import Database
from gateway.storage.tables import changed_settings
from gateway.storage.upsert import upsert

LONGEST: Final = 10_000
"""Characters of a value."""

_CHANGED_AT: Final = (
    select(changed_settings.c.changed_at).where(changed_settings.c.field == bindparam("of")).with_for_update()
)
_DELETE: Final = delete(changed_settings).where(changed_settings.c.field == bindparam("gone"))


class StoredSettings:
    """Changes settings: here at once, in other gateways when they next ``load``."""

    def __init__(self, live: LiveSettings, database: Database, now: Callable[[], float] = time.time) -> None:
        self._live = live
        self._database = database
        self._now = now
        self._one_at_a_time = asyncio.Lock()

    async def load(self) -> None:
        """Have what is stored hold; raises ``StorageUnavailable``."""
        async with self._one_at_a_time:
            self._live.take(await self._read())

    async def change(
        self, name: str, text: str, client: str | None = None, *, seen: float | UnsetType | None = UNSET
    ) -> Setting:
        """Give a setting another value, and tell the log who did.

        ``seen`` is when it was last changed for all that the operator knows, None where it was not; unset: whenever.
        Raises ``InvalidRequest``, ``SettingChanged`` and ``StorageUnavailable``.
        """
        setting = editable(name)
        if not text.strip() and show_value(setting.default):
            raise InvalidRequest(f"{name} is empty: write its value, or reset it to what is configured.", param="value")
        if len(text) > LONGEST:
            raise InvalidRequest(f"A value has {LONGEST} characters at most: shorten it.", param="value")
        async with self._one_at_a_time:
            try:
                changed = with_change(self._live.current, setting, text)
            except SettingError as error:
                raise InvalidRequest(str(error), param="value") from None
            change = Change(show_value(getattr(changed, setting.field)), self._now())
            row = {"field": setting.field, "value": change.value, "changed_at": change.changed_at}
            async with self._database.write() as connection:
                changed_at = (await connection.execute(_CHANGED_AT, {"of": setting.field})).scalar_one_or_none()
                if seen is not UNSET and changed_at != seen:
                    raise SettingChanged
                await connection.execute(upsert(connection.dialect, changed_settings), [row])
            self._live.take(await self._read(), client)
        return setting

    async def reset(self, name: str, client: str | None = None) -> Setting:
        """Have a setting be as it is configured, and tell the log who did.

        Raises ``InvalidRequest`` and ``StorageUnavailable``.
        """
        setting = editable(name)
        async with self._one_at_a_time:
            async with self._database.write() as connection:
                await connection.execute(_DELETE, {"gone": setting.field})
            self._live.take(await self._read(), client)
        return setting

    async def _read(self) -> dict[str, Change]:
        async with self._database.read() as connection:
            rows = (await connection.execute(select(changed_settings).order_by(changed_settings.c.field))).all()
        return {row.field: Change(row.value, row.changed_at) for row in rows}


def editable(name: str) -> Setting:
    """Return the setting of this name; raises ``InvalidRequest`` for one that cannot change here."""
    for setting in EDITABLE.values():
        if setting.row.env == name:
            return setting
    raise InvalidRequest(
        "This setting cannot be changed here: change it where it is configured, then start the gateway again.",
        param="name",
    )
