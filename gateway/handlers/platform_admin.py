"""``/api/v1/admin``: the operator looks after users, their budgets and what they use."""

from decimal import Decimal
from typing import Annotated, Final, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gateway import keys
from gateway.accounts.answers import AdminUserPage, ConfirmationAnswer, admin_user
from gateway.accounts.errors import UserNotFound
from gateway.accounts.profiles import Budget, Profile
from gateway.accounts.registration import checked_name
from gateway.errors import InvalidRequest
from gateway.handlers.json_answers import json_answer
from gateway.handlers.queries import query_of
from gateway.translation.field_errors import decoded
from gateway.translation.platform_types import MICROS

MOST: Final = Decimal(1_000_000_000)
"""US dollars of the largest budget."""


class UserSearch(msgspec.Struct, frozen=True):
    """Which users: ``search`` is a part of an e-mail or a name, ``cursor`` is what the last page ended with."""

    search: Annotated[str, Meta(max_length=200)] | None = None
    cursor: Annotated[str, Meta(max_length=200)] | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


class NewUserAccount(msgspec.Struct, frozen=True):
    """A user whom the operator makes; a password has 8 to 1,024 characters."""

    email: str
    password: str
    name: str | None = None


class BudgetChange(msgspec.Struct, frozen=True):
    """What a user may spend; ``amount`` is in US dollars, with six decimals at most."""

    amount: Decimal
    period: Literal["day", "month", "total"]


class UserChange(msgspec.Struct, frozen=True):
    """What of a user is to change; a budget that is null is the default one."""

    name: str | UnsetType = UNSET
    budget: BudgetChange | UnsetType | None = UNSET


class GivenPassword(msgspec.Struct, frozen=True):
    """A password of 8 to 1,024 characters for a user who forgot theirs."""

    password: str


_ACCOUNTS: Final = msgspec.json.Decoder(NewUserAccount)
_PASSWORDS: Final = msgspec.json.Decoder(GivenPassword)
_CHANGES: Final = msgspec.json.Decoder(UserChange)


async def list_users(request: web.Request) -> web.Response:
    """Answer some of the users, oldest first."""
    query = query_of(request, UserSearch)
    found = await request.app[keys.PROFILES].page(query.cursor, query.limit + 1, query.search)
    shown = found[: query.limit]
    cursor = shown[-1].id if len(found) > query.limit else None
    return json_answer(AdminUserPage(tuple(admin_user(profile) for profile in shown), cursor))


async def create_user(request: web.Request) -> web.Response:
    """Make a user, whether registration is open or not."""
    asked = decoded(_ACCOUNTS, await request[keys.BODY].read())
    profile, _ = await request.app[keys.REGISTRATION].create(asked.email, asked.password, asked.name, None)
    if profile is None:
        return json_answer(
            ConfirmationAnswer("The user is to open the link in the e-mail that was sent to them."), status=202
        )
    return json_answer(admin_user(profile), status=201)


async def retrieve_user(request: web.Request) -> web.Response:
    """Answer one user."""
    return json_answer(admin_user(await user_of(request)))


async def change_user(request: web.Request) -> web.Response:
    """Change a user's name or budget."""
    change = decoded(_CHANGES, await request[keys.BODY].read())
    profile = await user_of(request)
    name = change.name if isinstance(change.name, UnsetType) else checked_name(change.name)
    budget = change.budget if isinstance(change.budget, UnsetType) else _budget(change.budget)
    if not isinstance(budget, UnsetType):
        await request.app[keys.BILLING].set_budget(profile, budget)
    changed = await request.app[keys.PROFILES].change(profile.id, name=name, budget=budget)
    return json_answer(admin_user(_found(changed)))


async def delete_user(request: web.Request) -> web.Response:
    """Delete a user with all that is theirs."""
    profile = await user_of(request)
    await request.app[keys.REGISTRATION].delete(profile.id)
    return web.Response(status=204)


async def set_password(request: web.Request) -> web.Response:
    """Give a user a new password, and end their sessions."""
    given = decoded(_PASSWORDS, await request[keys.BODY].read())
    profile = await user_of(request)
    if not await request.app[keys.IDENTITY].set_password(profile.id, given.password):
        raise UserNotFound
    return json_answer(admin_user(profile))


async def block_user(request: web.Request) -> web.Response:
    """Keep a user out: their sessions end, and neither password, token nor key lets them in."""
    return json_answer(admin_user(await request.app[keys.BLOCKING].block(await user_of(request))))


async def unblock_user(request: web.Request) -> web.Response:
    """Let a user in again; the sessions of before stay ended."""
    return json_answer(admin_user(await request.app[keys.BLOCKING].unblock(await user_of(request))))


async def user_of(request: web.Request) -> Profile:
    """Return the user whom the path names; raises ``UserNotFound``."""
    return _found(await request.app[keys.PROFILES].find(request.match_info["user"]))


def _found(profile: Profile | None) -> Profile:
    if profile is None:
        raise UserNotFound
    return profile


def _budget(asked: BudgetChange | None) -> Budget | None:
    if asked is None:
        return None
    amount = asked.amount
    if not amount.is_finite() or not 0 <= amount <= MOST or amount * MICROS % 1:
        raise InvalidRequest(
            f"'budget.amount' must be US dollars between 0 and {MOST}, with six decimals at most.",
            param="budget.amount",
        )
    return Budget(int(amount * MICROS), asked.period)
