"""Days and budget periods of UTC's calendar, as they are named in the database."""

from datetime import UTC, date, datetime
from typing import Final, Literal, NamedTuple, TypeAlias

Period: TypeAlias = Literal["day", "month", "total"]

TOTAL: Final = "total"
_FIRST: Final = "0001-01-01"
_LAST: Final = "9999-12-31"


class Span(NamedTuple):
    """The days of a period, both included."""

    first_day: str
    last_day: str


def day_of(at: float) -> str:
    """Return the day of a time in UTC seconds: ``2026-11-21``."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def period_of(period: Period, at: float) -> str:
    """Return the name of the period in which a time is: ``2026-11-21``, ``2026-11`` or ``total``."""
    return dict(zip(("day", "month", "total"), periods_of(day_of(at)), strict=True))[period]


def periods_of(day: str) -> tuple[str, str, str]:
    """Return the names of all periods that a day is in."""
    return day, day[:7], TOTAL


def span_of(name: str) -> Span:
    """Return the days of a period by its name; the last of a month may be one that it does not have."""
    if name == TOTAL:
        return Span(_FIRST, _LAST)
    return Span(f"{name}-01", f"{name}-31") if len(name) == len("2026-11") else Span(name, name)


def is_day(text: str) -> bool:
    """Tell whether a text names a day as the database does."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
