"""Which replica a request should go to. Pure: what lies where and who is how busy in, costs out.

    the prompt's chunks   [ device ][ slab of its node ][ slab of a peer ][ nowhere ]
    cost of a replica      nothing    local copy          link              prefill     + its queue

Without kvray the two in the middle do not exist, and what the device lacks is computed.

What a device holds nobody tells a router, so it keeps a memory of its own: which chunks it has sent
where, as long as the youngest of them fit into the device (Recent). The slabs are remembered in the
same way, each chunk at the node that computed it. A queue is remembered as the time at which the
replica will have computed what was sent to it: it drains by itself, so a router that misses a
completion recovers.

A hot prefix spreads through its queue: the replica that has it is the best until waiting there
costs more than bringing the prefix elsewhere, which with kvray is one copy over a link. From then
on two replicas have it. Nothing is replicated ahead of a request.

All of it is an estimate that costs time when it is wrong, and never an answer.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

MAX_REPLICAS = 1_024  # of one deployment; ranking is linear in them
MAX_CHUNKS = 4_096  # of a prompt: 2 Mi tokens in chunks of 512; what is longer is computed anyway
# Costs so close are a tie: estimates are not better. It goes to whom has fewer requests without an
# answer, and of those to whom was chosen least lately.
TIE_MS = 1.0
# Of any load, beside its bytes: a look-up, its answer, a job of the workers. A peer hit of the tiny
# model takes some ms longer than its bytes do on the link (benchmarks/ttft.py).
LOAD_OVERHEAD_MS = 2.0

Chunk = Hashable  # equal chunks are equal prefixes up to their ends, as block hashes are
_Run = tuple[str, int, int]  # a node, and [start, stop) of the chunks that it has


@dataclass(frozen=True, slots=True)
class Rates:
    """How long a token takes, in ms. copy_ms: from the own node's slab. link_ms: from a peer's,
    where links_ms does not say better: by (node that reads, node that is read from).
    """

    prefill_ms: float
    copy_ms: float
    link_ms: float
    links_ms: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def link(self, reader: str, owner: str) -> float:
        return self.links_ms.get((reader, owner), self.link_ms)


@dataclass(frozen=True, slots=True)
class Held:
    """The tokens of a prompt by where they are for one replica; what is missing is computed.
    peers: tokens, and what one of them takes over that link, in ms.
    """

    device_tokens: int
    local_tokens: int
    peers: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a prompt would cost on one replica, in ms until its first token."""

    replica: str
    wait_ms: float  # for the queue, or for the load where that takes longer
    load_ms: float
    compute_ms: float

    @property
    def total_ms(self) -> float:
        return self.wait_ms + self.compute_ms


def cost_of(replica: str, prompt_tokens: int, held: Held, *, queue_ms: float, rates: Rates) -> Cost:
    """Loads run while the queue is computed. What a peer has is computed where that is quicker."""
    load_ms = held.local_tokens * rates.copy_ms
    missing = prompt_tokens - held.device_tokens - held.local_tokens
    for peer_tokens, link_ms in held.peers:
        if link_ms < rates.prefill_ms:
            load_ms += peer_tokens * link_ms
            missing -= peer_tokens
    if load_ms:
        load_ms += LOAD_OVERHEAD_MS
    # At least one token is always computed: it makes the answer's first.
    return Cost(replica, max(queue_ms, load_ms), load_ms, max(1, missing) * rates.prefill_ms)


