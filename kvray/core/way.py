"""Which way bytes have come from a peer: judged by counters of the host, before and after.

UCX chooses a transport and NIXL does not say which (UCX can, ucp_ep_query, of endpoints that NIXL
keeps to itself). What is counted can not be mistaken: bytes that came over a network have passed
an interface or the port of an RDMA device, which count what they receive.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

# Of what was read, by which a counter has grown at least if it has carried it. Less than all, as a
# driver may count the last packets a moment later.
CARRIED_SHARE = 0.9
NAMED_SHARE = 0.1  # a device that has carried less of it is not named: the rest is other traffic
# Below this, the traffic of others in the same moment could pass for what was read: a heartbeat, a
# log, a scrape of metrics are a hundredth of it.
MIN_JUDGED_BYTES = 16 << 20


class Way(StrEnum):
    RDMA = "rdma"  # past the kernel: only the RDMA device has counted it
    TCP = "tcp"  # an interface has counted it, which may be the loopback one
    CMA = "cma"  # no network: copied between two processes of one machine, as UCX's cma does
    # RDMA and an interface have both counted as much: others use one of them, or TCP goes over
    # InfiniBand. Or none has, and the peer is on another machine.
    UNCLEAR = "unclear"


class Outcome(StrEnum):
    """What has become of the measurement of a link."""

    MEASURED = "measured"
    NOT_CONNECTED = "not_connected"  # the peer is not known to the node
    LATE = "late"  # nothing came within the deadline
    FAILED = "failed"  # the link said why
    SKIPPED = "skipped"  # it was not tried: the node is busy or silent, or time was up


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes that each device of a host has received, ever."""

    interfaces: Mapping[str, int]
    rdma_ports: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Carried:
    """devices: what has carried the bytes, the busiest first; none for CMA."""

    way: Way
    devices: tuple[str, ...] = ()


def carried(before: Counters, after: Counters, read_bytes: int) -> Carried:
    """How read_bytes have come, at least MIN_JUDGED_BYTES. Several devices may have shared them."""
    assert read_bytes >= MIN_JUDGED_BYTES
    rdma = _growth(before.rdma_ports, after.rdma_ports)
    network = _growth(before.interfaces, after.interfaces)
    enough_bytes = CARRIED_SHARE * read_bytes
    named_bytes = NAMED_SHARE * read_bytes
    by_rdma = sum(rdma.values()) >= enough_bytes
    by_network = sum(network.values()) >= enough_bytes
    if by_rdma and by_network:
        return Carried(Way.UNCLEAR, (*_busiest(rdma, named_bytes), *_busiest(network, named_bytes)))
    if by_rdma:
        return Carried(Way.RDMA, _busiest(rdma, named_bytes))
    if by_network:
        return Carried(Way.TCP, _busiest(network, named_bytes))
    return Carried(Way.CMA)


def _growth(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Of each device that was there before and after; none of one that was reset."""
    return {name: max(0, after[name] - before[name]) for name in before.keys() & after.keys()}


def _busiest(growth: Mapping[str, int], least_bytes: float) -> tuple[str, ...]:
    named = [name for name, count_bytes in growth.items() if count_bytes >= least_bytes]
    return tuple(sorted(named, key=lambda name: (-growth[name], name)))
