"""Users are deleted: sessions and keys first, then what they have under way and what others keep of them, then rows.

What is begun is written down, so that a sweep goes on where a step failed or the process died; each step may be taken
twice, and one that fails holds up no other. What a request that was under way still writes goes by a second pass soon
after. The note stays for eight days: an access token that still holds elsewhere makes no new account meanwhile.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import structlog
from sqlalchemy import Column, Row, delete, or_, select, update

from gateway.accounts.agents import PersonalAgents
from gateway.accounts.billing.protocol import Billing
from gateway.accounts.errors import DeletionUnfinished
from gateway.accounts.history import delete_messages
from gateway.accounts.identity.protocol import IdentityProvider
from gateway.accounts.identity.sessions import end_sessions
from gateway.accounts.profiles import Profiles
from gateway.accounts.stopping import Stopping
from gateway.errors import GatewayError
from gateway.storage.engine import Connection, Database
from gateway.storage.tables import (
    deletions,
    ended_sessions,
    messages,
    outcomes,
    passwords,
    pins,
    responses,
    sessions,
    spending,
    turns,
    usage_metrics,
    user_keys,
    user_profiles,
    waiting_calls,
)
from gateway.storage.text import fits
from gateway.storage.upsert import insert_into

KEEP: Final = 691_200.0
"""Seconds for which it is remembered that a user was deleted: a day more than any access token of Supabase holds."""
PATIENCE: Final = 60.0
"""Seconds after which a sweep takes over what was begun."""
FURTHER_PASSES: Final = 2
"""Sweeps that look once more for what requests that were under way wrote since."""
AT_ONCE: Final = 20
"""Users whom one sweep sees to."""

CREDENTIALS: Final[tuple[Column[Any], ...]] = (user_keys.c.user_id, passwords.c.user_id)
"""By what a user comes in, besides sessions."""
BELONGINGS: Final[tuple[Column[Any], ...]] = (
    messages.c.user_id,
    turns.c.owner,
    usage_metrics.c.owner,
    spending.c.owner,
    pins.c.owner,
    waiting_calls.c.owner,
    outcomes.c.owner,
    responses.c.owner,
    ended_sessions.c.user_id,
)
"""What is a user's, besides the profile."""

_log: Final = structlog.get_logger("gateway.accounts")


class Deletion:
    """Deletes users; ``forget`` drops what is remembered of a user's credentials in this process."""

    def __init__(
        self,
        *,
        database: Database,
        identity: IdentityProvider,
        profiles: Profiles,
        agents: PersonalAgents,
        billing: Billing,
        stopping: Stopping,
        forget: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._identity = identity
        self._profiles = profiles
        self._agents = agents
        self._billing = billing
        self._stopping = stopping
        self._further_passes: dict[str, int] = {}
        self._forget = forget
        self._now = now

    async def delete(self, user_id: str) -> None:
        """Delete a user; raises ``DeletionUnfinished`` where the rest must wait, ``StorageUnavailable`` before that."""
        try:
            await self._begin(user_id)
        finally:  # it may be written all the same
            self._forget(user_id)
        try:
            await self._finish(user_id)
        except GatewayError as error:
            _log.warning("user not deleted yet", user=user_id, code=error.code)
            raise DeletionUnfinished from error
        finally:
            self._further_passes[user_id] = FURTHER_PASSES

    async def is_deleted(self, user_id: str) -> bool:
        """Tell whether a user is being deleted, or was lately; raises ``StorageUnavailable``."""
        if not fits(user_id):
            return False
        statement = select(deletions.c.user_id).where(deletions.c.user_id == user_id)
        async with self._database.read() as connection:
            return (await connection.execute(statement)).one_or_none() is not None

    async def sweep(self, now: float) -> None:
        """Go on with what was left unfinished, and forget what is long done; raises ``StorageUnavailable``."""
        await self._pass_again()
        is_left = deletions.c.ended_at.is_(None) & (deletions.c.begun_at < now - PATIENCE)
        is_old = deletions.c.ended_at < now - KEEP
        statement = select(deletions).where(or_(is_left, is_old)).order_by(deletions.c.begun_at).limit(AT_ONCE)
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        for row in rows:
            try:
                await self._finish(row.user_id)
                if row.ended_at is not None:
                    await self._drop_note(row.user_id)
            except GatewayError as error:
                _log.warning("user not deleted yet", user=row.user_id, code=error.code)

    async def _begin(self, user_id: str) -> None:
        """Write down that the user is to go, and lock them out: both or nothing."""
        async with self._database.write() as connection:
            profile = select(user_profiles.c.letta_agent_id).where(user_profiles.c.id == user_id)
            agent_id = (await connection.execute(profile)).scalar_one_or_none()
            note = {"user_id": user_id, "letta_agent_id": agent_id, "begun_at": self._now(), "ended_at": None}
            insert = insert_into(connection.dialect, deletions).values(note).on_conflict_do_nothing()
            await connection.execute(insert)
            # An identity service's access token may hold for an hour: nobody comes in by it while the profile stands.
            is_user = user_profiles.c.id == user_id
            await connection.execute(update(user_profiles).where(is_user).values(is_blocked=True))
            await _delete_credentials(connection, user_id)

    async def _finish(self, user_id: str) -> None:
        """Delete what there still is; the profile last, once nobody else keeps anything of the user."""
        await self._stopping.stop(user_id)
        failures = [failure async for failure in self._failures(user_id)]
        await self._delete_rows(user_id)
        for failure in failures:
            raise failure
        async with self._database.write() as connection:
            await connection.execute(delete(user_profiles).where(user_profiles.c.id == user_id))
            is_open = (deletions.c.user_id == user_id) & deletions.c.ended_at.is_(None)
            await connection.execute(update(deletions).where(is_open).values(ended_at=self._now()))

    async def _delete_rows(self, user_id: str) -> None:
        await delete_messages(self._database, messages.c.user_id == user_id)
        async with self._database.write() as connection:
            await _delete_credentials(connection, user_id)
            for column in BELONGINGS:
                await connection.execute(delete(column.table).where(column == user_id))

    async def _pass_again(self) -> None:
        for user_id, left in list(self._further_passes.items()):
            await self._delete_rows(user_id)
            self._further_passes[user_id] = left - 1
        self._further_passes = {user_id: left for user_id, left in self._further_passes.items() if left}

    async def _failures(self, user_id: str) -> AsyncIterator[GatewayError]:
        """Delete what others keep of the user, and yield the errors of those that could not be asked."""
        profile = await self._profiles.find(user_id)
        note = await self._note(user_id)
        steps: list[Callable[[], Awaitable[None]]] = [
            lambda: self._identity.delete(user_id),
            lambda: self._agents.delete(user_id, None if note is None else note.letta_agent_id),
        ]
        if profile is not None:
            steps.append(lambda: self._billing.close_account(profile))
        for step in steps:
            try:
                await step()
            except GatewayError as error:
                yield error

    async def _note(self, user_id: str) -> Row[Any] | None:
        async with self._database.read() as connection:
            return (await connection.execute(select(deletions).where(deletions.c.user_id == user_id))).one_or_none()

    async def _drop_note(self, user_id: str) -> None:
        async with self._database.write() as connection:
            await connection.execute(delete(deletions).where(deletions.c.user_id == user_id))


async def _delete_credentials(connection: Connection, user_id: str) -> None:
    await end_sessions(connection, sessions.c.user_id == user_id)
    for column in CREDENTIALS:
        await connection.execute(delete(column.table).where(column == user_id))
