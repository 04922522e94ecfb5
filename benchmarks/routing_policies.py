"""The policies that benchmarks/routing.py compares.

    round-robin   the next one
    pow2          two at random, the one with fewer requests; what kvray falls back to
    affinity      ray.llm's PrefixCacheAffinityRouter with its defaults, as its source says: the
                  replicas with the longest match; below a tenth of the prompt those that were given
                  the least text; of several the one with fewer requests. Its threshold for
                  imbalance is infinite and it forgets nothing (do_eviction=False).
    kvray         kvray.core.routing, the code of KVRayRouter

Ray matches characters, these match the trace's blocks: a match is whole blocks.
"""

import random
import time
from collections.abc import Sequence

from benchmarks.routing_world import BLOCK_TOKENS, Replica, Request, Speeds
from kvray.core.routing import Ranking, Rates

MATCH_RATE = 0.1  # PrefixCacheAffinityRouter's match_rate_threshold


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:  # noqa: ARG002
        self._next += 1
        return self._next % len(replicas)


class TwoChoices:
    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:  # noqa: ARG002
        return _least(self._dice.sample(range(len(replicas)), 2), replicas)


class Affinity:
    def __init__(self, seed: int, replica_count: int) -> None:
        self._dice = random.Random(seed)
        self._tenants: dict[int, set[int]] = {}  # of a block, as the nodes of Ray's tree
        self._given = [0] * replica_count  # blocks that a tenant has in the tree

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:
        blocks = request.blocks
        matched, tenants = 0, set(range(len(replicas)))
        for block in blocks:
            holders = self._tenants.get(block)
            if not holders:
                break
            matched, tenants = matched + 1, holders
        if matched / len(blocks) < MATCH_RATE:
            least = min(self._given)
            tenants = {i for i, given in enumerate(self._given) if given == least}
        candidates = sorted(tenants)
        self._dice.shuffle(candidates)
        chosen = _least(candidates, replicas)
        for block in blocks:
            holders = self._tenants.setdefault(block, set())
            self._given[chosen] += chosen not in holders
            holders.add(chosen)
        return chosen


class KVRay:
    """Knows only what it has sent: Serve tells of whole answers, which say little about when the
    prompt was done, so here nobody tells it anything.
    """

    def __init__(
        self, replica_count: int, *, device_blocks: int, slab_blocks: int, speeds: Speeds
    ) -> None:
        rates = Rates(
            speeds.prefill_ms / BLOCK_TOKENS,
            speeds.copy_ms / BLOCK_TOKENS,
            speeds.link_ms / BLOCK_TOKENS,
        )
        self.ranking = Ranking(rates, device_chunks=device_blocks, slab_chunks=slab_blocks)
        self._names = [f"replica-{i}" for i in range(replica_count)]
        self.ranking.set_replicas({name: f"node of {name}" for name in self._names})
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self.decision_ms: list[float] = []

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:  # noqa: ARG002
        begun_s = time.perf_counter()
        (cost, *_) = self.ranking.rank(
            request.blocks,
            len(request.blocks) * BLOCK_TOKENS,
            chunk_tokens=BLOCK_TOKENS,
            now_ms=request.arrival_ms,
        )
        self.decision_ms.append((time.perf_counter() - begun_s) * 1_000)
        self.ranking.routed(cost, request.blocks, now_ms=request.arrival_ms)
        return self._numbers[cost.replica]


def _least(candidates: Sequence[int], replicas: Sequence[Replica]) -> int:
    """The first of those with the fewest requests, as Serve takes it."""
    return min(candidates, key=lambda i: replicas[i].open_count)
