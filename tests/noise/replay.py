"""Audits without engines: what was recorded of real ones, judged by the cores that judge in a node.

    record ──two errors of a layer are drawn──▶ store, commit, TrustCore.audit ──▶ its tolerance
                                                  mismatch, alarm ◀── on_compared ◀──┘

Whole blocks and mixtures of them: a block's layers come from two samples of the same two engines,
so that more is tried than was seen, and no layer is quieter or louder than a real one was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvray.core.commands import CompareBlocks, Verdict
from kvray.core.effects import Place
from kvray.core.fetch import FetchCore
from kvray.core.ids import BlockKey, ClientId, Maker, Namespace, OpId, Origin
from kvray.core.keys import canary_keys
from kvray.core.layout import Geometry
from kvray.core.messages import ChunkShape
from kvray.core.store import StoreCore
from kvray.core.trust import TrustCore
from kvray.core.trusted import Own
from tests.noise.record import Family, Machine, Record, Sample

SIZE = 4_096  # of a block; what is in it was compared when it was recorded
NAMESPACE = Namespace(b"n" * 16)
WRITER = (ClientId(1, 1, 1), OpId(1))
KEY, NAME = BlockKey(b"k" * 16), BlockKey(b"a" * 16)
NOW_MS = 1_000
# One weight of a norm, doubled: layers move by 2 %, where honest engines of unlike machines differ
# by 1 %. Audits need not find it. Like machines are held to the bit by their canaries, and do.
SLIGHT = "times 2"
OTHER_KIND = Maker(0xBAD << 32 | 1)  # of whoever computes something else: no class that is here


class Node:
    """A node with an engine that trusts one other maker."""

    def __init__(self, mine: Machine, other: Maker) -> None:
        self._store = StoreCore(Geometry(1 << 22, 64 * 1_024))
        self._trust = TrustCore(self._store, FetchCore(), requires_proof=True)
        self._own = NAMESPACE, Maker(mine.maker)
        self._other = other
        for maker in (self._own[1], other):
            for key in canary_keys(NAMESPACE, maker, 0):
                self._put(key, maker)
        shape = ChunkShape(SIZE, SIZE, "float32")
        self._trust.set_own({self._own: Own((shape,), mine.noise)})
        self._trust.hear([(NAMESPACE, other)])
        self._trust.advance(NOW_MS, may_fetch=False)
        asked = self._asked()
        self._trust.on_compared(asked.comparison_id, [Verdict.EQUAL] * 2, now_ms=NOW_MS)
        self._trust.take_commands()
        assert self.trusts

    @property
    def trusts(self) -> bool:
        trusted = self._trust.of(*self._own)
        return trusted is not None and self._other in trusted.makers

    @property
    def mismatches(self) -> int:
        return self._trust.counters["audit_mismatch"]

    @property
    def audits(self) -> int:
        return self._trust.counters["audited_chunks"]

    def audit(self, errors: Sequence[float]) -> float:
        """The other has stored a block, this engine computes it again. How near the limit it came,
        as a share.
        """
        if self._store.find(KEY) is None:
            self._put(KEY, self._other)
        self._put(NAME, self._own[1])
        self._trust.audit(self._own, KEY, NAME, NOW_MS)
        asked = self._asked()
        found = asked.tolerance.exceeded(np.array(errors))
        verdict = Verdict.DIFFERENT if found else Verdict.EQUAL
        self._trust.on_compared(asked.comparison_id, [verdict], pieces=found, now_ms=NOW_MS)
        self._trust.take_commands()
        assert self._store.find(NAME) is None, "the copy stays"
        first, others = asked.tolerance.first, asked.tolerance.others
        return max(errors[0] / first, *(error / others for error in errors[1:]))

    def check(self) -> None:
        self._trust.check()
        self._store.check()

    def _put(self, key: BlockKey, maker: Maker) -> None:
        [place] = self._store.reserve(
            WRITER,
            [(key, SIZE)],
            writer=0,
            origin=Origin.ORIGINAL,
            makers=[maker],
            now_ms=NOW_MS,
        )
        assert isinstance(place, Place), place
        assert self._store.commit(WRITER, place.slot, place.generation, NOW_MS)
        self._store.drain_effects()
        self._store.drain_changes(64)

    def _asked(self) -> CompareBlocks:
        [asked] = self._trust.take_commands()
        assert isinstance(asked, CompareBlocks)
        return asked


@dataclass
class Outcome:
    """alarms: blocks of honest engines that were told apart; and one is enough. nearest: to the
    limit, as a share of it. found, missed: of what computes something else, whom trust has left.
    too_small: what was not found and is SLIGHT.
    """

    audits: int = 0
    alarms: int = 0
    nearest: float = 0.0
    found: int = 0
    missed: int = 0
    too_small: int = 0
    names: list[str] = field(default_factory=list)  # of those that were not found


def replay(record: Record, *, audits: int, seed: int = 0) -> Outcome:
    """So many audits of honest engines, and each difference that was recorded, both ways round."""
    outcome = Outcome()
    _honest(record, audits, np.random.default_rng(seed), outcome)
    for family in record.families:
        _different(family, outcome)
    return outcome


def _honest(record: Record, audits: int, random: np.random.Generator, outcome: Outcome) -> None:
    pairs = [
        (family.engines[mine], family.engines[other], samples)
        for family in record.families
        for (mine, other), samples in _by_pair(family).items()
        if family.engines[mine].maker != family.engines[other].maker  # one maker: never audited
    ]
    counts = random.multinomial(audits, [1 / len(pairs)] * len(pairs))
    for (mine, other, samples), count in zip(pairs, counts.tolist(), strict=True):
        node = Node(mine, Maker(other.maker))
        rows = np.array([sample.errors for sample in samples])
        chosen = random.integers(len(rows), size=(count, 2))
        takes_first = random.random((count, rows.shape[1])) < 0.5
        drawn = np.where(takes_first, rows[chosen[:, 0]], rows[chosen[:, 1]])
        for errors in drawn.tolist():
            outcome.nearest = max(outcome.nearest, node.audit(errors))
            if not node.trusts:
                break  # an alarm; nothing is audited any more
        outcome.audits += node.audits
        outcome.alarms += node.mismatches
        node.check()


def _by_pair(family: Family) -> dict[tuple[str, str], list[Sample]]:
    found: dict[tuple[str, str], list[Sample]] = {}
    for sample in family.honest:
        found.setdefault((sample.mine, sample.other), []).append(sample)
    return found


def _different(family: Family, outcome: Outcome) -> None:
    """The one that audits may be any: the noise is that of an engine of this family."""
    for what, samples in family.different.items():
        for pair in dict.fromkeys((sample.mine, sample.other) for sample in samples):
            known = [family.engines[name] for name in pair if name in family.engines]
            node = Node(known[0], OTHER_KIND)
            for sample in samples:
                if (sample.mine, sample.other) == pair and node.trusts:
                    node.audit(sample.errors)
            node.check()
            if not node.trusts:
                outcome.found += 1
                continue
            if what.endswith(SLIGHT):
                outcome.too_small += 1
            else:
                outcome.missed += 1
            outcome.names.append(f"{family.model} {family.dtype}: {what}, seen by {pair[0]}")
