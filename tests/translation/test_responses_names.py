import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.translation.responses_names import flat_name

names = st.text("abcXYZ_-09", min_size=1, max_size=64)


def test_function_outside_a_namespace_keeps_its_name() -> None:
    assert flat_name("find", None) == flat_name("find", "") == "find"


def test_function_inside_a_namespace_is_named_by_both() -> None:
    assert flat_name("find", "crm") == "crm__find"


def test_long_names_are_told_apart() -> None:
    long = "x" * 60
    assert flat_name("find", long) != flat_name("list", long)
    assert len(flat_name("find", long)) == 64


@given(name=names, namespace=names)
def test_name_is_one_that_openai_takes(*, name: str, namespace: str) -> None:
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", flat_name(name, namespace))
