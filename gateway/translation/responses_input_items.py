"""The input of a request -> its items as ``GET /v1/responses/{id}/input_items`` lists them."""

from typing import Any, Final

import msgspec

from gateway.errors import InvalidRequest
from gateway.translation.responses_types import InputItemList, InputItemsQuery, ResponsesRequest

_ENCODER: Final = msgspec.json.Encoder()
_ITEM: Final = msgspec.json.Decoder(dict[str, Any])
_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])


class _Id(msgspec.Struct):
    id: str


_ID: Final = msgspec.json.Decoder(_Id)


def input_items(request: ResponsesRequest, response_id: str) -> bytes:
    """Return the items of the input as a JSON array, as they are stored: each has an id and a type."""
    if isinstance(request.input, str):
        said = [_message(request.input, "user")]
    else:
        said = [_ITEM.decode(raw) for raw in request.input]
    prefix = f"in_{response_id.removeprefix('resp_')}"
    return _ENCODER.encode([_whole(item, f"{prefix}_{index}") for index, item in enumerate(said)])


def listed(items: bytes, wanted: InputItemsQuery) -> InputItemList:
    """Return those stored items that are wanted; raises ``InvalidRequest`` where ``after`` is none of them."""
    data = _ITEMS.decode(items)
    if wanted.order == "desc":
        data.reverse()
    ids = [_ID.decode(item).id for item in data]
    begin = 0 if wanted.after is None else _behind(wanted.after, ids)
    end = begin + wanted.limit
    shown = ids[begin:end]
    return InputItemList(
        tuple(data[begin:end]), shown[0] if shown else None, shown[-1] if shown else None, has_more=end < len(ids)
    )


def _behind(item_id: str, ids: list[str]) -> int:
    if item_id not in ids:
        raise InvalidRequest("'after' is no item of this response: send the 'last_id' of a page of it.", param="after")
    return ids.index(item_id) + 1


def _whole(item: dict[str, Any], made_id: str) -> dict[str, Any]:
    if item.get("type") is None:
        item["type"] = "message"
    if item["type"] == "message" and isinstance(item.get("content"), str):
        item |= _message(item["content"], item.get("role"))
    if not isinstance(item.get("id"), str):
        item["id"] = made_id
    return item


def _message(text: str, role: str | None) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "role": role, "status": "completed", "content": [part]}
