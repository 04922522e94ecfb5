"""Trust: whose blocks count here, by what was seen and not by what was said.

    UNSEEN ─its turn─▶ FETCHING ─both canaries are here─▶ COMPARING ─alike─▶ EQUAL
     ▲  ▲                 │                                │   └─not─▶ DIFFERENT
     │  └──── no canary ──┴──────────── no verdict ────────┘               │
     └──────────────────────────── DENIED_MS later ────────────────────────┘
    EQUAL ─two audits that differ─▶ DIFFERENT

A maker is what engines are that compute alike (see ids.maker_class). What an engine of one maker
has stored counts for engines of another only after this node has compared the canaries of both,
which each of them has computed and stored under keys that follow from its maker. Nobody waits for
that and no request pays for it: until then such blocks are misses.

A pair is (namespace, mine, other): mine is the maker of an engine of this node, whose noise says
how much may differ. It is sought when the directory names the other maker, or when a block of it is
met. What is forgotten, as everything is by a restart, is sought again.

A verdict needs every chunk: EQUAL is said when all are alike, DIFFERENT when two of them are not,
and nothing when only one is, which is no verdict. Bytes are compared elsewhere (CompareBlocks), and
the headers after them; no proof of a header is no verdict either.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Final

import msgspec

from kvray.core.commands import (
    Arrived,
    BlockPair,
    CompareBlocks,
    FetchCommand,
    Log,
    Missed,
    Verdict,
    Waiter,
)
from kvray.core.copies_compared import CopiesCompared
from kvray.core.deadlines import Deadlines
from kvray.core.fetch import FetchCore
from kvray.core.ids import NAMESPACE_BYTES, UNKNOWN_MAKER, BlockKey, Maker, Namespace, OpId
from kvray.core.keys import canary_keys
from kvray.core.messages import ChunkShape
from kvray.core.slots import Block
from kvray.core.store import TRUST, StoreCore
from kvray.core.tolerance import tolerance_of
from kvray.core.trusted import Own, Pair, Trusted, mark_of

# An engine that has not introduced itself with a maker is without a cache: every block has one.
REQUIRE_PROOF = True

MAX_PAIRS = 1_024  # 32 makers of one namespace, all seen by one node; about 300 bytes each
MAX_OWN = 256  # makers of this node's engines that are remembered: as many as may run, and before
MAX_UNDER_WAY = 4  # contacts at a time: each reads a few blocks and compares some MB
MIN_PAIRS = 2  # blocks to compare: one alone confirms nothing
FETCH_DEADLINE_MS = 2_000  # as long as an engine's look-up may wait
COMPARE_DEADLINE_MS = 30_000  # 100 MB take 0.2 s; a thread that does not answer holds no pins
FIRST_REST_MS, MAX_REST_MS = 200, 10_000  # after no verdict, doubling: a canary may come any time
REFUSED_AFTER = 5  # times without a verdict, 3 s: engines that start together look too early
DENIED_MS = 24 * 3_600_000  # a machine that was repaired has another maker; this is for the others
MAX_PIECES_SAID = 8


class TrustState(Enum):
    """See the picture in the module's docstring."""

    UNSEEN = "unseen"
    FETCHING = "fetching"
    COMPARING = "comparing"
    EQUAL = "equal"
    DIFFERENT = "different"


_MOVES: Final = {
    TrustState.UNSEEN: {TrustState.FETCHING},
    TrustState.FETCHING: {TrustState.COMPARING, TrustState.UNSEEN},
    TrustState.COMPARING: {TrustState.EQUAL, TrustState.DIFFERENT, TrustState.UNSEEN},
    TrustState.EQUAL: {TrustState.DIFFERENT},
    TrustState.DIFFERENT: {TrustState.UNSEEN},
}
_UNDER_WAY: Final = (TrustState.FETCHING, TrustState.COMPARING)


class _Contact(msgspec.Struct, eq=False):
    """One pair."""

    pair: Pair
    state: TrustState = TrustState.UNSEEN
    failures: int = 0  # without a verdict, since it was first sought
    is_wanted: bool = True  # named or met since it was sought last
    op: OpId = OpId(0)  # of what is under way
    mismatches: int = 0  # of audits
    waiting: set[BlockKey] = set()  # what is being fetched

    def move(self, state: TrustState) -> None:
        assert state in _MOVES[self.state], f"{self.state.value} becomes {state.value}"
        self.state = state


