from gateway.letta.rest_ask import anything


def test_anything_is_taken_as_it_is() -> None:
    assert anything(b"") == b""
    assert anything(b"\xff{") == b"\xff{"
