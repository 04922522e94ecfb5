"""Why engines share, or do not: checks over what the nodes have said of themselves.

    facts (Ray, ClusterStatus) ──▶ diagnose ──▶ findings, and a verdict: who shares with whom

A finding is good, a warning (it works, but worse than it could) or bad (something does not work).
Engines share exactly if their namespaces are equal; where two of one model are not, the fields that
differ are named.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

from kvray.cluster import ClusterStatus, NodeState, NodeStatus
from kvray.watch.tables import NODE_CHARS, engines_of

MIN_MARGIN_SHARE = 0.02  # of the slab: below this Ray is about to kill workers
MAX_PAIRS = 64  # of nodes, whose way is told one by one


class Grade(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """check: what was looked at. text: what was found, and where it is not good, what to do."""

    grade: Grade
    check: str
    text: str

    def to_dict(self) -> dict[str, str]:
        return {"grade": self.grade.value, "check": self.check, "text": self.text}


@dataclass(frozen=True, slots=True)
class Engine:
    """One attached engine."""

    node_id: str
    pid: int
    model: str
    namespace: str
    fields: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.model} (pid {self.pid} on node {self.node_id[:NODE_CHARS]})"


def diagnose(status: ClusterStatus) -> list[Finding]:
    """All checks, in the order in which they build on each other."""
    ready = [node for node in status.nodes if node.state is NodeState.READY and node.details]
    engines = engines_in(status)
    return [
        *_check_nodes(status),
        *_check_versions(ready),
        *_check_hosts(ready),
        *_check_ways(ready),
        *_check_engines(engines),
    ]


def verdict(status: ClusterStatus) -> str:
    """The last line: who will share with whom, or why nobody does."""
    engines = engines_in(status)
    if not engines:
        return "no engine is attached: kvray.attach(llm), or see README for the other doors"
    groups: defaultdict[str, list[Engine]] = defaultdict(list)
    for engine in engines:
        groups[engine.namespace].append(engine)
    sharing = [group for group in groups.values() if len(group) > 1]
    if sharing:
        return "; ".join(
            f"kvray will share between {' and '.join(e.name for e in group)}" for group in sharing
        )
    if len(engines) == 1:
        return f"{engines[0].name} is alone: a second engine of this model would share with it"
    said = [
        f"{one.name} and {other.name} differ in {', '.join(differing(one, other)) or 'weights'}"
        for one, other in _pairs_of_a_model(engines)
    ]
    return f"no two engines share: {'; '.join(said) or 'no two serve the same model'}"


def engines_in(status: ClusterStatus) -> list[Engine]:
    return [
        Engine(node.node_id, engine["pid"], engine["model"], engine["namespace"], engine["fields"])
        for node in status.nodes
        for engine in engines_of(node)
    ]


def differing(one: Engine, other: Engine) -> dict[str, tuple[str, str]]:
    """The fields of two namespaces that are not equal, with both values."""
    names = sorted({*one.fields, *other.fields})
    pairs = {name: (one.fields.get(name, ""), other.fields.get(name, "")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# -- checks -------------------------------------------------------------------------------------


def _check_nodes(status: ClusterStatus) -> Iterable[Finding]:
    """One NodeStore that serves on each Ray node."""
    for node in status.nodes:
        name = f"node {node.node_id[:NODE_CHARS]}"
        match node.state:
            case NodeState.READY:
                yield Finding(Grade.GOOD, name, f"serves as epoch {node.epoch}, on {node.host}")
            case NodeState.DRAINED:
                yield Finding(Grade.WARNING, name, "was drained: `kvray stop`, `kvray start`")
            case NodeState.STARTING:
                yield Finding(Grade.WARNING, name, "is starting; ask again in a moment")
            case _:
                text = node.problem or "Ray restarts its NodeStore; see its log"
                yield Finding(Grade.BAD, name, f"is {node.state}: {text}")
    if not status.nodes:
        yield Finding(Grade.BAD, "nodes", "the Ray cluster has no node; is it starting?")


def _check_versions(nodes: Sequence[NodeStatus]) -> Iterable[Finding]:
    """Equal everywhere."""
    for package in ("kvray", "ray", "nixl", "python"):
        found: defaultdict[str, list[str]] = defaultdict(list)
        for node in nodes:
            version = _facts(node).get("versions", {}).get(package, "unknown")
            found[version].append(node.node_id[:NODE_CHARS])
        if len(found) > 1:
            said = "; ".join(f"{version} on {', '.join(ids)}" for version, ids in found.items())
            text = f"{said}. Install the same version on every node"
            yield Finding(Grade.BAD if package != "python" else Grade.WARNING, package, text)
        elif found:
            yield Finding(Grade.GOOD, package, next(iter(found)))


def _check_hosts(nodes: Sequence[NodeStatus]) -> Iterable[Finding]:
    """Memory: locked, and far from what makes Ray kill workers."""
    for node in nodes:
        name, facts = f"memory of {node.node_id[:NODE_CHARS]}", _facts(node)
        slab = node.details.get("slab", {})
        if not slab.get("locked_in_memory", False):
            limit = facts.get("memlock_bytes", -1)
            may = "no limit" if limit < 0 else f"{limit} bytes"
            yield Finding(
                Grade.WARNING,
                name,
                f"the slab is not locked and may be swapped out (memlock: {may}). Raise it: "
                "`ulimit -l unlimited`, `docker run --ulimit memlock=-1`",
            )
        margin = facts.get("memory_margin_bytes", -1)
        if 0 <= margin < MIN_MARGIN_SHARE * node.slab_bytes:
            yield Finding(
                Grade.WARNING,
                name,
                f"Ray begins to kill workers when {margin} more bytes are in use: make slab_bytes "
                "smaller, or raise RAY_memory_usage_threshold",
            )
        else:
            free_gb = facts.get("shm_free_bytes", 0) / 1e9
            yield Finding(
                Grade.GOOD,
                name,
                f"slab {node.slab_bytes / 1e9:.2f} GB, /dev/shm has {free_gb:.2f} GB free",
            )


def _check_ways(nodes: Sequence[NodeStatus]) -> Iterable[Finding]:
    """How blocks go between each two nodes, and how fast they went."""
    for one, other in list(combinations(nodes, 2))[:MAX_PAIRS]:
        name = f"{one.node_id[:NODE_CHARS]} - {other.node_id[:NODE_CHARS]}"
        rates = [
            rate
            for here, there in ((one, other), (other, one))
            if (rate := _rate(here, there.node_id)) is not None
        ]
        speed = (
            f"{max(rates) / 1e6:.2f} GB/s when blocks were last fetched"
            if rates
            else "nothing was fetched yet, so its speed is not known"
        )
        if len(nodes) > 1 and not (one.peer_count and other.peer_count):
            yield Finding(
                Grade.WARNING, name, "not connected yet: a first read makes the connection"
            )
            continue
        yield Finding(Grade.GOOD, name, f"{_way(_facts(one), _facts(other))}; {speed}")


def _check_engines(engines: Sequence[Engine]) -> Iterable[Finding]:
    """Engines of one model that do not share, with what differs."""
    for one, other in _pairs_of_a_model(engines):
        fields = differing(one, other)
        said = "; ".join(f"{name}: {a} and {b}" for name, (a, b) in fields.items()) or "weights"
        advice = "Start both with the same PYTHONHASHSEED. " if "hash_seed" in fields else ""
        yield Finding(
            Grade.BAD,
            "namespaces",
            f"{one.name} and {other.name} share nothing. {advice}They differ in {said}",
        )
    for engine in engines:
        yield Finding(Grade.GOOD, "engine", f"{engine.name}, namespace {engine.namespace[:8]}")


def _pairs_of_a_model(engines: Sequence[Engine]) -> Iterable[tuple[Engine, Engine]]:
    """One pair of engines of the same model for each two of its namespaces."""
    firsts: dict[tuple[str, str], Engine] = {}
    for engine in engines:
        firsts.setdefault((engine.model, engine.namespace), engine)
    for one, other in combinations(firsts.values(), 2):
        if one.model == other.model:
            yield one, other


def _facts(node: NodeStatus) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = node.details.get("host_facts", {})
    return facts


def _rate(node: NodeStatus, peer_id: str) -> float | None:
    """bytes/ms of what came from this peer lately."""
    peer = node.details.get("fetch", {}).get("peers", {}).get(peer_id, {})
    rate: float | None = peer.get("bytes_per_ms")
    return rate


def _way(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What UCX chooses between two such hosts, unless UCX_TLS says otherwise."""
    if one.get("boot_id") == other.get("boot_id"):
        return "one machine: shared memory (cma) if the kernel allows it, else tcp"
    if one.get("rdma_devices") and other.get("rdma_devices"):
        return f"rdma ({', '.join(one['rdma_devices'])})"
    return "tcp (no RDMA device on both)"
