"""What turns took: a user's own, any user's for the operator, and everybody's."""

from datetime import UTC, date, datetime, timedelta
from typing import Final

import msgspec
import structlog
from aiohttp import web

from gateway import keys
from gateway.accounts.billing.protocol import Spent
from gateway.accounts.profiles import Profile
from gateway.accounts.usage import Days
from gateway.accounts.usage_answers import all_usage_answer, usage_answer
from gateway.errors import GatewayError
from gateway.handlers.json_answers import json_answer
from gateway.handlers.platform_admin import user_of
from gateway.handlers.platform_agent import profile_of
from gateway.handlers.queries import query_of

USUAL_DAYS: Final = 30
"""Days of a report that says nothing else."""
OWNERS: Final = 100
"""Owners whom the operator is shown."""

_log: Final = structlog.get_logger("gateway.accounts")


class UsageDays(msgspec.Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """The days that are asked for, as 2026-11-21, UTC, both included; 366 at most, by default the last thirty."""

    first: str | None = None
    last: str | None = None


async def usage(request: web.Request) -> web.Response:
    """Answer what the user's turns took: tokens and cost by day, model and API, and how their budget stands."""
    return await _usage(request, await profile_of(request))


async def user_usage(request: web.Request) -> web.Response:
    """Answer what a user's turns took."""
    return await _usage(request, await user_of(request))


async def all_usage(request: web.Request) -> web.Response:
    """Answer what all turns took together, and who spent the most."""
    days, reports = days_of(request), request.app[keys.USAGE]
    totals, owners = await reports.totals(days), await reports.top_owners(days, OWNERS)
    return json_answer(all_usage_answer(days.first, days.last, totals, owners))


def days_of(request: web.Request) -> Days:
    """Return which days a request asks for; raises ``InvalidRequest``."""
    query = query_of(request, UsageDays)
    last = query.last or datetime.now(UTC).date().isoformat()
    return Days.between(query.first or _days_before(last), last)


def _days_before(last: str) -> str:
    try:
        return (date.fromisoformat(last) - timedelta(days=USUAL_DAYS - 1)).isoformat()
    except (ValueError, OverflowError):
        return date.min.isoformat()  # a last day that is none is refused as what it is


async def _usage(request: web.Request, profile: Profile) -> web.Response:
    days = days_of(request)
    report = await request.app[keys.USAGE].report(profile.id, days)
    return json_answer(usage_answer(report, await _billed(request, profile, days)))


async def _billed(request: web.Request, profile: Profile, days: Days) -> Spent | None:
    """Return what the biller says; None where it cannot be asked: the ledger's own figures are there all the same."""
    try:
        return await request.app[keys.BILLING].spent(profile, days.first, days.last)
    except GatewayError as error:
        _log.warning("biller's figures left out", code=error.code)
        return None
