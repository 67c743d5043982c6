from typing import get_args

import pytest
from hypothesis import given

from gateway.translation.agent_events import AgentEvent, TextDelta, Usage
from tests.translation import strategies


def test_steps_are_added_up() -> None:
    assert Usage(1, 2, 3, 4).plus(Usage(10, 20, 30, 40)) == Usage(11, 22, 33, 44)


@pytest.mark.parametrize(
    ("left", "right", "total"), [(None, None, None), (0, None, 0), (None, 0, 0), (2, None, 2), (None, 3, 3), (2, 3, 5)]
)
def test_figure_that_one_step_does_not_report(left: int | None, right: int | None, total: int | None) -> None:
    added = Usage(0, 0, left, right).plus(Usage(0, 0, right, left))
    assert added == Usage(0, 0, total, total)


@given(one=strategies.usages, two=strategies.usages, three=strategies.usages)
def test_order_of_steps_does_not_matter(one: Usage, two: Usage, three: Usage) -> None:
    assert one.plus(two).plus(three) == three.plus(one.plus(two))


def test_events_are_values() -> None:
    assert TextDelta("a") == TextDelta("a")
    with pytest.raises(AttributeError, match="immutable"):
        TextDelta("a").text = "b"  # type: ignore[misc]


def test_every_event_is_frozen() -> None:
    assert all(kind.__struct_config__.frozen for kind in get_args(AgentEvent))
