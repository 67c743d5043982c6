import pytest
from sqlalchemy import Column, Double, Numeric, Table, Text

from gateway.storage.tables import metadata
from gateway.storage.text import MAX_TEXT

POSTGRES_INDEX_ROW = 2_704
TABLES = metadata.sorted_tables
BOUNDED = {"day": 10, "period": 10, "source": 20, "status": 20}
"""Bytes of texts that are no client's choice."""
OPEN_ENDED = {"ended_at", "used_at", "last_used_at"}
"""Times of what may not have happened yet."""
TIMELESS = {"spending", "usage_metrics"}
"""Sums, whose keys name their days."""

KEYS = {
    "changed_settings": "field",
    "ended_operator_sessions": "id",
    "instances": "id",
    "refresh_tokens": "session_id",
    "user_profiles": "id",
}
"""By what rows are found that name no owner."""


def beginnings(table: Table) -> set[str]:
    """Return the columns by which rows are found: those that begin the key or an index."""
    return {next(iter(table.primary_key.columns)).name, *(index.columns[0].name for index in table.indexes)}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_rows_are_found_by_whose_they_are(table: Table) -> None:
    owner = KEYS.get(table.name)
    named = {owner} if owner else {"owner", "user_id"} & set(table.columns.keys())
    assert named
    assert named <= beginnings(table)


def width(column: Column[object]) -> int:
    if not isinstance(column.type, Text):
        return 8
    return BOUNDED.get(column.name, MAX_TEXT)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_index_is_narrow_enough_for_the_longest_text(table: Table) -> None:
    for columns in (table.primary_key.columns, *(index.columns for index in table.indexes)):
        assert sum(width(column) + 4 for column in columns) < POSTGRES_INDEX_ROW


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_times_are_seconds_in_full_precision(table: Table) -> None:
    times = [column for column in table.columns if column.name.endswith("_at")]
    assert bool(times) != (table.name in TIMELESS)
    assert all(isinstance(column.type, Double) for column in times)
    assert {column.name for column in times if column.nullable} <= OPEN_ENDED


def test_money_is_whole_millionths() -> None:
    for table in TABLES:
        for column in table.columns:
            if column.name.endswith("_micros"):
                assert column.type.python_type is int
                assert not isinstance(column.type, Numeric)
