"""What NetworkPolicies let through, as Kubernetes has it: they add up, and what none of them allows is refused."""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

Labels = Mapping[str, str]


class Peer(msgspec.Struct, frozen=True):
    """The other side: a pod by its labels and its namespace, or just an address."""

    namespace: str = ""
    labels: Mapping[str, str] = {}
    address: str = "10.1.2.3"


def allows(
    policies: Iterable[dict[str, Any]],
    way: Literal["ingress", "egress"],
    pod: Labels,
    peer: Peer,
    port: str | int,
    protocol: str = "TCP",
) -> bool:
    """Tell whether a pod may be reached by a peer, or reach it, on a port: its name or number, as the policy has it."""
    binding = [
        policy
        for policy in policies
        if _selects(policy["spec"]["podSelector"], pod) and way.capitalize() in policy["spec"]["policyTypes"]
    ]
    rules = [(policy, rule) for policy in binding for rule in policy["spec"].get(way, [])]
    return not binding or any(
        _fits_peer(rule.get("from" if way == "ingress" else "to"), peer, policy["metadata"]["namespace"])
        and _fits_port(rule.get("ports"), port, protocol)
        for policy, rule in rules
    )


def _fits_peer(allowed: list[dict[str, Any]] | None, peer: Peer, home: str) -> bool:
    return allowed is None or any(_is(one, peer, home) for one in allowed)


def _is(allowed: dict[str, Any], peer: Peer, home: str) -> bool:
    if block := allowed.get("ipBlock"):
        address = ipaddress.ip_address(peer.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(out) for out in block.get("except", []))
    namespaces = allowed.get("namespaceSelector")
    in_place = peer.namespace == home
    if namespaces is not None:
        in_place = _selects(namespaces, {"kubernetes.io/metadata.name": peer.namespace})
    return bool(peer.namespace) and in_place and _selects(allowed.get("podSelector", {}), peer.labels)


def _fits_port(allowed: list[dict[str, Any]] | None, port: str | int, protocol: str) -> bool:
    return allowed is None or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in allowed)


def _selects(selector: dict[str, Any], labels: Labels) -> bool:
    assert set(selector) <= {"matchLabels"}, "no other kind of selector is read here"
    wanted: Labels = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()
