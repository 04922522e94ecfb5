"""Which TCP ports kvray's actors listen on, and whether each should be where it is.

Ray gives every actor a port of its own, which asks for Ray's token; UCX gives each NodeStore one
that asks for nothing (SECURITY.md). So a NodeStore's must be on loopback, or on the address by
which Ray knows the node, and nowhere else.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from kvray.cluster import ClusterStatus, NodeState
from kvray.watch.tables import NODE_CHARS


@dataclass(frozen=True, slots=True)
class Port:
    """One listening socket. process: "directory", or "node_store-" and the node's beginning."""

    process: str
    address: str
    port: int
    expected: bool

    def to_dict(self) -> dict[str, object]:
        return {
            "process": self.process,
            "address": self.address,
            "port": self.port,
            "expected": self.expected,
        }


def ports_of(status: ClusterStatus) -> list[Port]:
    """Of the directory, and of all NodeStores that answered."""
    found = list(_judged("directory", status.directory_listeners, ""))
    for node in status.nodes:
        facts = node.details.get("host_facts", {})
        if node.state is NodeState.LOST or not facts:
            continue
        process = f"node_store-{node.node_id[:NODE_CHARS]}"
        found += _judged(process, facts.get("listeners", ()), facts.get("node_address", ""))
    return found


def _judged(
    process: str, listeners: Iterable[tuple[str, int]], node_address: str
) -> Iterable[Port]:
    """Ray's own port of a process is the one that is on all addresses, where there is one such."""
    anywhere = 0
    for address, port in listeners:
        parsed = ipaddress.ip_address(address)
        anywhere += parsed.is_unspecified
        is_rays = parsed.is_unspecified and anywhere == 1
        yield Port(process, address, port, parsed.is_loopback or is_rays or address == node_address)
