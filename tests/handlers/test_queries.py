from typing import Annotated

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request
from msgspec import Meta

from gateway.errors import InvalidRequest
from gateway.handlers.queries import query_of


class Wanted(msgspec.Struct, frozen=True, rename={"first": "from"}):
    first: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


def wanted(query: str) -> Wanted:
    return query_of(make_mocked_request("GET", f"/?{query}"), Wanted)


def test_what_is_not_said_is_the_default() -> None:
    assert wanted("") == Wanted()
    assert wanted("limit=&from=") == Wanted(), "as nobody fills in what a page does not have"


def test_fields_by_their_names_on_the_wire() -> None:
    assert wanted("from=a%20b&limit=7") == Wanted("a b", 7)
    assert wanted("first=a") == Wanted()


def test_what_nobody_knows_is_left_alone() -> None:
    assert wanted("x=1&x=2&limit=7") == Wanted(limit=7)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=1.5", "limit"),
        ("limit=5&limit=5", "limit"),
        ("from=a&from=b", "from"),
    ],
)
def test_field_that_is_wrong_is_named(query: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wanted(query)
    assert caught.value.param == param