class Recent:
    """The chunks that fit into a cache with LRU, were it given no others than these."""

    def __init__(self, limit: int) -> None:
        assert limit > 0
        self._limit = limit
        self._order: OrderedDict[Chunk, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def prefix(self, chunks: Sequence[Chunk]) -> int:
        """How many of them, from the first on, are there without a gap."""
        order = self._order
        for index, chunk in enumerate(chunks):
            if chunk not in order:
                return index
        return len(chunks)

    def use(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """They were used; the tail goes before the head. Returns those that went."""
        order, gone = self._order, []
        for chunk in reversed(chunks):
            order[chunk] = None
            order.move_to_end(chunk)
        while len(order) > self._limit:
            gone.append(order.popitem(last=False)[0])
        return gone


class Replica:
    """What a router remembers of one."""

    __slots__ = ("busy_until_ms", "device", "last_routed", "node", "open_count")

    def __init__(self, node: str, device_chunks: int) -> None:
        self.node = node
        self.device = Recent(device_chunks)
        self.busy_until_ms = 0.0
        self.open_count = 0
        self.last_routed = 0


class Slabs:
    """Which node has which chunk, and since when: each at one node, the youngest of a node's stay.

    A chunk that is being computed can be read when that is done, so its time may lie ahead.
    """

    def __init__(self, slab_chunks: int) -> None:
        self._slab_chunks = slab_chunks
        self._nodes: dict[str, Recent] = {}
        self._home: dict[Chunk, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._home)

    def keep_only(self, nodes: Collection[str]) -> None:
        """The others are gone, with what they held."""
        gone = self._nodes.keys() - set(nodes)
        if not gone:
            return
        for node in gone:
            del self._nodes[node]
        self._home = {chunk: home for chunk, home in self._home.items() if home[0] in nodes}

    def homes(self, chunks: Sequence[Chunk]) -> tuple[list[str], list[float]]:
        """The node of each, and from when on it can be read; never, if nobody has it."""
        nodes: list[str] = []
        ready_ms: list[float] = []
        for chunk in chunks:
            home = self._home.get(chunk)
            nodes.append(home[0] if home else "")
            ready_ms.append(home[1] if home else math.inf)
        return nodes, ready_ms

    def use(self, node: str, chunks: Sequence[Chunk], *, ready_ms: float) -> None:
        """A replica on this node has them then: what nobody had is kept here."""
        mine: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            owner, _ = self._home.setdefault(chunk, (node, ready_ms))
            mine.setdefault(owner, []).append(chunk)
        for owner, used in mine.items():
            if owner not in self._nodes:
                self._nodes[owner] = Recent(self._slab_chunks)
            for chunk in self._nodes[owner].use(used):
                del self._home[chunk]

    def are_ready(self, chunks: Sequence[Chunk], *, now_ms: float) -> None:
        """Whoever has them has computed them, sooner than was thought."""
        for chunk in chunks:
            home = self._home.get(chunk)
            if home is not None and home[1] > now_ms:
                self._home[chunk] = (home[0], now_ms)

    def check(self) -> None:
        assert sum(map(len, self._nodes.values())) == len(self._home), "a chunk of no home"


class Ranking:
    """The memory of one router, and the order of replicas that follows from it.

    device_chunks, slab_chunks: how many chunks a device and a node's slab hold. slab_chunks = 0:
    without kvray. All times are of one clock, in ms, and never go back.
    """

    def __init__(self, rates: Rates, *, device_chunks: int, slab_chunks: int) -> None:
        self.rates = rates
        self._device_chunks = device_chunks
        self._slabs = Slabs(slab_chunks) if slab_chunks else None
        self._replicas: dict[str, Replica] = {}
        self._serving: frozenset[str] = frozenset()  # nodes whose slab can be reached
        self._routed_count = 0

    def set_replicas(
        self, nodes: Mapping[str, str], *, serving: Collection[str] | None = None
    ) -> None:
        """nodes: of each replica its node. Who stays is remembered, who left is forgotten.
        serving: the nodes whose slab can be reached, None for all.
        """
        assert len(nodes) <= MAX_REPLICAS
        self._replicas = {
            name: known
            if (known := self._replicas.get(name)) and known.node == node
            else Replica(node, self._device_chunks)
            for name, node in nodes.items()
        }
        if self._slabs is not None:
            self._serving = frozenset(nodes.values() if serving is None else serving)
            self._slabs.keep_only(self._serving)

    def rank(
        self,
        chunks: Sequence[Chunk],
        prompt_tokens: int,
        *,
        chunk_tokens: int,
        now_ms: float,
        among: Sequence[str] | None = None,
    ) -> list[Cost]:
        """The replicas, the cheapest first. among: those to choose from, None for all; who is not
        known has no cost. A tail that fills no chunk is in no chunk.
        """
        chunks = chunks[:MAX_CHUNKS]
        homes, ready_ms = self._slabs.homes(chunks) if self._slabs is not None else ([], [])
        runs = _runs(homes)
        unread = [(index, at_ms) for index, at_ms in enumerate(ready_ms) if at_ms > now_ms]
        names = self._replicas if among is None else [n for n in among if n in self._replicas]
        costs: list[Cost] = []
        for name in names:
            replica = self._replicas[name]
            on_device = replica.device.prefix(chunks)
            queue_ms = max(0.0, replica.busy_until_ms - now_ms)
            # kvray asks again when the request's turn comes: what is there by then counts.
            turn_ms = now_ms + queue_ms
            end = next((i for i, at_ms in unread if i >= on_device and at_ms > turn_ms), len(homes))
            if replica.node not in self._serving:
                end = on_device
            held = self._held(replica.node, runs, (on_device, end), chunk_tokens)
            costs.append(cost_of(name, prompt_tokens, held, queue_ms=queue_ms, rates=self.rates))
        best_ms = min((cost.total_ms for cost in costs), default=0.0)
        return sorted(costs, key=lambda cost: self._order(cost, best_ms))

    def routed(self, cost: Cost, chunks: Sequence[Chunk], *, now_ms: float) -> None:
        """The request went to that replica, which may have left meanwhile."""
        replica = self._replicas.get(cost.replica)
        if replica is None:
            return
        chunks = chunks[:MAX_CHUNKS]
        self._routed_count += 1
        replica.last_routed = self._routed_count
        replica.open_count += 1
        starts_ms = max(now_ms + cost.load_ms, replica.busy_until_ms)
        replica.busy_until_ms = starts_ms + cost.compute_ms
        replica.device.use(chunks)
        if self._slabs is not None and replica.node in self._serving:
            self._slabs.use(replica.node, chunks, ready_ms=replica.busy_until_ms)

    def withdrawn(self, cost: Cost, *, now_ms: float) -> None:
        """A request that was counted by routed() went elsewhere, or nowhere."""
        replica = self._replicas.get(cost.replica)
        if replica is None:
            return
        replica.open_count = max(0, replica.open_count - 1)
        replica.busy_until_ms = max(now_ms, replica.busy_until_ms - cost.compute_ms)

    def completed(self, name: str, chunks: Sequence[Chunk], *, now_ms: float) -> None:
        """A request has its whole answer: its prompt has been computed. A replica that has none
        left has no queue.
        """
        replica = self._replicas.get(name)
        if replica is None:
            return
        if self._slabs is not None:
            self._slabs.are_ready(chunks[:MAX_CHUNKS], now_ms=now_ms)
        replica.open_count = max(0, replica.open_count - 1)
        if not replica.open_count:
            replica.busy_until_ms = now_ms

    def check(self) -> None:
        if self._slabs is not None:
            self._slabs.check()
        for replica in self._replicas.values():
            assert len(replica.device) <= self._device_chunks

    def _held(
        self, node: str, runs: Sequence[_Run], span: tuple[int, int], chunk_tokens: int
    ) -> Held:
        """span: the chunks from the end of what is on the device to the end of what can be had."""
        local_tokens = 0
        peers: list[tuple[int, float]] = []
        for owner, start, stop in runs:
            tokens = (min(stop, span[1]) - max(start, span[0])) * chunk_tokens
            if tokens <= 0:
                continue
            if owner == node:
                local_tokens += tokens
            else:
                peers.append((tokens, self.rates.link(node, owner)))
        return Held(span[0] * chunk_tokens, local_tokens, peers)

    def _order(self, cost: Cost, best_ms: float) -> tuple[float, int, int]:
        replica = self._replicas[cost.replica]
        total_ms = cost.total_ms if cost.total_ms > best_ms + TIE_MS else best_ms
        return total_ms, replica.open_count, replica.last_routed


def _runs(homes: Sequence[str]) -> list[_Run]:
    """One for each stretch of chunks of one node: few, however long the prompt."""
    runs: list[_Run] = []
    start = 0
    for owner, stretch in groupby(homes):
        stop = start + sum(1 for _ in stretch)
        runs.append((owner, start, stop))
        start = stop
    return runs
