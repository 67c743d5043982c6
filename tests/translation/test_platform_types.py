import msgspec
import pytest

from gateway.translation.platform_types import ChatRequest, Message, dollars


@pytest.mark.parametrize(
    ("micros", "shown"),
    [
        (0, "0.000000"),
        (1, "0.000001"),
        (1_234_567, "1.234567"),
        (12_000_000, "12.000000"),
        (10**15, "1000000000.000000"),
    ],
)
def test_cost_is_a_decimal_number_of_dollars(micros: int, shown: str) -> None:
    assert dollars(micros) == shown


def test_fields_that_nobody_knows_are_ignored() -> None:
    request = msgspec.json.decode(b'{"message": "Hi", "role": "operator", "user_id": "other"}', type=ChatRequest)
    assert request == ChatRequest("Hi")


def test_message_of_a_user_on_the_wire() -> None:
    message = Message(id="msg_1", role="user", status="complete", text="Hi", created_at=1.5, ended_at=1.5)
    assert msgspec.json.decode(msgspec.json.encode(message)) == {
        "id": "msg_1",
        "role": "user",
        "status": "complete",
        "text": "Hi",
        "reasoning": "",
        "activity": [],
        "error_code": None,
        "created_at": 1.5,
        "ended_at": 1.5,
        "usage": None,
    }
