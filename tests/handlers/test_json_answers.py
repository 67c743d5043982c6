import msgspec

from gateway.handlers.json_answers import json_answer


class Said(msgspec.Struct, rename={"first": "from"}):
    first: str


def test_struct_by_its_names_on_the_wire() -> None:
    answer = json_answer(Said("ä"))
    assert (answer.status, answer.content_type, answer.body) == (200, "application/json", '{"from":"ä"}'.encode())


def test_another_status() -> None:
    assert json_answer(Said(""), status=201).status == 201
