import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.periods import day_of, is_day, period_of, periods_of, span_of

MIDNIGHT = 1_795_219_200.0
"""2026-11-21T00:00:00Z."""


@pytest.mark.parametrize(
    ("at", "day"),
    [
        (0.0, "1970-01-01"),
        (MIDNIGHT - 0.001, "2026-11-20"),
        (MIDNIGHT, "2026-11-21"),
        (MIDNIGHT + 86_399.999, "2026-11-21"),
        (951_782_400.0, "2000-02-29"),
    ],
)
def test_day_is_utcs(at: float, day: str) -> None:
    assert day_of(at) == day


def test_names_of_periods() -> None:
    assert period_of("day", MIDNIGHT) == "2026-11-21"
    assert period_of("month", MIDNIGHT) == "2026-11"
    assert period_of("total", MIDNIGHT) == "total"
    assert periods_of("2026-11-21") == ("2026-11-21", "2026-11", "total")


@given(
    at=st.floats(min_value=0, max_value=4e9),
    day=st.dates(min_value=dt.date(1970, 1, 1), max_value=dt.date(2096, 1, 1)),
)
def test_day_is_in_the_span_of_its_periods_and_of_no_other(at: float, day: dt.date) -> None:
    for name in periods_of(day_of(at)):
        first, last = span_of(name)
        is_in = first <= day.isoformat() <= last
        assert is_in == (name in periods_of(day.isoformat()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21", True),
        ("2024-02-29", True),
        ("2026-02-29", False),
        ("2026-13-01", False),
        ("20261121", False),
        ("2026-W47-6", False),
        ("2026-11-21T00:00", False),
        (" 2026-11-21", False),
        ("", False),
        ("\u0662\u0660\u0662\u0666-11-21", False),
    ],
)
def test_what_names_a_day(text: str, expected: object) -> None:
    assert is_day(text) is expected
