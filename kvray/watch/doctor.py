"""Why engines share, or do not: checks over what the nodes have said of themselves.

    facts (Ray, ClusterStatus) ──┬──▶ diagnose ──▶ findings, and a verdict: who shares with whom
    links, measured by the nodes ┘

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

from kvray.cluster import ClusterStatus, LinkMeasurement, NodeState, NodeStatus
from kvray.core.way import Outcome, Way
from kvray.watch.ports import ports_of
from kvray.watch.tables import NODE_CHARS, engines_of

MIN_MARGIN_SHARE = 0.02  # of the slab: below this Ray is about to kill workers


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


def diagnose(
    status: ClusterStatus, links: Sequence[LinkMeasurement] = (), *, wants_rdma: bool = False
) -> list[Finding]:
    """All checks, in the order in which they build on each other. links: as Cluster.measure_links
    returns them. wants_rdma: bytes that could go by RDMA and do not are bad.
    """
    ready = [node for node in status.nodes if node.state is NodeState.READY and node.details]
    engines = engines_in(status)
    return [
        *_check_nodes(status),
        *_check_versions(ready),
        *_check_hosts(ready),
        *_check_ports(status),
        *_check_links(ready, links),
        *(_check_rdma(ready, links) if wants_rdma else ()),
        *_check_engines(engines),
        *_check_makers(ready),
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


# What to do about a field of the namespace, where that is not said by its name.
ADVICE = {
    "hash_seed": "Start both with the same PYTHONHASHSEED. ",
    "blocks_per_chunk": "Give both the same chunk_tokens. ",
    "tokens_per_hash": "Give both the same block_size. ",
    "weights_nonce": "What is loaded has no name: see that engine's log. ",
    "attention.isa": "Their CPUs lay out a block otherwise. ",
}


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


def _check_ports(status: ClusterStatus) -> Iterable[Finding]:
    """Nobody can connect where nobody should: UCX asks no one who connects for anything."""
    ports = ports_of(status)
    for port in ports:
        if not port.expected:
            yield Finding(
                Grade.BAD,
                f"port of {port.process}",
                f"listens on {port.address}:{port.port}, which is neither loopback nor the address "
                "of its Ray node. Who connects to UCX can read and write that process's memory: "
                "set UCX_NET_DEVICES to the interface of the cluster's network, before Ray starts",
            )
    if ports and all(port.expected for port in ports):
        where = sorted({port.address for port in ports})
        yield Finding(Grade.GOOD, "ports", f"{len(ports)}, on {', '.join(where)}")


def _check_links(
    nodes: Sequence[NodeStatus], links: Sequence[LinkMeasurement]
) -> Iterable[Finding]:
    """How long a read takes, how fast and which way bytes come, between each two nodes."""
    pairs: defaultdict[frozenset[str], list[LinkMeasurement]] = defaultdict(list)
    for link in links:
        pairs[frozenset((link.node_id, link.peer_id))].append(link)
    for ways in pairs.values():
        judged = [_judge_link(link) for link in ways]
        grade = max((grade for grade, _ in judged), key=list(Grade).index)
        name = f"{ways[0].node_id[:NODE_CHARS]} - {ways[0].peer_id[:NODE_CHARS]}"
        yield Finding(grade, name, "; ".join(text for _, text in judged))
    pair_count = len(nodes) * (len(nodes) - 1) // 2
    if pair_count > len(pairs):
        text = f"{len(pairs)} of {pair_count} pairs of nodes were measured"
        yield Finding(Grade.GOOD, "links", text)


def _judge_link(link: LinkMeasurement) -> tuple[Grade, str]:
    """One way of a link: what was measured, or why nothing was and what to do."""
    name = f"{link.node_id[:NODE_CHARS]} reads"
    match link.outcome:
        case Outcome.MEASURED:
            seen = f"{name} by {_way(link)}: {link.latency_us} us, {link.gb_per_s:.2f} GB/s"
            doubt = _doubt(link)
            return (Grade.WARNING, f"{seen}. {doubt}") if doubt else (Grade.GOOD, seen)
        case Outcome.LATE:
            advice = (
                "Can both hosts reach each other on any port? UCX_NET_DEVICES, set before "
                "`ray start`, names the interface to use"
            )
            return Grade.BAD, f"{name} nothing: {link.reason}. {advice}"
        case Outcome.FAILED:
            return Grade.BAD, f"{name} nothing: {link.reason}. The NodeStore's log says more"
        case Outcome.NOT_CONNECTED:
            advice = "A node that has just joined is there in a moment: ask again"
            return Grade.WARNING, f"{name} nothing: {link.reason}. {advice}"
        case Outcome.SKIPPED:
            return Grade.WARNING, f"{name} nothing, it was not measured: {link.reason}"


def _doubt(link: LinkMeasurement) -> str:
    """What is odd about the way that bytes have come; empty if nothing is."""
    if link.way is Way.UNCLEAR and link.devices:
        return (
            "All of these have counted as many bytes: ask again when others send less, unless it "
            "is TCP over InfiniBand, which both count"
        )
    if link.way is Way.UNCLEAR:
        return (
            "These are two machines, and no counter of the one that reads has seen the bytes: "
            "they came by a device whose counters it can not read"
        )
    if link.way is Way.TCP and not link.is_far:
        return (
            "These are on one machine, and bytes could be copied in memory: UCX needs one pid "
            "namespace, leave to use process_vm_readv, and a UCX_TLS that does not forbid it"
        )
    return ""


def _check_rdma(nodes: Sequence[NodeStatus], links: Sequence[LinkMeasurement]) -> Iterable[Finding]:
    """That bytes go by RDMA between all hosts that have a device for it."""
    facts = {node.node_id: _facts(node) for node in nodes}
    if not any(host.get("rdma_devices") for host in facts.values()):
        yield Finding(
            Grade.WARNING,
            "rdma",
            "nothing could be checked: no node has an RDMA device, or its container does not see "
            "/sys/class/infiniband",
        )
        return
    judged = [
        finding
        for link in links
        if link.outcome is Outcome.MEASURED and link.is_far
        for finding in _judge_rdma(link, facts)
    ]
    yield from judged
    if not judged:
        text = "nothing could be checked: no link between two machines was measured"
        yield Finding(Grade.WARNING, "rdma", text)


def _judge_rdma(link: LinkMeasurement, facts: Mapping[str, Mapping[str, Any]]) -> Iterable[Finding]:
    ends = (link.node_id, link.peer_id)
    node, peer = (end[:NODE_CHARS] for end in ends)
    without = [end[:NODE_CHARS] for end in ends if not facts.get(end, {}).get("rdma_devices")]
    if link.way is Way.RDMA:
        yield Finding(Grade.GOOD, "rdma", f"{node} reads from {peer} by {_way(link)}")
    elif without:
        text = f"{node} reads from {peer} by {_way(link)}: no RDMA device on {', '.join(without)}"
        yield Finding(Grade.WARNING, "rdma", text)
    else:
        seen = "; ".join(f"on {end[:NODE_CHARS]} {_rdma_facts(facts[end])}" for end in ends)
        yield Finding(
            Grade.BAD,
            "rdma",
            f"{node} reads from {peer} by {_way(link)}, and both have RDMA devices: {seen}. What "
            "RDMA needs: an unlimited memlock (`ulimit -l unlimited`, `docker run --ulimit "
            "memlock=-1`), /dev/infiniband in the container (`--device=/dev/infiniband`), a "
            "UCX_TLS and UCX_NET_DEVICES that do not forbid it, an active port, and a GID that "
            "both reach (UCX_IB_GID_INDEX)",
        )


def _rdma_facts(host: Mapping[str, Any]) -> str:
    memlock = host.get("memlock_bytes", -1)
    ports = [f"{name} {state}" for name, state in host.get("rdma_ports", {}).items()]
    settings = [f"{name}={value}" for name, value in host.get("ucx_settings", {}).items()]
    return ", ".join(
        [
            *(ports or host["rdma_devices"]),
            f"memlock {'unlimited' if memlock < 0 else f'{memlock} bytes'}",
            "/dev/infiniband is there" if host.get("has_verbs") else "no /dev/infiniband/uverbs*",
            *(settings or ["no setting of UCX"]),
        ]
    )


def _check_engines(engines: Sequence[Engine]) -> Iterable[Finding]:
    """Engines of one model that do not share, with what differs."""
    for one, other in _pairs_of_a_model(engines):
        fields = differing(one, other)
        said = "; ".join(f"{name}: {a} and {b}" for name, (a, b) in fields.items()) or "weights"
        advice = "".join(ADVICE[name] for name in fields if name in ADVICE)
        yield Finding(
            Grade.BAD,
            "namespaces",
            f"{one.name} and {other.name} share nothing. {advice}They differ in {said}",
        )
    for engine in engines:
        yield Finding(Grade.GOOD, "engine", f"{engine.name}, namespace {engine.namespace[:8]}")


def _check_makers(nodes: Sequence[NodeStatus]) -> Iterable[Finding]:
    """Makers that compute different blocks under one name, and engines without a maker."""
    told: set[tuple[str, frozenset[str]]] = set()
    for node in nodes:
        trust = node.details.get("trust", {})
        for pair in trust.get("pairs", ()):
            name = pair["namespace"], frozenset((pair["mine"], pair["other"]))
            if pair["state"] != "different" or name in told:
                continue
            told.add(name)
            makers = " and ".join(f"{maker} ({_users(nodes, maker)})" for maker in sorted(name[1]))
            yield Finding(
                Grade.BAD,
                "canaries",
                f"under namespace {pair['namespace'][:8]} these makers compute different blocks, "
                f"and share none: {makers}. Compare their builds and hardware, and give one of "
                f"them a model_tag of its own if that is meant to be so",
            )
        for engine in engines_of(node) if trust.get("requires_proof") else ():
            if int(engine.get("maker", "0"), 16) == 0:
                where = (
                    f"{engine['model']} (pid {engine['pid']} on node {node.node_id[:NODE_CHARS]})"
                )
                text = f"{where} has not computed its canary, and is without a cache until it has"
                yield Finding(Grade.WARNING, "canaries", text)


def _users(nodes: Sequence[NodeStatus], maker: str) -> str:
    """The engines that are this maker."""
    names = [
        f"{engine['model']}, pid {engine['pid']} on node {node.node_id[:NODE_CHARS]}"
        for node in nodes
        for engine in engines_of(node)
        if engine.get("maker") == maker
    ]
    return "; ".join(names) or "none is there now"


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


def _way(link: LinkMeasurement) -> str:
    devices = f" ({', '.join(link.devices)})" if link.devices else ""
    return f"{link.way}{devices}"
