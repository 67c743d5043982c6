import pytest
from sqlalchemy import Double, Table

from gateway.storage.tables import metadata
from gateway.storage.text import MAX_TEXT

POSTGRES_INDEX_ROW = 2_704
TABLES = metadata.sorted_tables


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_owner_is_part_of_the_key(table: Table) -> None:
    assert "owner" in table.primary_key.columns


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_index_is_narrow_enough_for_the_longest_text(table: Table) -> None:
    widths = [len(table.primary_key.columns), *(len(index.columns) for index in table.indexes)]
    assert max(widths) * (MAX_TEXT + 4) < POSTGRES_INDEX_ROW


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_times_are_seconds_in_full_precision(table: Table) -> None:
    times = [column for column in table.columns if column.name.endswith("_at")]
    assert times
    assert all(isinstance(column.type, Double) and not column.nullable for column in times)
