"""What nodes would have said of themselves, for tests of what people are shown."""

import json
from typing import Any

from kvray.cluster import ClusterStatus, NodeState, NodeStatus

GIB = 1 << 30
FIELDS = {"hash_seed": '"1"', "model_dtype": '"bfloat16"', "blocks_per_chunk": "8"}


def engine(model: str = "llama", *, pid: int = 1, **fields: str) -> dict[str, Any]:
    own = FIELDS | fields
    return {
        "role": "engine",
        "state": "open",
        "pid": pid,
        "model": model,
        "namespace": f"{hash(json.dumps(own)) & 0xFFFFFFFF:08x}",
        "fields": own,
        "maker": "0000000100000001",
    }


def node(
    name: str,
    *engines: dict[str, Any],
    state: NodeState = NodeState.READY,
    problem: str = "",
    locked: bool = True,
    totals: dict[str, int] | None = None,
    rate: float | None = None,
    from_peers: dict[str, int] | None = None,
    epoch: int = 7,
    **facts: Any,
) -> NodeStatus:
    details = {
        "clients": [*engines, {"role": "worker", "state": "open", "pid": 9}],
        "slab": {"locked_in_memory": locked, "slab_bytes": GIB, "extent_bytes": 16 << 20},
        "host_facts": {
            "versions": {"kvray": "1", "ray": "2.60.0", "nixl": "1.5.1", "python": "3.11.7"},
            "boot_id": "this machine",
            "memlock_bytes": 65_536,
            "memory_margin_bytes": 64 * GIB,
            "shm_free_bytes": 8 * GIB,
            "rdma_devices": [],
            "node_address": "198.51.100.2",
            "listeners": [["::", 16_004], ["198.51.100.2", 37_423]],
        }
        | facts,
        "engine_totals": totals or {},
        "fetch": {
            "fetched_bytes": 2 * 10**9,
            "fetch_busy_ms": 1_000,
            "peers": {
                peer: {"bytes_per_ms": rate, "fetched_bytes": count_bytes}
                for peer, count_bytes in (from_peers or {"b" * 56: 0}).items()
            },
        },
        "storing": {"committed": 5, "dropped": 1},
        "store": {
            "classes": [
                {"slot_bytes": 1 << 20, "extents": 2, "slots": 32, "occupied": 3, "busy": 0}
            ]
        },
    }
    return NodeStatus(
        node_id=name * 56,
        state=state,
        host="host",
        epoch=epoch,
        slab_bytes=GIB,
        used_bytes=GIB // 2,
        block_count=3,
        client_count=2,
        pid=1,
        peer_count=1,
        problem=problem,
        details={} if state is NodeState.LOST else details,
    )


def cluster(*nodes: NodeStatus, term: int = 1) -> ClusterStatus:
    return ClusterStatus("default", term=term, roster_version=1, nodes=nodes)
