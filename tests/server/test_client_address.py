from collections.abc import Sequence

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from gateway.server.client_address import TrustedNetworks

TRUSTED = TrustedNetworks(("127.0.0.0/8", "::1/128", "10.0.0.0/8", "fd00::/8"))


def from_peer(peer: str | None, *forwarded: str, **other: str) -> web.Request:
    headers = CIMultiDict([("X-Forwarded-For", value) for value in forwarded])
    headers.update({name.replace("_", "-"): value for name, value in other.items()})
    return make_mocked_request("GET", "/", headers=headers).clone(remote=peer or "")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.7", (), "203.0.113.7"),
        ("127.0.0.1", (), "127.0.0.1"),
        ("127.0.0.1", ("",), "127.0.0.1"),
        ("127.0.0.1", (" , ,",), "127.0.0.1"),
        ("203.0.113.7", ("198.51.100.1",), "203.0.113.7"),
        ("127.0.0.1", ("203.0.113.7",), "203.0.113.7"),
        ("127.0.0.1", ("198.51.100.1, 203.0.113.7",), "203.0.113.7"),
        ("127.0.0.1", ("198.51.100.1", "203.0.113.7"), "203.0.113.7"),
        ("127.0.0.1", ("198.51.100.1, 203.0.113.7, 10.1.1.1",), "203.0.113.7"),
        ("127.0.0.1", ("10.9.9.9",), "10.9.9.9"),
        ("127.0.0.1", ("10.9.9.9, 10.1.1.1",), "10.9.9.9"),
        ("::1", ("2001:db8::7",), "2001:db8::7"),
        ("::ffff:127.0.0.1", ("203.0.113.7",), "203.0.113.7"),
        ("127.0.0.1", ("::ffff:203.0.113.7",), "203.0.113.7"),
        ("127.0.0.1", ("203.0.113.7:4711",), "203.0.113.7"),
        ("127.0.0.1", ("[2001:db8::7]:4711",), "2001:db8::7"),
        ("127.0.0.1", ("[2001:db8::7]",), "2001:db8::7"),
        # what a proxy says unreadably is nobody, and above all not the proxy
        ("127.0.0.1", ("unknown",), ""),
        ("127.0.0.1", ("203.0.113.7, _hidden",), ""),
        ("127.0.0.1", ("fe80::1%eth0",), ""),
        ("127.0.0.1", ("::1%x",), ""),
        ("127.0.0.1", ("localhost",), ""),
        ("127.0.0.1", ("127.0.0.1:99999999",), ""),
        ("", (), ""),
        ("unix:", ("203.0.113.7",), ""),
    ],
)
def test_client_behind_all_trusted_proxies(peer: str, forwarded: Sequence[str], client: str) -> None:
    assert TRUSTED.client_of(from_peer(peer, *forwarded)) == client


@pytest.mark.parametrize("header", ["Forwarded", "X_Real_IP"])
def test_proxy_that_names_its_client_otherwise(header: str) -> None:
    assert TRUSTED.client_of(from_peer("127.0.0.1", **{header: "203.0.113.7"})) == ""
    assert TRUSTED.client_of(from_peer("203.0.113.7", **{header: "127.0.0.1"})) == "203.0.113.7"
    assert TRUSTED.client_of(from_peer("127.0.0.1", "203.0.113.8", **{header: "x"})) == "203.0.113.8"


@pytest.mark.parametrize(
    ("address", "trusted"),
    [("127.0.0.1", True), ("::1", True), ("fd12::1", True), ("::ffff:10.0.0.1", True)]
    + [
        (address, False) for address in ("", "203.0.113.7", "fe80::1", "localhost", "::ffff:203.0.113.7", "127.0.0.1%x")
    ],
)
def test_trusts(address: str, trusted: bool) -> None:  # noqa: FBT001
    assert TRUSTED.trusts(address) is trusted


def test_nobody_is_trusted() -> None:
    nobody = TrustedNetworks(())
    assert nobody.client_of(from_peer("127.0.0.1", "203.0.113.7")) == "127.0.0.1"
    assert not nobody.trusts("127.0.0.1")
