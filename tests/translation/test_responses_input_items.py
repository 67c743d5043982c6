from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from openai.types.responses import ResponseItemList

from gateway.errors import InvalidRequest
from gateway.translation.responses_input_items import input_items, listed
from gateway.translation.responses_request import decode
from gateway.translation.responses_types import InputItemsQuery


def stored(said: Any) -> bytes:
    return input_items(decode(msgspec.json.encode({"model": "m", "input": said})), "resp_1")


def test_text() -> None:
    part = {"type": "input_text", "text": "Hi"}
    assert msgspec.json.decode(stored("Hi")) == [
        {"type": "message", "role": "user", "status": "completed", "content": [part], "id": "in_1_0"}
    ]


def test_items_keep_their_ids_and_get_what_they_lack() -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "message", "role": "assistant", "content": "Hello", "id": "msg_x"},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "id": None},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go on."}]},
    ]
    first, second, third, fourth = msgspec.json.decode(stored(items))
    assert (first["type"], first["id"]) == ("message", "in_1_0")
    assert (second["id"], second["content"][0]["type"]) == ("msg_x", "output_text")
    assert (third["id"], third["name"]) == ("in_1_2", "f")
    assert fourth["content"] == [{"type": "input_text", "text": "Go on."}]


def test_list_is_of_the_sdks_type() -> None:
    items = stored([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}])
    page = listed(items, InputItemsQuery(order="asc"))
    read = ResponseItemList.model_validate_json(msgspec.json.encode(page))
    assert (read.first_id, read.last_id, read.has_more) == ("in_1_0", "in_1_1", False)
    assert [item.type for item in read.data] == ["message", "message"]


def test_nothing_listed() -> None:
    page = listed(b"[]", InputItemsQuery())
    assert (page.data, page.first_id, page.last_id) == ((), None, None)


@pytest.mark.parametrize(
    ("wanted", "ids", "has_more"),
    [
        (InputItemsQuery(), range(29, 9, -1), True),
        (InputItemsQuery(limit=100), range(29, -1, -1), False),
        (InputItemsQuery(limit=2, order="asc"), range(2), True),
        (InputItemsQuery(order="asc", after="in_1_9"), range(10, 30), False),
        (InputItemsQuery(after="in_1_1"), [0], False),
        (InputItemsQuery(after="in_1_0"), [], False),
    ],
)
def test_pages(wanted: InputItemsQuery, ids: Sequence[int], *, has_more: bool) -> None:
    page = listed(stored([{"role": "user", "content": str(number)} for number in range(30)]), wanted)
    assert [msgspec.json.decode(item)["id"] for item in page.data] == [f"in_1_{number}" for number in ids]
    assert page.has_more is has_more


def test_page_behind_no_item() -> None:
    with pytest.raises(InvalidRequest) as refused:
        listed(stored("Hi"), InputItemsQuery(after="in_2_0"))
    assert refused.value.param == "after"
