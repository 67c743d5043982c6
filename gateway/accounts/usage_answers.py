"""What the platform API answers of usage. Days are UTC's, money is in US dollars as a decimal number."""

import msgspec

from gateway.accounts.billing.protocol import Spent
from gateway.accounts.periods import Period
from gateway.accounts.usage import BudgetState, OwnerSums, Sums, UsageReport, UsageRow
from gateway.translation.platform_types import dollars


class UsageSums(msgspec.Struct, frozen=True, kw_only=True):
    """Sums of turns that have ended.

    ``cached_tokens`` are part of the prompt's, ``reasoning_tokens`` of the completion's.
    """

    turns: int
    failed_turns: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost: str


class UsageOfDay(UsageSums, frozen=True, kw_only=True):
    """The sums of a day, a model and an API: ``chat_completions``, ``responses`` or ``platform``."""

    day: str
    model: str
    source: str


class UsageOfOwner(UsageSums, frozen=True, kw_only=True):
    """The sums of a user, of an API key of the operator's, or of ``local``: this machine without one."""

    owner: str


class BudgetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a budget stands; ``held`` is what running turns may still take."""

    amount: str
    period: Period
    spent: str
    held: str
    remaining: str


class BilledDay(msgspec.Struct, frozen=True):
    """What a day cost by the biller's own books."""

    day: str
    cost: str


class UsageAnswer(msgspec.Struct, frozen=True, kw_only=True, rename={"first_day": "from", "last_day": "to"}):
    """What a user's turns took; ``billed`` is there where a LiteLLM proxy keeps books of its own."""

    first_day: str
    last_day: str
    data: tuple[UsageOfDay, ...]
    totals: UsageSums
    budget: BudgetStatus | None
    billed: tuple[BilledDay, ...] | None = None


class AllUsageAnswer(msgspec.Struct, frozen=True, kw_only=True, rename={"first_day": "from", "last_day": "to"}):
    """What all turns took; ``owners`` are those who spent the most, those first."""

    first_day: str
    last_day: str
    totals: UsageSums
    owners: tuple[UsageOfOwner, ...]


def usage_answer(report: UsageReport, billed: Spent | None) -> UsageAnswer:
    """Return a report as its user sees it."""
    return UsageAnswer(
        first_day=report.first_day,
        last_day=report.last_day,
        data=tuple(_day(row) for row in report.rows),
        totals=_sums(report.totals),
        budget=None if report.budget is None else _budget(report.budget),
        billed=None if billed is None else tuple(BilledDay(day.day, dollars(day.micros)) for day in billed.days),
    )


def all_usage_answer(first_day: str, last_day: str, totals: Sums, owners: list[OwnerSums]) -> AllUsageAnswer:
    """Return what all turns took as the operator sees it."""
    return AllUsageAnswer(
        first_day=first_day,
        last_day=last_day,
        totals=_sums(totals),
        owners=tuple(_owner(sums) for sums in owners),
    )


def _sums(sums: Sums) -> UsageSums:
    return UsageSums(
        turns=sums.turns,
        failed_turns=sums.failed_turns,
        prompt_tokens=sums.prompt_tokens,
        completion_tokens=sums.completion_tokens,
        cached_tokens=sums.cached_tokens,
        reasoning_tokens=sums.reasoning_tokens,
        cost=dollars(sums.cost_micros),
    )


def _day(row: UsageRow) -> UsageOfDay:
    return UsageOfDay(day=row.day, model=row.model, source=row.source, **msgspec.structs.asdict(_sums(row)))


def _owner(sums: OwnerSums) -> UsageOfOwner:
    return UsageOfOwner(owner=sums.owner, **msgspec.structs.asdict(_sums(sums)))


def _budget(state: BudgetState) -> BudgetStatus:
    return BudgetStatus(
        amount=dollars(state.limit_micros),
        period=state.period,
        spent=dollars(state.spent_micros),
        held=dollars(state.held_micros),
        remaining=dollars(state.remaining_micros),
    )
