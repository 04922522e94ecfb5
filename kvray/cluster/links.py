"""How good the links between the nodes are: each is measured by its two ends, one after another.

    pairs_of(nodes) ──▶ node ◀─ reads ─ peer, then the other way round ──▶ LinkMeasurement

One at a time, so that no measurement is in the way of another. What is measured is what a fetch
does: one-sided reads by the NodeStore of a node out of the slab of its peer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvray.cluster.placement import gather
from kvray.cluster.status import NodeStatus
from kvray.core.way import Outcome, Way
from kvray.node.measuring import COUNTER_LAG_S, DEADLINE_MS

MAX_PAIRS = 64  # 80 MB each, so 5 GB in all; a larger cluster is looked at in part
ALL_DEADLINE_S = 120.0  # 64 pairs at 10 GbE take 20 s; this is what hosts that are silent may cost
# Of one call: its own deadline, the counters' lag, and a busy host.
CALL_DEADLINE_S = DEADLINE_MS / 1_000 + COUNTER_LAG_S + 3.0

Say = Callable[[str], None]  # takes one line for people
Pair = tuple[NodeStatus, NodeStatus]


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """What node `node_id` found when it read from node `peer_id`.

    is_far: they are on two machines. way: None if it is not MEASURED, and then reason says why.
    devices: those of node_id that have counted the bytes. latency_us: median of reads of 64 bytes,
    as kvray's link thread does them. gb_per_s: median of reads of 8 MiB, 10^9 bytes a second.
    """

    node_id: str
    peer_id: str
    is_far: bool
    outcome: Outcome
    reason: str = ""
    way: Way | None = None
    devices: tuple[str, ...] = ()
    latency_us: int = 0
    gb_per_s: float = 0.0
    read_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self) | {"devices": list(self.devices)}
        return {"node": data.pop("node_id"), "peer": data.pop("peer_id"), **data}


def pairs_of(nodes: Sequence[NodeStatus]) -> list[Pair]:
    """Those that are measured: all, or MAX_PAIRS of them so that each node is in as many."""
    count = len(nodes)
    pairs = [
        (nodes[i], nodes[(i + step) % count])
        for step in range(1, count // 2 + 1)
        for i in range(count if 2 * step < count else count // 2)
    ]
    return pairs[:MAX_PAIRS]


def measure_links(
    nodes: Sequence[NodeStatus],
    stores: Mapping[str, Any],
    progress: Say | None = None,
    *,
    deadline_s: float = ALL_DEADLINE_S,
    clock_s: Callable[[], float] = time.monotonic,
) -> tuple[LinkMeasurement, ...]:
    """Both ways of each pair. stores: handles of the NodeStores by node id. What has not begun by
    the deadline is SKIPPED.
    """
    end_s = clock_s() + deadline_s
    pairs = pairs_of(nodes)
    found = []
    for number, pair in enumerate(pairs):
        for node, peer in (pair, pair[::-1]):
            if progress is not None:
                names = f"{node.node_id[:8]} reads from {peer.node_id[:8]}"
                progress(f"measuring link {number + 1} of {len(pairs)}: {names}")
            if clock_s() >= end_s:
                reason = f"the {deadline_s:.0f} s for all links were used up"
                found.append(_skipped(node, peer, reason))
            else:
                found.append(_measure(node, peer, stores.get(node.node_id)))
    return tuple(found)


def _measure(node: NodeStatus, peer: NodeStatus, store: Any) -> LinkMeasurement:  # noqa: ANN401
    if store is None:
        return _skipped(node, peer, "it has no NodeStore")
    is_far = _is_far(node, peer)
    call = store.measure_link.remote(peer.node_id, is_far=is_far)
    answer = gather({node.node_id: call}, CALL_DEADLINE_S)[node.node_id]
    if answer is None:
        return _skipped(node, peer, "its NodeStore does not answer; see `kvray status`")
    return LinkMeasurement(
        node_id=node.node_id,
        peer_id=peer.node_id,
        is_far=is_far,
        outcome=Outcome(answer["outcome"]),
        reason=answer["reason"],
        way=Way(answer["way"]) if answer["way"] else None,
        devices=tuple(answer["devices"]),
        latency_us=answer["latency_us"],
        gb_per_s=answer["gb_per_s"],
        read_bytes=answer["read_bytes"],
    )


def _skipped(node: NodeStatus, peer: NodeStatus, reason: str) -> LinkMeasurement:
    is_far = _is_far(node, peer)
    return LinkMeasurement(node.node_id, peer.node_id, is_far, Outcome.SKIPPED, reason)


def _is_far(node: NodeStatus, peer: NodeStatus) -> bool:
    """By their boot ids; a node that does not tell its own is taken for a machine of its own."""
    here, there = (
        one.details.get("host_facts", {}).get("boot_id", one.node_id) for one in (node, peer)
    )
    return bool(here != there)
