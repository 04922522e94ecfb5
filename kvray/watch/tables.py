"""What is printed for people, and the same as data: plain dicts for --json, rich tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvray.cluster import ClusterStatus, NodeState, NodeStatus

GIB = 1 << 30
NODE_CHARS = 8  # of a node id, for people
STATE_STYLES = {
    NodeState.READY: "green",
    NodeState.STARTING: "cyan",
    NodeState.SUSPECT: "red",
    NodeState.DRAINED: "dim",
    NodeState.LOST: "red",
    NodeState.FAILED: "red",
}


def status_data(status: ClusterStatus, *, page_url: str | None = None) -> dict[str, Any]:
    """What `kvray status --json` prints."""
    return {
        "cluster": status.cluster_name,
        "nodes": [_node_data(node) for node in status.nodes],
        "hit_tokens": status.hit_tokens,
        "miss_tokens": status.miss_tokens,
        "fetched_bytes": _sum(status, "fetch", "fetched_bytes"),
        "fetch_gb_per_s": fetch_gb_per_s(status),
        "stored_blocks": _sum(status, "storing", "committed"),
        "dropped_stores": _sum(status, "storing", "dropped"),
        "canaries_equal": _sum(status, "trust", "canaries_equal"),
        "canaries_different": _sum(status, "trust", "canaries_different"),
        "audited_chunks": _sum(status, "trust", "audited_chunks"),
        "audit_mismatch": _sum(status, "trust", "audit_mismatch"),
        "page_url": page_url,
    }


def _node_data(node: NodeStatus) -> dict[str, Any]:
    return {
        "node": node.node_id,
        "host": node.host,
        "epoch": node.epoch,
        "state": node.state.value,
        "slab_bytes": node.slab_bytes,
        "used_bytes": node.used_bytes,
        "blocks": node.block_count,
        "models": models_of(node),
        "peers": node.peer_count,
        "problem": node.problem,
    }


def models_of(node: NodeStatus) -> list[str]:
    """What the engines that are attached to it serve."""
    return sorted({engine["model"] for engine in engines_of(node)})


def engines_of(node: NodeStatus) -> list[dict[str, Any]]:
    """Its engines that are there."""
    clients = node.details.get("clients", [])
    return [c for c in clients if c["role"] == "engine" and c["state"] in ("open", "silent")]


def fetch_gb_per_s(status: ClusterStatus) -> float | None:
    """While something was being fetched, over all nodes; None if nothing was."""
    busy_ms = _sum(status, "fetch", "fetch_busy_ms")
    fetched_bytes = _sum(status, "fetch", "fetched_bytes")
    return round(fetched_bytes / busy_ms / 1e6, 2) if busy_ms else None


def _sum(status: ClusterStatus, part: str, name: str) -> int:
    return sum(node.details.get(part, {}).get(name, 0) for node in status.nodes)


# -- for people ---------------------------------------------------------------------------------


def status_view(status: ClusterStatus) -> Group:
    data = status_data(status)
    rate = f" at {data['fetch_gb_per_s']} GB/s" if data["fetch_gb_per_s"] is not None else ""
    moved = (
        f"{data['fetched_bytes'] / 1e9:,.2f} GB fetched from peers{rate}; "
        f"{data['stored_blocks']:,} blocks stored, {data['dropped_stores']:,} stores dropped"
    )
    tokens = _token_table(data["hit_tokens"], data["miss_tokens"])
    lines = [Text(moved)]
    if data["canaries_different"]:
        text = "engines compute different blocks under the same names: see `kvray doctor`"
        lines.append(Text(text, style="red"))
    return Group(_node_table(status), tokens, *lines)


def _node_table(status: ClusterStatus) -> Table:
    table = Table("node", "host", "state", "slab", "used", "blocks", "engines", "models", "peers")
    table.title = f"kvray cluster {status.cluster_name}"
    for node in status.nodes:
        table.add_row(
            node.node_id[:NODE_CHARS],
            node.host,
            Text(node.state.value, style=STATE_STYLES[node.state]),
            f"{node.slab_bytes / GIB:.2f} GiB",
            f"{node.used_bytes / node.slab_bytes:.0%}" if node.slab_bytes else "",
            f"{node.block_count:,}",
            str(len(engines_of(node))),
            ", ".join(Path(model).name for model in models_of(node)),
            str(node.peer_count),
        )
        if node.problem:
            table.add_row("", Text(node.problem, style="red"))
    return table


def _token_table(hits: Mapping[str, int], misses: Mapping[str, int]) -> Table:
    """Each source, and each reason beneath `computed`."""
    all_tokens = sum(hits.values())
    table = Table("prompt tokens", "count", "share")
    for name, tokens in hits.items():
        table.add_row(name, f"{tokens:,}", f"{tokens / all_tokens:.1%}" if all_tokens else "")
    for reason, tokens in sorted(misses.items(), key=lambda item: -item[1]):
        table.add_row(Text(f"  {reason}", style="dim"), f"{tokens:,}", f"{tokens / all_tokens:.1%}")
    return table
