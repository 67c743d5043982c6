import pytest

from gateway.client_block import client_block


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.7", "::ffff:203.0.113.7"),
        ("", ""),
        ("session 1", "session 1"),
    ],
)
def test_what_is_one_client(address: str, client: str) -> None:
    assert client_block(address) == client
