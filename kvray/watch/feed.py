"""What the page shows: the last status, an hour of history, and what has happened. No clock here.

    page_data(status) ──add, every second or so──▶ Feed ──snapshot──▶ the page

Memory is bounded: POINTS of history, EVENTS of events, and one status of each node. What is counted
by nodes only grows, until one is restarted; a counter that has shrunk has begun again.
"""

from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from kvray.cluster import ClusterStatus, NodeState
from kvray.core.reasons import tokens_by_source
from kvray.watch.tables import engines_of, models_of

POINT_S = 5.0  # of time in one point of history
POINTS = 720  # an hour
EVENTS = 200
MAX_PAIRS = 2_500  # of nodes in the traffic: fifty with each other

# What a person would want to know about a node that has come into this state.
STORIES = {
    NodeState.READY: "serves",
    NodeState.STARTING: "is starting",
    NodeState.SUSPECT: "is silent",
    NodeState.LOST: "is gone",
    NodeState.FAILED: "can not start",
    NodeState.DRAINED: "was drained",
}


def page_data(status: ClusterStatus) -> dict[str, Any]:
    """Of a status what the page needs, as plain data."""
    return {
        "cluster": status.cluster_name,
        "term": status.term,
        "nodes": [
            {
                "node": node.node_id,
                "host": node.host,
                "state": node.state.value,
                "epoch": node.epoch,
                "slab_bytes": node.slab_bytes,
                "used_bytes": node.used_bytes,
                "blocks": node.block_count,
                "engines": len(engines_of(node)),
                "models": models_of(node),
                "problem": node.problem,
                "classes": [
                    {name: row[name] for name in ("slot_bytes", "slots", "occupied")}
                    for row in node.details.get("store", {}).get("classes", [])
                ],
                "from_peers": {
                    peer: row["fetched_bytes"]
                    for peer, row in node.details.get("fetch", {}).get("peers", {}).items()
                },
                "tokens": tokens_by_source([node.details.get("engine_totals", {})]),
                "is_known": bool(node.details),
            }
            for node in status.nodes
        ],
        "hit_tokens": status.hit_tokens,
        "miss_tokens": status.miss_tokens,
        "split_models": list(status.split_models),
    }


class Feed:
    """add() as often as there is a new status; snapshot() for each who looks."""

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None
        self._last_s = 0.0
        self._known: dict[str, dict[str, Any]] = {}  # each node as it last said it was
        self._history: deque[dict[str, float]] = deque(maxlen=POINTS)
        self._traffic: dict[tuple[str, str], float] = {}  # bytes/s to the first from the second
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._silence = ""

    def add(self, now_s: float, data: Mapping[str, Any]) -> None:
        """data: page_data of now."""
        before, self._last = self._last, dict(data)
        passed_s, self._last_s = now_s - self._last_s, now_s
        self._silence = ""
        nodes = {node["node"]: node for node in data["nodes"]}
        self._tell(now_s, before, nodes)
        if before is not None and before["term"] != data["term"]:
            self._note(now_s, "", "the directory was restarted")
        if before is not None and passed_s > 0:
            self._count(now_s, passed_s, nodes)
        self._known = {
            name: node if node["is_known"] else self._known.get(name, node)
            for name, node in nodes.items()
        }

    def silent(self, now_s: float, text: str) -> None:
        """Nobody could be asked."""
        if text != self._silence:
            self._silence = text
            self._note(now_s, "", text)

    def snapshot(self) -> dict[str, Any]:
        """Plain data, for JSON. latest is None until there was a status."""
        return {
            "latest": self._last,
            "at_s": self._last_s,
            "silence": self._silence,
            "point_s": POINT_S,
            "history": list(self._history),
            "traffic": [
                {"to": to, "from": source, "bytes_per_s": rate}
                for (to, source), rate in self._traffic.items()
            ],
            "events": list(self._events),
        }

    def _count(self, now_s: float, passed_s: float, nodes: Mapping[str, Any]) -> None:
        """What has grown since the last status, of nodes that have said something."""
        grown = tokens_by_source([])
        fetched_bytes = 0
        self._traffic = {}
        for name, node in nodes.items():
            old = self._known.get(name)
            if not node["is_known"] or old is None:
                continue
            for source, tokens in node["tokens"].items():
                grown[source] += _growth(old["tokens"].get(source, 0), tokens)
            for peer, count_bytes in node["from_peers"].items():
                came_bytes = _growth(old["from_peers"].get(peer, 0), count_bytes)
                fetched_bytes += came_bytes
                if came_bytes and len(self._traffic) < MAX_PAIRS:
                    self._traffic[name, peer] = came_bytes / passed_s
        if not self._history or now_s >= self._history[-1]["at_s"] + POINT_S:
            self._history.append({"at_s": now_s, "fetched_bytes": 0} | dict.fromkeys(grown, 0))
        point = self._history[-1]
        point["fetched_bytes"] += fetched_bytes
        for source, tokens in grown.items():
            point[source] += tokens

    def _tell(
        self, now_s: float, before: Mapping[str, Any] | None, nodes: Mapping[str, Any]
    ) -> None:
        old = {node["node"]: node for node in before["nodes"]} if before else {}
        for name, node in nodes.items():
            was = old.get(name)
            if was is None or was["state"] != node["state"]:
                story = STORIES[NodeState(node["state"])]
                self._note(now_s, name, f"{story}: {node['problem']}" if node["problem"] else story)
            elif node["epoch"] > was["epoch"] > 0:
                self._note(now_s, name, f"is back in epoch {node['epoch']}")
        for name in old.keys() - nodes.keys():
            self._note(now_s, name, "is forgotten")

    def _note(self, now_s: float, node: str, text: str) -> None:
        self._events.append({"at_s": now_s, "node": node, "text": text})

    def check(self) -> None:
        """Assert the bounds, and that time goes on."""
        assert len(self._history) <= POINTS
        assert len(self._events) <= EVENTS
        assert len(self._traffic) <= MAX_PAIRS
        assert all(one["at_s"] < other["at_s"] for one, other in pairwise(self._history))


def _growth(before: int, now: int) -> int:
    return now - before if now >= before else now
