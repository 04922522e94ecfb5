"""FetchCore under any interleaving, against a book of who was told what and who writes where.

The rules that a single command must keep are asserted by tests.fetching.FetchWorld as the core
gives it: told once, committed only if whole and its own, released only after the read has ended,
limits. Here: the order of events is arbitrary, and at the end nothing is left.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from kvray.core.commands import ReadKind, Waiter
from kvray.core.fetch import FetchLimits, Source
from kvray.core.ids import Epoch, Generation, NodeId, SlotIndex
from tests.fetching import BLOCK_BYTES, FetchWorld, Target, key, node_info, waiter

KEYS = [key(n) for n in range(8)]
NAMES = ["a", "b", "c"]
SLOT_COUNT = 4
LIMITS = FetchLimits(
    max_fetches=7,
    max_unended_reads=4,
    max_reads_per_peer=2,
    max_locates=2,
    max_locate_keys=3,
    batch_bytes=3 * BLOCK_BYTES,
    batch_blocks=3,
    first_batch_bytes=BLOCK_BYTES,
    max_batches_ahead_per_peer=2,
    max_batches_ahead=3,
)

some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)
names = st.sampled_from(NAMES)
slots = st.integers(0, SLOT_COUNT - 1)


class FetchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = FetchWorld.with_peers(*NAMES, limits=LIMITS)
        self.world.free_slots = 10
        self.waiters: list[Waiter] = []
        self.generation = 0
        self.epochs = dict.fromkeys(NAMES, 1)
        for n, name in enumerate(NAMES):  # each block is on one node or two
            for slot in range(SLOT_COUNT):
                self.peer_writes(name, slot, KEYS[(n * 3 + slot) % len(KEYS)])

    # -- who wants what --------------------------------------------------------------------------

    @rule(keys=some_keys, within_ms=st.sampled_from([1, 40, 400, 3_000]))
    def want(self, keys: list[bytes], within_ms: int) -> None:
        who = waiter(len(self.waiters) + 1)
        self.waiters.append(who)
        self.world.want(who, [key(int.from_bytes(k, "big")) for k in keys], within_ms=within_ms)

    @rule(keys=some_keys, within_ms=st.sampled_from([40, 400, 3_000]))
    def want_and_find(self, keys: list[bytes], within_ms: int) -> None:
        """The usual way, so that reads are as frequent as what goes wrong."""
        self.want(keys, within_ms)
        while self.world.locates:
            self._answer(min(self.world.locates), [])

    @precondition(lambda self: self.waiters)
    @rule(data=st.data(), keys=st.none() | some_keys)
    def forget(self, data: st.DataObject, keys: list[bytes] | None) -> None:
        who = data.draw(st.sampled_from(self.waiters))
        chosen = None if keys is None else [key(int.from_bytes(k, "big")) for k in keys]
        self.world.forget(who, chosen)

    @rule(block=st.sampled_from(KEYS))
    def engine_commits(self, block: bytes) -> None:
        self.world.write_into(key(int.from_bytes(block, "big")))

    @rule(block=st.sampled_from(KEYS))
    def slab_evicts(self, block: bytes) -> None:
        self.world.present.discard(key(int.from_bytes(block, "big")))

    @rule(free_slots=st.integers(0, 10))
    def slab_has_room_for(self, free_slots: int) -> None:
        self.world.free_slots = free_slots

    @rule(holds=st.booleans())
    def reservations_take_time(self, holds: bool) -> None:  # noqa: FBT001
        self.world.holds_reservations = holds

    # -- what the others do ----------------------------------------------------------------------

    @rule(name=names, slot=slots, block=st.sampled_from(KEYS))
    def peer_writes(self, name: str, slot: int, block: bytes) -> None:
        if name in self.world.peers:
            self.generation += 1
            chosen = key(int.from_bytes(block, "big"))
            self.world.fill(name, slot, chosen, generation=self.generation)

    @precondition(lambda self: self.world.locates)
    @rule(data=st.data(), lies=st.lists(st.tuples(names, slots), max_size=2))
    def directory_answers(self, data: st.DataObject, lies: list[tuple[str, int]]) -> None:
        """What is there, and some of what is not (any more)."""
        self._answer(data.draw(st.sampled_from(sorted(self.world.locates))), lies)

    def _answer(self, locate_id: int, lies: list[tuple[str, int]]) -> None:
        wrong = [
            Source(
                NodeId(name), Epoch(1), SlotIndex(slot), Generation(self.generation), BLOCK_BYTES
            )
            for name, slot in lies
        ]
        found = [
            wrong
            + [
                Source(node_id, Epoch(self.epochs[node_id]), slot, generation, BLOCK_BYTES)
                for (node_id, slot), (held, generation, _) in self.world.blocks.items()
                if held == asked
            ]
            for asked in self.world.locates[locate_id]
        ]
        self.world.locate(*found, locate_id=locate_id)

    @precondition(lambda self: self.world.locates)
    @rule(data=st.data())
    def directory_fails(self, data: st.DataObject) -> None:
        locate_id = data.draw(st.sampled_from(sorted(self.world.locates)))
        del self.world.locates[locate_id]
        self.world.do(self.world.core.on_locate_failed(locate_id))

    @precondition(lambda self: self.world.reservations)
    @rule(data=st.data())
    def slab_answers(self, data: st.DataObject) -> None:
        self.world.reserve(data.draw(st.sampled_from(sorted(self.world.reservations))))

    @precondition(lambda self: self.world.reads)
    @rule(data=st.data())
    def read_comes(self, data: st.DataObject) -> None:
        self.world.end_read(data.draw(st.sampled_from(sorted(self.world.reads))))

    @precondition(lambda self: self.world.reads)
    @rule(data=st.data(), ok=st.booleans(), with_headers=st.booleans())
    def read_ends(self, data: st.DataObject, ok: bool, with_headers: bool) -> None:  # noqa: FBT001
        read_id = data.draw(st.sampled_from(sorted(self.world.reads)))
        self.world.end_read(read_id, ok=ok, with_headers=with_headers)

    @rule(name=names, does=st.sampled_from(["restart", "leave", "stay"]))
    def roster_changes(self, name: str, does: str) -> None:
        infos = {n: node_info(n, self.epochs[n]) for n in self.world.peers}
        if does == "restart":
            self.epochs[name] += 1
        infos[NodeId(name)] = node_info(name, self.epochs[name])
        if does == "leave":
            del infos[NodeId(name)]
        self.world.roster(*infos.values())

    @rule(after_ms=st.sampled_from([0, 1, 10, 20, 40, 300, 1_000, 9_000]))
    def time_passes(self, after_ms: int) -> None:
        self.world.tick(after_ms)

    # -- what always holds -----------------------------------------------------------------------

    @invariant()
    def whoever_waits_has_a_deadline_ahead(self) -> None:
        waiting = [self.world.deadlines[who] for who, keys in self.world.waiting.items() if keys]
        next_ms = self.world.core.next_deadline_ms()
        assert not waiting or (next_ms is not None and next_ms <= min(waiting))

    @invariant()
    def counts_are_those_of_the_book(self) -> None:
        snapshot = self.world.core.snapshot()
        waiting = [keys for keys in self.world.waiting.values() if keys]
        assert snapshot["waits"]["waiters"] == len(waiting)
        reads = snapshot["reads"]
        assert reads["under_way"] + reads["abandoned"] == len(self.world.reads)
        quarantined = self.world.states().count(Target.QUARANTINE)
        assert reads["quarantined_bytes"] == quarantined * BLOCK_BYTES

    def teardown(self) -> None:
        """All ends that are due come, time passes: nothing is left."""
        world = self.world
        world.holds_reservations = False
        while world.reservations:
            world.reserve(min(world.reservations))
        while world.reads:
            world.end_read(min(world.reads), ok=False)
        world.tick(10_000)
        while world.reads:
            world.end_read(min(world.reads), ok=False)
        while world.locates:
            world.locate(*([] for _ in world.locates[min(world.locates)]))
        assert not any(world.waiting.values()), "somebody was never told"
        assert set(world.states()) <= {Target.READY, Target.FREE}, "a slot has leaked"
        snapshot = world.core.snapshot()
        assert snapshot["blocks"] == {}
        assert snapshot["waits"] == {"waiters": 0, "keys": 0}
        assert {snapshot["reads"][name] for name in ("under_way", "abandoned")} == {0}
        assert snapshot["turns"] == {"reserving": 0, "reserved": 0}
        assert all(peer["outstanding_bytes"] == 0 for peer in snapshot["peers"].values())
        assert world.core.next_deadline_ms() is None
        assert not world.posted(ReadKind.PAYLOAD)
        world.core.check()


FetchMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestFetch = FetchMachine.TestCase