class TrustCore:
    """One per NodeStore. Fetches as a look-up does, pins while it compares, moves no bytes."""

    def __init__(
        self, store: StoreCore, fetch: FetchCore, *, requires_proof: bool | None = None
    ) -> None:
        self._requires_proof = REQUIRE_PROOF if requires_proof is None else requires_proof
        self._store = store
        self._fetch = fetch
        self._met: dict[Pair, None] = {}
        self._own: dict[tuple[Namespace, Maker], Own] = {}
        self._trusted: dict[tuple[Namespace, Maker], Trusted] = {}
        self._contacts: dict[Pair, _Contact] = {}  # the oldest first
        self._due: Deadlines[Pair] = Deadlines()  # when something is to be done of itself
        self._ready: dict[Pair, None] = {}  # their turn has come, and there is no room yet
        self._by_op: dict[OpId, _Contact] = {}
        self._audits = CopiesCompared(store)
        self._last_op = OpId(0)
        self._commands: list[CompareBlocks | Log] = []
        self.counters = dict.fromkeys(
            (
                "canaries_equal",
                "canaries_different",
                "canaries_without_verdict",
                "audited_chunks",
                "audit_mismatch",
            ),
            0,
        )

    # -- questions -------------------------------------------------------------------------------

    def of(self, namespace: Namespace, maker: Maker) -> Trusted | None:
        """Whose blocks count for an engine; None: it has not proven itself, and nobody's do."""
        if maker == UNKNOWN_MAKER and self._requires_proof:
            return None
        trusted = self._trusted.get((namespace, maker))
        return self._remember(namespace, maker) if trusted is None else trusted

    def waiters(self) -> list[Waiter]:
        """Who waits for blocks of peers."""
        return [(TRUST, op) for op, contact in self._by_op.items() if contact.waiting]

    def is_due(self, now_ms: int) -> bool:
        """Whether `advance` has something to do."""
        if self._met or (self._ready and len(self._by_op) < MAX_UNDER_WAY):
            return True
        due_ms = self.next_deadline_ms()
        return due_ms is not None and due_ms <= now_ms

    def next_deadline_ms(self) -> int | None:
        """When that is so again, if nothing happens before; it is not now."""
        deadlines = (self._due.next_ms(), self._audits.next_ms())
        return min((at_ms for at_ms in deadlines if at_ms is not None), default=None)

    # -- who is there ----------------------------------------------------------------------------

    def set_own(self, own: Mapping[tuple[Namespace, Maker], Own]) -> None:
        """These are the engines of this node now. They meet each other."""
        self._own = {
            (namespace, maker): said
            for (namespace, maker), said in own.items()
            if maker != UNKNOWN_MAKER and len(namespace) == NAMESPACE_BYTES and said.chunks
        }
        self.hear(self._own)

    def hear(self, makers: Iterable[tuple[Namespace, Maker]]) -> None:
        """There are engines of these makers somewhere."""
        if not self._own:
            return
        for namespace, other in makers:
            for own_namespace, mine in self._own:
                if own_namespace == namespace:
                    self._meet((namespace, mine, other))

    # -- contacts --------------------------------------------------------------------------------

    def advance(self, now_ms: int, *, may_fetch: bool) -> list[FetchCommand]:
        """When it is due. may_fetch: whether peers can be asked at all."""
        self._audits.end_late(now_ms)
        met = list(self._met)
        self._met.clear()
        for pair in met:
            self._meet(pair)
        for pair in self._due.take_due(now_ms):
            contact = self._contacts[pair]
            if contact.state is TrustState.COMPARING:
                self._end_without_verdict(contact, now_ms)
            elif contact.state is TrustState.DIFFERENT or not contact.is_wanted:
                self._forget(contact)
            else:
                self._ready[pair] = None
        commands: list[FetchCommand] = []
        while self._ready and len(self._by_op) < MAX_UNDER_WAY:
            pair = next(iter(self._ready))
            del self._ready[pair]
            commands += self._begin(self._contacts[pair], now_ms, may_fetch=may_fetch)
        return commands

    def on_settled(self, told: Arrived | Missed, now_ms: int) -> None:
        """What FetchCore says of keys that were wanted here."""
        contact = self._by_op[told.waiter[1]]
        contact.waiting.difference_update(told.keys)
        if isinstance(told, Arrived):
            self._pin(contact, told.keys, now_ms)
        if not contact.waiting:
            self._compare(contact, now_ms)

    def on_compared(
        self,
        comparison_id: int,
        verdicts: Iterable[Verdict],
        *,
        pieces: Iterable[int] = (),
        now_ms: int,
    ) -> None:
        """verdicts: one for each pair of the CompareBlocks. pieces: some of those that differ. One
        that is too late, or of a comparison that nobody has asked for, is ignored.
        """
        audited = self._audits.end(OpId(comparison_id))
        if audited is not None:
            self._judge_audit(audited, list(verdicts), pieces, now_ms)
            return
        contact = self._by_op.get(OpId(comparison_id))
        if contact is None or contact.state is not TrustState.COMPARING:
            return
        found = list(verdicts)
        namespace, mine, other = contact.pair
        if found and all(verdict is Verdict.EQUAL for verdict in found):
            self._end(contact, TrustState.EQUAL)
            self._remember(namespace, mine).makers.add(other)
            self._remember(namespace, mine).refused.discard(other)
            self.counters["canaries_equal"] += 1
            text = f"{_name(contact.pair)} compute the same: they share their blocks"
            self._commands.append(Log(text))
        elif found.count(Verdict.DIFFERENT) >= MIN_PAIRS:
            self._end(contact, TrustState.DIFFERENT)
            self._deny(contact, pieces, now_ms)
        else:
            self._end_without_verdict(contact, now_ms)

    def audit(
        self, own: tuple[Namespace, Maker], key: BlockKey, name: BlockKey, now_ms: int
    ) -> None:
        """An engine has stored under `name` what it computes for `key`, which is here by another
        maker: compare the two. The copy goes in any case.
        """
        self._last_op = OpId(self._last_op + 1)
        trusted = self._trusted.get(own)
        asked = self._audits.begin(
            self._last_op,
            own[0],
            self._own.get(own),
            trusted=trusted.makers if trusted is not None else (),
            key=key,
            name=name,
            now_ms=now_ms,
            deadline_ms=now_ms + COMPARE_DEADLINE_MS,
        )
        if asked is not None:
            self._commands.append(asked)

    def take_commands(self) -> list[CompareBlocks | Log]:
        """What is to be done since the last call."""
        commands, self._commands = self._commands, []
        return commands

    # -- private ---------------------------------------------------------------------------------

    def _judge_audit(
        self, pair: Pair, verdicts: list[Verdict], pieces: Iterable[int], now_ms: int
    ) -> None:
        """The second mismatch is an alarm: the maker is different from now on. Of one that has been
        found different meanwhile it is no news.
        """
        contact = self._contacts.get(pair)
        if verdicts not in ([Verdict.EQUAL], [Verdict.DIFFERENT]):
            return
        self.counters["audited_chunks"] += 1
        if verdicts == [Verdict.EQUAL] or contact is None or contact.state is not TrustState.EQUAL:
            return
        self.counters["audit_mismatch"] += 1
        contact.mismatches += 1
        if contact.mismatches >= MIN_PAIRS:
            contact.move(TrustState.DIFFERENT)
            self._deny(contact, pieces, now_ms)

    def _deny(self, contact: _Contact, pieces: Iterable[int], now_ms: int) -> None:
        """It is DIFFERENT."""
        namespace, mine, other = contact.pair
        self._due.set(contact.pair, now_ms + DENIED_MS)
        trusted = self._remember(namespace, mine)
        trusted.makers.discard(other)
        trusted.refused.add(other)
        self.counters["canaries_different"] += 1
        said = ", ".join(str(piece) for piece in sorted(set(pieces))[:MAX_PIECES_SAID])
        text = f"{_name(contact.pair)} compute different blocks under the same names"
        text = f"{text} (layers {said}): what it has stored is a miss here"
        self._commands.append(Log(text, warning=True))

    def _remember(self, namespace: Namespace, maker: Maker) -> Trusted:
        trusted = self._trusted.get((namespace, maker))
        if trusted is None:
            if len(self._trusted) >= MAX_OWN:
                gone = next((key for key in self._trusted if key not in self._own), None)
                if gone is not None:
                    self._drop_own(gone)
            trusted = Trusted(namespace, maker, self._met)
            self._trusted[namespace, maker] = trusted
        return trusted

    def _drop_own(self, gone: tuple[Namespace, Maker]) -> None:
        """It asks for nothing any more; what it trusted is sought again if it does."""
        for contact in list(self._contacts.values()):
            if contact.pair[:2] == gone and contact.state not in _UNDER_WAY:
                self._forget(contact)
        del self._trusted[gone]

    def _meet(self, pair: Pair) -> None:
        namespace, mine, other = pair
        if other in (mine, UNKNOWN_MAKER) or (namespace, mine) not in self._own:
            return
        contact = self._contacts.get(pair)
        if contact is not None:
            contact.is_wanted = True
            return
        if len(self._contacts) >= MAX_PAIRS:
            idle = (c for c in self._contacts.values() if c.state not in _UNDER_WAY)
            self._forget(next(idle))  # the oldest; a few are under way
        self._contacts[pair] = _Contact(pair)
        self._ready[pair] = None

    def _forget(self, contact: _Contact) -> None:
        namespace, mine, other = contact.pair
        del self._contacts[contact.pair]
        self._due.discard(contact.pair)
        self._ready.pop(contact.pair, None)
        trusted = self._trusted.get((namespace, mine))
        if trusted is not None:
            trusted.makers.discard(other)
            trusted.refused.discard(other)

    def _begin(self, contact: _Contact, now_ms: int, *, may_fetch: bool) -> list[FetchCommand]:
        own = self._own.get(contact.pair[:2])
        if own is None:
            self._forget(contact)
            return []
        contact.move(TrustState.FETCHING)
        contact.is_wanted = False
        contact.op = self._last_op = OpId(self._last_op + 1)
        self._by_op[contact.op] = contact
        wanted = [
            (key, shape.slot_bytes)
            for group, shape in enumerate(own.chunks)
            for keys in self._keys_of(contact.pair, group)
            for key in keys
        ]
        # What is here may be the first to go for what is fetched.
        here = self._pin(contact, [key for key, _ in wanted], now_ms)
        missing = [
            want
            for want, is_here in zip(wanted, here, strict=True)
            if not is_here and not (self._store.is_writing(want[0]) and want[0] not in self._fetch)
        ]
        if not missing or not may_fetch:
            self._compare(contact, now_ms)
            return []
        contact.waiting = {key for key, _ in missing}
        waiter: Waiter = (TRUST, contact.op)
        return self._fetch.want(waiter, missing, deadline_ms=now_ms + FETCH_DEADLINE_MS)

    def _compare(self, contact: _Contact, now_ms: int) -> None:
        """What can be had of both canaries is here."""
        namespace, mine, other = contact.pair
        own = self._own.get((namespace, mine))
        found = None if own is None else self._pairs(contact.pair, own)
        if own is None or found is None:
            self._end_without_verdict(contact, now_ms)
            return
        if not all(self._pin(contact, [b.place.key for two in found for b in two[:2]], now_ms)):
            self._end_without_verdict(contact, now_ms)
            return
        contact.move(TrustState.COMPARING)
        self._due.set(contact.pair, now_ms + COMPARE_DEADLINE_MS)
        pairs = tuple(BlockPair(a.place, b.place, shape) for a, b, shape in found)
        tolerance = tolerance_of(mine, other, own.noise)
        self._commands.append(CompareBlocks(contact.op, pairs, tolerance))

    def _pin(self, contact: _Contact, keys: Sequence[BlockKey], now_ms: int) -> list[bool]:
        """Until its end. Of each whether it is READY here, and stays."""
        holder: Waiter = (TRUST, contact.op)
        places = self._store.pin(holder, keys, slot_bytes=None, now_ms=now_ms)
        return [place is not None for place in places]

    def _pairs(self, pair: Pair, own: Own) -> list[tuple[Block, Block, ChunkShape]] | None:
        """The chunks that both makers' canaries have here. None: too few, or a group without any.

        A group may have fewer chunks than the canary: those outside of a window are not kept.
        """
        _, mine, other = pair
        found: list[tuple[Block, Block, ChunkShape]] = []
        for group, shape in enumerate(own.chunks):
            own_keys, other_keys = self._keys_of(pair, group)
            wanted = mark_of(shape.slot_bytes, mine), mark_of(shape.slot_bytes, other)
            before = len(found)
            blocks = zip(
                self._store.blocks_of(own_keys), self._store.blocks_of(other_keys), strict=True
            )
            found += [
                (a, b, shape)
                for a, b in blocks
                if a is not None and b is not None and (a.mark, b.mark) == wanted
            ]
            if len(found) == before:
                return None
        return found if len(found) >= MIN_PAIRS else None

    def _keys_of(self, pair: Pair, group: int) -> tuple[list[BlockKey], list[BlockKey]]:
        namespace, mine, other = pair
        return canary_keys(namespace, mine, group), canary_keys(namespace, other, group)

    def _end(self, contact: _Contact, state: TrustState) -> None:
        """FETCHING or COMPARING is over."""
        self._store.unpin((TRUST, contact.op))
        del self._by_op[contact.op]
        self._due.discard(contact.pair)
        contact.move(state)
        contact.failures = 0

    def _end_without_verdict(self, contact: _Contact, now_ms: int) -> None:
        failures = contact.failures + 1
        self._end(contact, TrustState.UNSEEN)
        contact.failures = failures
        rest_ms = min(MAX_REST_MS, FIRST_REST_MS << min(failures - 1, 16))
        self._due.set(contact.pair, now_ms + rest_ms)
        namespace, mine, other = contact.pair
        if failures >= REFUSED_AFTER:
            self._remember(namespace, mine).refused.add(other)
        self.counters["canaries_without_verdict"] += 1

    # -- for people and tests --------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        return {
            "requires_proof": self._requires_proof,
            "pairs": [
                {
                    "namespace": contact.pair[0].hex(),
                    "mine": f"{contact.pair[1]:016x}",
                    "other": f"{contact.pair[2]:016x}",
                    "state": contact.state.value,
                    "without_verdict": contact.failures,
                }
                for contact in self._contacts.values()
            ],
        } | self.counters

    def check(self) -> None:
        """Assert that states, pins and sets of the trusted agree, both ways."""
        assert len(self._contacts) <= MAX_PAIRS
        assert len(self._trusted) <= max(MAX_OWN, len(self._own)) + 1
        assert not self._commands, "not done"
        assert not self._met, "met, and not seen to"
        self._audits.check()
        under_way = [c for c in self._contacts.values() if c.state in _UNDER_WAY]
        assert len(under_way) <= MAX_UNDER_WAY
        self._due.check()
        assert self._ready.keys() <= self._contacts.keys()
        assert {c.op: c for c in under_way} == self._by_op
        for pair, contact in self._contacts.items():
            assert contact.pair == pair
            namespace, mine, other = pair
            trusted = self._trusted.get((namespace, mine))
            is_equal = contact.state is TrustState.EQUAL
            assert is_equal == (trusted is not None and other in trusted.makers), "trust by nobody"
            assert (contact.state is TrustState.FETCHING) == bool(contact.waiting)
            is_ready = pair in self._ready
            assert not is_ready or contact.state is TrustState.UNSEEN
            ends = contact.state in (TrustState.UNSEEN, TrustState.COMPARING, TrustState.DIFFERENT)
            assert (ends and not is_ready) == (pair in self._due), "for ever, or until never"
        for (namespace, mine), trusted in self._trusted.items():
            for other in trusted.makers - {mine}:
                assert (namespace, mine, other) in self._contacts, "trusted without a verdict"


def _name(pair: Pair) -> str:
    namespace, mine, other = pair
    return f"maker {other:016x} and maker {mine:016x} of this node (namespace {namespace.hex()})"
