"""Gateways that share a database: each gives signs of life, so that what one leaves behind is another's to settle.

Whether a sign is new is told by its value alone, and how long there was none by the reader's own monotonic clock: no
two clocks are compared, and none is trusted not to jump. Silence counts only while the reader itself can be heard: a
database that was away is no other gateway's silence.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import structlog
from sqlalchemy import bindparam, delete, select

from gateway.errors import StorageUnavailable
from gateway.storage.engine import Database
from gateway.storage.tables import instances
from gateway.storage.upsert import upsert

BEAT: Final = 10.0
"""Seconds between two signs of life."""
SILENT: Final = 90.0
"""Seconds without one after which a gateway is taken for dead: a database may be away for a while."""

_log: Final = structlog.get_logger("gateway.accounts")
_BURY: Final = delete(instances).where(instances.c.id == bindparam("silent"), instances.c.seen_at == bindparam("sign"))


class _Seen(NamedTuple):
    sign: float
    since: float


class Instances:
    """The gateways of one database, seen by one of them, whose name is ``id``: a new one for each process.

    One that ``should_be_alone``, as it shares nothing but the database, tells the operator of others.
    """

    def __init__(
        self,
        database: Database,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        *,
        should_be_alone: bool = False,
    ) -> None:
        self.id = instance
        self._should_be_alone = should_be_alone and database.is_shared
        self._told_of: set[str] = set()
        self._database = database
        self._clock = clock
        self._now = now
        self._seen: dict[str, _Seen] = {}
        self._was_away = False

    async def beat(self) -> None:
        """Give a sign of life; raises ``StorageUnavailable``."""
        row = {"id": self.id, "seen_at": self._now()}
        with self._noticing_absence():
            async with self._database.write() as connection:
                await connection.execute(upsert(connection.dialect, instances), [row])
        if self._should_be_alone:
            before = self._seen
            await self._look()
            self._tell_of_others(before)

    def _tell_of_others(self, before: dict[str, _Seen]) -> None:
        """Tell once of each other gateway that gave a sign since the look before: dead ones have left theirs."""
        for name, seen in self._seen.items():
            is_alive = bool(before) and (name not in before or before[name].sign != seen.sign)
            if is_alive and name != self.id and name not in self._told_of:
                self._told_of.add(name)
                _log.error(
                    "another gateway uses this database, and they share no Redis: turns of one chat may overlap until "
                    "LETTA_GATEWAY_REDIS_URL of each is the same, or the others are stopped",
                    other=name,
                )

    async def leave(self) -> None:
        """Say that this gateway is no more; raises ``StorageUnavailable``."""
        async with self._database.write() as connection:
            await connection.execute(delete(instances).where(instances.c.id == self.id))

    async def gone(self, among: Iterable[str]) -> set[str]:
        """Return which of these gateways are no more; raises ``StorageUnavailable``.

        Where the database is this gateway's alone, all others are; elsewhere those that left, and those that gave no
        sign of life for ``SILENT`` seconds since they were first looked at.
        """
        others = set(among) - {self.id}
        if not self._database.is_shared or not others:
            return others
        await self._look()
        return {other for other in others if other not in self._seen or self._is_dead(other)}

    async def bury(self) -> None:
        """Forget gateways that are no more; raises ``StorageUnavailable``."""
        await self._look()
        silent = [name for name in self._seen if name != self.id and self._is_dead(name)]
        if silent:
            rows = [{"silent": name, "sign": self._seen[name].sign} for name in sorted(silent)]
            async with self._database.write() as connection:
                await connection.execute(_BURY, rows)

    async def _look(self) -> None:
        with self._noticing_absence():
            async with self._database.read() as connection:
                rows = (await connection.execute(select(instances.c.id, instances.c.seen_at))).all()
        now, before = self._clock(), {} if self._was_away else self._seen
        self._was_away = False
        signs: dict[str, float] = {row.id: row.seen_at for row in rows}
        self._seen = {
            name: before[name] if name in before and before[name].sign == sign else _Seen(sign, now)
            for name, sign in signs.items()
        }

    @contextlib.contextmanager
    def _noticing_absence(self) -> Iterator[None]:
        try:
            yield
        except StorageUnavailable:
            self._was_away = True
            raise

    def _is_dead(self, other: str) -> bool:
        return not self._database.is_shared or self._clock() - self._seen[other].since >= SILENT
