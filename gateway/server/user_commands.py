"""What an operator does with users by hand, beside ``/api/v1/admin``; each says in lines what it found or did."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

from gateway.accounts.errors import UserNotFound
from gateway.accounts.profiles import Profile, canonical
from gateway.accounts.user_keys import UserKey
from gateway.errors import GatewayError, InvalidRequest
from gateway.live_settings.current import LiveSettings
from gateway.metrics import Metrics
from gateway.server import logs
from gateway.server.accounts import Accounts
from gateway.server.app import build_backend
from gateway.server.installation import check_there
from gateway.settings import SettingError, Settings
from gateway.storage.address import address_of
from gateway.storage.engine import Database
from gateway.storage.failures import StorageFailed
from gateway.tasks import TaskSet

PAGE: Final = 500
TO_END: Final = 5.0
"""Seconds that work which was begun has to end."""

Command: TypeAlias = Callable[[Accounts], Awaitable[list[str]]]


class CommandFailed(Exception):
    """A command could not be done; the message says why in one line."""


def run(settings: Settings, command: Command) -> list[str]:
    """Do a command on the gateway's database and return what it says; raises ``CommandFailed``."""

    async def work() -> list[str]:
        async with _accounts(settings) as accounts:
            return await command(accounts)

    logs.configure(settings.environment, "ERROR")  # what a command warns of, it says itself
    try:
        check_there(settings)
        return asyncio.run(work())
    except GatewayError as error:
        raise CommandFailed(error.message) from error
    except (SettingError, StorageFailed) as error:
        raise CommandFailed(str(error)) from error


def list_users(search: str | None) -> Command:
    """List users, oldest first; ``search`` is part of an e-mail or a name."""

    async def command(accounts: Accounts) -> list[str]:
        lines: list[str] = []
        after: str | None = None
        while page := await accounts.profiles.page(after, PAGE, search):
            lines += [_line(profile) for profile in page]
            after = page[-1].id
        return lines

    return command


def set_blocked(user: str, *, is_blocked: bool) -> Command:
    """Keep a user out, or let them in again."""

    async def command(accounts: Accounts) -> list[str]:
        profile = await _user(accounts, user)
        await (accounts.blocking.block(profile) if is_blocked else accounts.blocking.unblock(profile))
        return [f"{profile.email or profile.id} is {'blocked' if is_blocked else 'not blocked any more'}"]

    return command


def set_password(user: str, password: str) -> Command:
    """Give a user a new password and end their sessions."""

    async def command(accounts: Accounts) -> list[str]:
        profile = await _user(accounts, user)
        if not await accounts.identity.set_password(profile.id, password):
            raise CommandFailed("The identity service has no such user any more.")
        return [f"{profile.email or profile.id} has a new password, and is logged out everywhere"]

    return command


def delete_user(user: str) -> Command:
    """Delete a user and all that is theirs."""

    async def command(accounts: Accounts) -> list[str]:
        profile = await _user(accounts, user)
        await accounts.deletion.delete(profile.id)
        return [f"{profile.email or profile.id} is deleted"]

    return command


def list_keys(user: str) -> Command:
    """List a user's personal API keys, newest first."""

    async def command(accounts: Accounts) -> list[str]:
        profile = await _user(accounts, user)
        return [_key_line(key) for key in await accounts.user_keys.list(profile.id)]

    return command


def make_key(user: str, name: str) -> Command:
    """Make a personal API key for a user: it is said once."""

    async def command(accounts: Accounts) -> list[str]:
        profile = await _user(accounts, user)
        key, plaintext = await accounts.user_keys.make(profile.id, name)
        return [_key_line(key), plaintext]

    return command


def delete_key(user: str, key_id: str) -> Command:
    """Delete a user's personal API key."""

    async def command(accounts: Accounts) -> list[str]:
        profile = await _user(accounts, user)
        if not await accounts.user_keys.delete(profile.id, key_id):
            raise CommandFailed(
                f"{profile.email or profile.id} has no key of this id: 'letta-gateway keys list' lists them."
            )
        return [f"key {key_id} is deleted"]

    return command


@asynccontextmanager
async def _accounts(settings: Settings) -> AsyncIterator[Accounts]:
    database = await Database.open(address_of(settings.database_url, Path(settings.home)))
    tasks = TaskSet()
    backend = build_backend(settings, Metrics(), tasks)
    try:
        accounts = Accounts(LiveSettings(settings), database, backend, tasks)
        try:
            yield accounts
        finally:
            await accounts.close()
    finally:
        await tasks.close(TO_END)
        await backend.close()
        await database.close()


async def _user(accounts: Accounts, user: str) -> Profile:
    """Return a user by id or e-mail; raises ``UserNotFound``."""
    profile = await accounts.profiles.find(user)
    if profile is None and "@" in user:
        profile = await accounts.profiles.find_by_email(_email(user))
    if profile is None:
        raise UserNotFound("No user has this id or e-mail. 'letta-gateway users list' lists them.")
    return profile


def _email(text: str) -> str:
    try:
        return canonical(text)
    except InvalidRequest as error:
        raise CommandFailed(error.message) from error


def _line(profile: Profile) -> str:
    return "  ".join((profile.id, profile.email or "-", *(["blocked"] if profile.is_blocked else [])))


def _key_line(key: UserKey) -> str:
    return f"{key.id}  ...{key.hint}  {key.name}"
