from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.translation.field_errors import MAX_SHOWN, field_error


class Inner(msgspec.Struct):
    kind: Literal["a", "b"]
    size: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1


class Outer(msgspec.Struct):
    name: str
    inner: list[Inner] = []
    by_name: dict[str, int] = {}


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        ("7", "invalid_type", None, "Invalid type for 'body': expected 'object', got 'int'."),
        ("null", "invalid_type", None, "Invalid type for 'body': expected 'object', got 'null'."),
        ("{}", "missing_required_parameter", "name", "Missing required parameter: 'name'."),
        ('{"name":7}', "invalid_type", "name", "Invalid type for 'name': expected 'str', got 'int'."),
        (
            '{"name":"x","inner":[{"kind":"a"},{}]}',
            "missing_required_parameter",
            "inner[1].kind",
            "Missing required parameter: 'inner[1].kind'.",
        ),
        (
            '{"name":"x","inner":[{"kind":"c"}]}',
            "invalid_value",
            "inner[0].kind",
            "Invalid value for 'inner[0].kind': invalid enum value 'c'.",
        ),
        (
            '{"name":"x","inner":[{"kind":"a","size":10}]}',
            "invalid_value",
            "inner[0].size",
            "Invalid value for 'inner[0].size': expected 'int' <= 9.",
        ),
        (
            '{"name":"x","by_name":{"a":1,"b":"2"}}',
            "invalid_type",
            "by_name[...]",
            "Invalid type for 'by_name[...]': expected 'int', got 'str'.",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_openais_words(body: str, code: str, param: str | None, message: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.json.decode(body, type=Outer)
    error = field_error(str(raised.value))
    assert (error.status, error.code, error.param, error.message) == (400, code, param, message)


@given(kind=st.text(max_size=400) | st.sampled_from(["` - at `$.name", "x, got `int` - at `$", "Object missing"]))
def test_what_is_quoted_of_a_request_never_poses_as_a_path(kind: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.json.decode(msgspec.json.encode({"name": "x", "inner": [{"kind": kind}]}), type=Outer)
    error = field_error(str(raised.value))
    assert error.param == "inner[0].kind"
    assert len(error.message) < MAX_SHOWN + 50
