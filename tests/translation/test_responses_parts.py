import msgspec
import pytest

from gateway.errors import InvalidRequest
from gateway.translation.responses_parts import read_part


class Inner(msgspec.Struct):
    text: str
    inner: list["Inner"] = []


DECODER = msgspec.json.Decoder(Inner)


def test_part_is_typed() -> None:
    assert read_part(DECODER, msgspec.Raw(b'{"text":"a"}'), "input[0]") == Inner("a")


@pytest.mark.parametrize(
    ("raw", "param", "code"),
    [
        (b"3", "input[0]", "invalid_type"),
        (b"{}", "input[0].text", "missing_required_parameter"),
        (b'{"text":1}', "input[0].text", "invalid_type"),
        (b'{"text":"a","inner":[{"text":"b"},{"text":null}]}', "input[0].inner[1].text", "invalid_type"),
    ],
)
def test_fault_is_named_from_the_requests_top(raw: bytes, param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_part(DECODER, msgspec.Raw(raw), "input[0]")
    assert (raised.value.param, raised.value.code) == (param, code)
    assert f"'{param}'" in raised.value.message


def test_nested_too_deeply() -> None:
    raw = msgspec.Raw(b'{"text":"a","inner":[' * 5_000 + b"]}" * 5_000)
    with pytest.raises(InvalidRequest) as raised:
        read_part(DECODER, raw, "input[0]")
    assert raised.value.code == "invalid_json"
