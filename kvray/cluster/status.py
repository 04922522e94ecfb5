"""What is to be seen of a cluster: plain dataclasses, and how they are made out of what the
directory, the NodeStores and Ray say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from kvray.core.reasons import tokens_by_reason, tokens_by_source
from kvray.errors import ConfigError, KVRayError, SlabBusyError, SlabError

if TYPE_CHECKING:
    import pandas as pd


class NodeState(StrEnum):
    """How a node of the cluster is.

    STARTING ──▶ READY ◀──heartbeats, answers──▶ SUSPECT ──▶ LOST (Ray starts it again, if it can)
        │          └──drain──▶ DRAINED (has no NodeStore any more)
        └──────▶ FAILED (can not start, or has no link; tries again)

    A NodeStore that does not answer is a SUSPECT before the directory has missed its heartbeats.
    """

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    LOST = "lost"
    FAILED = "failed"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One Ray node. details: what its NodeStore says of itself, empty if it says nothing."""

    node_id: str
    state: NodeState
    host: str
    epoch: int
    slab_bytes: int
    used_bytes: int
    block_count: int
    client_count: int
    pid: int
    peer_count: int  # nodes that it has a connection to
    problem: str
    details: dict[str, Any]

    def is_settled(self, roster_version: int) -> bool:
        """It serves, knows the roster of that version, and has tried to connect to all on it."""
        return (
            self.state is NodeState.READY
            and self.details["roster_version"] == roster_version
            and not self.details["peers_connecting"]
        )

    def may_settle(self, roster_version: int) -> bool:
        """It is worth waiting for: it starts, or Ray starts it again."""
        is_coming = self.state is NodeState.STARTING or (
            self.state is NodeState.LOST and bool(self.host)
        )
        return is_coming or (self.state is NodeState.READY and not self.is_settled(roster_version))

    @property
    def is_ill(self) -> bool:
        """It does not serve, and nobody has wanted that."""
        return self.state in (NodeState.SUSPECT, NodeState.LOST, NodeState.FAILED)


@dataclass(frozen=True, slots=True)
class Location:
    """One place of a block, as the directory believes it."""

    node_id: str
    epoch: int
    slot: int
    generation: int
    bytes: int
    origin: int  # Origin: 1 is a copy that was fetched from a peer
    suspect: bool  # its node has been silent for a while
    maker: int  # which class of engines has computed it (core.ids.Maker)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    cluster_name: str
    term: int  # of the directory: another one after it was restarted
    roster_version: int
    nodes: tuple[NodeStatus, ...]
    split_models: tuple[str, ...] = ()  # whose engines do not all share; kvray doctor says why
    directory_listeners: tuple[tuple[str, int], ...] = ()  # address and port; see watch.ports

    @property
    def hit_tokens(self) -> dict[str, int]:
        """Prompt tokens of all engines since their NodeStores began, by where they came from:
        device, local, peer, computed. An engine says so when a request has ended.
        """
        return tokens_by_source(self._engine_totals())

    @property
    def miss_tokens(self) -> dict[str, int]:
        """The computed ones by kvray.MissReason, those that there are."""
        return tokens_by_reason(self._engine_totals())

    def _engine_totals(self) -> list[dict[str, int]]:
        return [node.details.get("engine_totals", {}) for node in self.nodes]

    def to_frame(self) -> "pd.DataFrame":
        """One row a node, all fields but details."""
        import pandas as pd

        columns = [name for name in NodeStatus.__slots__ if name != "details"]
        rows = [
            [
                str(getattr(node, name)) if name == "state" else getattr(node, name)
                for name in columns
            ]
            for node in self.nodes
        ]
        return pd.DataFrame(rows, columns=columns)


def node_status(
    node_id: str,
    host: str | None,
    listed: Mapping[str, Any] | None,
    answer: Mapping[str, Any] | None,
    *,
    is_retired: bool,
) -> NodeStatus:
    """host: None if Ray says the node is gone. listed: what the directory says of it. answer: what
    it says of itself. is_retired: it was drained.
    """
    own: Mapping[str, Any] = answer or {}
    problem = own.get("problem") or {}
    return NodeStatus(
        node_id=node_id,
        state=NodeState.DRAINED if is_retired else _judge(host, listed, answer),
        host=host or "",
        epoch=(listed or {}).get("epoch", 0),
        slab_bytes=own.get("slab_bytes", 0),
        used_bytes=own.get("used_bytes", 0),
        block_count=own.get("block_count", 0),
        client_count=own.get("client_count", 0),
        pid=own.get("pid", 0),
        peer_count=own.get("peers_connected", 0),
        problem=problem.get("text", ""),
        details=dict(own),
    )


def _judge(
    host: str | None, listed: Mapping[str, Any] | None, answer: Mapping[str, Any] | None
) -> NodeState:
    phase = answer["phase"] if answer is not None else None
    is_linkless = answer is not None and phase == "linking" and answer.get("problem")
    if phase == "failed" or is_linkless:
        return NodeState.FAILED
    known = listed["state"] if listed is not None else "unknown"
    if known == "suspect" or (known == "alive" and answer is None):
        return NodeState.SUSPECT
    if known == "alive" and phase == "serving":
        return NodeState.READY
    was_there = known != "unknown"  # and is buried
    is_lost = host is None or (was_there and answer is None)
    return NodeState.LOST if is_lost else NodeState.STARTING


def progress_line(node: NodeStatus) -> str:
    line = f"node {node.node_id[:8]}: {node.state}"
    if node.problem:
        return f"{line}: {node.problem}"
    done_bytes, all_bytes = (node.details.get(name, 0) for name in ("cleared_bytes", "slab_bytes"))
    if node.state is NodeState.STARTING and 0 < done_bytes < all_bytes:
        return f"{line}, {done_bytes >> 20} of {all_bytes >> 20} MiB cleared"
    return line


_ERRORS: Mapping[str, type[KVRayError]] = {
    kind.__name__: kind for kind in (ConfigError, SlabError, SlabBusyError)
}


def raise_failures(nodes: Sequence[NodeStatus]) -> None:
    """As the error that the first of them met, with the texts of all."""
    failed = [node for node in nodes if node.state is NodeState.FAILED]
    if failed:
        kind = _ERRORS.get(failed[0].details["problem"]["kind"], SlabError)
        raise kind("; ".join(f"node {node.node_id[:8]}: {node.problem}" for node in failed))
