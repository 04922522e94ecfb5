"""A cluster of replicas in simulated time, for benchmarks/routing.py.

    request ──policy──▶ replica: loads begin at once ──▶ the first one that is loaded is computed
                          │  slab: copied                   one at a time, at the prefill rate
                          └─ peers: one read after another over the node's link

One replica a node. A device is an LRU of blocks. With kvray each node has a slab, an LRU too, and
blocks of every slab are reachable by all; a block stays where it was computed, and counts as used
there. Left out: decoding (the trace has no output lengths here), attention that grows with the
prompt, what a look-up takes, announcements that are late, failures.

A block is never read over a link that is slower than computing it, nor behind a queue of reads
that is longer than computing what it would bring (as core/break_even does).
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

BLOCK_TOKENS = 512  # of the trace


@dataclass(frozen=True, slots=True)
class Speeds:
    """ms a block."""

    prefill_ms: float
    copy_ms: float
    link_ms: float


@dataclass(slots=True)
class Request:
    """blocks: equal ids are equal prefixes. The last one is always computed: a trace of whole
    blocks has no partial tail, and no prompt is a hit to its last token.
    """

    number: int
    arrival_ms: float
    blocks: tuple[int, ...]
    replica: int = -1
    loaded_ms: float = 0.0
    is_asked_again: bool = False
    reach: int = 0  # blocks from the first on that are on the device or loaded
    computed_blocks: int = 0
    first_token_ms: float = 0.0


class Lru:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.order: OrderedDict[int, None] = OrderedDict()

    def prefix(self, blocks: Sequence[int]) -> int:
        for index, block in enumerate(blocks):
            if block not in self.order:
                return index
        return len(blocks)

    def use(self, blocks: Sequence[int]) -> list[int]:
        """The tail goes before the head. Returns what had to go."""
        gone = []
        for block in reversed(blocks):
            self.order[block] = None
            self.order.move_to_end(block)
        while len(self.order) > self.limit:
            gone.append(self.order.popitem(last=False)[0])
        return gone


@dataclass(slots=True)
class Replica:
    number: int
    device: Lru
    queue: list[Request] = field(default_factory=list)
    computing: Request | None = None
    link_free_ms: float = 0.0
    busy_ms: float = 0.0

    @property
    def open_count(self) -> int:
        return len(self.queue) + (self.computing is not None)


class Policy(Protocol):
    def choose(self, request: Request, replicas: Sequence[Replica]) -> int: ...


class World:
    """slab_blocks = 0: without kvray."""

    def __init__(
        self, replica_count: int, *, device_blocks: int, slab_blocks: int, speeds: Speeds
    ) -> None:
        self.replicas = [Replica(i, Lru(device_blocks)) for i in range(replica_count)]
        self.slabs = [Lru(slab_blocks) for _ in range(replica_count)] if slab_blocks else []
        self.home: dict[int, int] = {}
        self.speeds = speeds
        self.now_ms = 0.0

    def run(self, requests: Sequence[Request], policy: Policy) -> None:
        """Until the last one has its first token. requests: by arrival."""
        events: list[tuple[float, int, int]] = []  # when, replica, the request that is done or -1
        arrivals = iter(requests)
        coming = next(arrivals, None)
        while coming is not None or events:
            if coming is not None and (not events or coming.arrival_ms <= events[0][0]):
                self.now_ms = coming.arrival_ms
                coming.replica = policy.choose(coming, self.replicas)
                replica = self.replicas[coming.replica]
                self._load(replica, coming, begin=replica.device.prefix(coming.blocks))
                replica.queue.append(coming)
                coming = next(arrivals, None)
            else:
                self.now_ms, number, done = heapq.heappop(events)
                replica = self.replicas[number]
                if done >= 0:
                    self._finish(replica)
            self._step(replica, events)

    def _load(self, replica: Replica, request: Request, *, begin: int) -> None:
        """What slabs have of the prompt from there on. Reads are pinned: what was there when they
        began comes.
        """
        blocks = request.blocks
        request.reach = begin
        request.loaded_ms = self.now_ms
        if not self.slabs:
            return
        local = peer = 0
        end = begin
        while end < len(blocks) and (home := self.home.get(blocks[end])) is not None:
            if home == replica.number:
                local += 1
            else:
                peer += 1
            end += 1
        waits_ms = max(0.0, replica.link_free_ms - self.now_ms)
        speeds = self.speeds
        is_worth = speeds.link_ms < speeds.prefill_ms and waits_ms < peer * speeds.prefill_ms
        if peer and not is_worth:
            first = next(i for i in range(begin, end) if self.home[blocks[i]] != replica.number)
            end, local, peer = first, first - begin, 0
        done_ms = self.now_ms + local * speeds.copy_ms
        if peer:
            replica.link_free_ms = max(self.now_ms, replica.link_free_ms) + peer * speeds.link_ms
            done_ms = max(done_ms, replica.link_free_ms)
        request.reach, request.loaded_ms = end, done_ms

    def _step(self, replica: Replica, events: list[tuple[float, int, int]]) -> None:
        """Begin to compute the first request that is loaded, if the replica computes none."""
        if replica.computing is not None or not replica.queue:
            return
        ready = next((r for r in replica.queue if self._is_loaded(replica, r)), None)
        if ready is None:
            soonest_ms = min(r.loaded_ms for r in replica.queue)
            heapq.heappush(events, (soonest_ms, replica.number, -1))
            return
        replica.queue.remove(ready)
        replica.computing = ready
        # What was computed while it waited is there now.
        reach = max(ready.reach, replica.device.prefix(ready.blocks))
        ready.computed_blocks = max(1, len(ready.blocks) - reach)
        took_ms = ready.computed_blocks * self.speeds.prefill_ms
        replica.busy_ms += took_ms
        heapq.heappush(events, (self.now_ms + took_ms, replica.number, ready.number))

    def _is_loaded(self, replica: Replica, request: Request) -> bool:
        """Whether its turn can come. kvray asks again then: what was computed while the request
        waited is loaded now, once.
        """
        if request.loaded_ms > self.now_ms:
            return False
        if request.is_asked_again or not self.slabs or request.reach == len(request.blocks):
            return True
        reach = max(request.reach, replica.device.prefix(request.blocks))
        if reach == len(request.blocks) or request.blocks[reach] not in self.home:
            return True
        request.is_asked_again = True
        self._load(replica, request, begin=reach)
        return request.loaded_ms <= self.now_ms

    def _finish(self, replica: Replica) -> None:
        request = replica.computing
        assert request is not None
        replica.computing = None
        request.first_token_ms = self.now_ms
        replica.device.use(request.blocks)
        if self.slabs:
            self._store(replica.number, request.blocks)

    def _store(self, number: int, blocks: Sequence[int]) -> None:
        used: dict[int, list[int]] = {}
        for block in blocks:
            used.setdefault(self.home.setdefault(block, number), []).append(block)
        for owner, mine in used.items():
            for gone in self.slabs[owner].use(mine):
                del self.home[gone]

    def check(self, requests: Sequence[Request]) -> None:
        """After run: nobody was lost, or computed before its time."""
        assert not any(r.queue or r.computing for r in self.replicas)
        assert sum(len(slab.order) for slab in self.slabs) == len(self.home)
        for request in requests:
            least_ms = request.computed_blocks * self.speeds.prefill_ms
            assert request.first_token_ms - request.arrival_ms >= least_ms - 1e-6
        work_ms = sum(r.computed_blocks for r in requests) * self.speeds.prefill_ms
        busy_ms = sum(r.busy_ms for r in self.replicas)
        assert abs(work_ms - busy_ms) <= 1e-6 * max(1.0, work_ms)
