"""Goal: whatever is asked of a StoreCore in whatever order, it agrees with a simple model, with its
slab and with what the directory has been told, and at the end nothing has leaked.

Method: a hypothesis machine drives a StoreCore on a fake slab (tests/fake_slab.py: it refuses a
reused generation, a cut of an extent in use, a change of a header in use, a READY header that was
not WRITING). The model is dictionaries of what each slot must be. After every rule: effects
applied, core checked, core, slab and model compared. At the end all readers stop and all writers
end, and every slot must be free again.
"""

from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvray.core.effects import Place
from kvray.core.eviction import Lru, Segmented
from kvray.core.ids import BlockKey, ClientId, OpId, Origin, SlotIndex, SlotState
from kvray.core.layout import WRITER_NODE, aligned
from kvray.core.messages import Grant
from kvray.core.store import NODE, Holder, StoreCore, StoreLimits
from tests.fake_slab import EXTENT, PAGE, FakeSlab, geometry_of, key_of

KEYS = [key_of(number) for number in range(16)]
SIZES = [PAGE * 4, PAGE * 4 - 100, PAGE * 8, EXTENT]  # 4, 4, 2 and 1 slots an extent
CLIENTS: list[tuple[ClientId, int]] = [(ClientId(pid, 1, 1), row) for row, pid in enumerate((7, 8))]
LIMITS = StoreLimits(max_pins=20, max_reservations=9, recut_rest_ms=1_000)

keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=8)
size_mixes = st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)
sizes = st.sampled_from(SIZES)
who = st.sampled_from(CLIENTS)
rarely = st.integers(0, 5).map(lambda number: number == 0)  # what wipes much of the state


class Writing:
    def __init__(self, place: Place, holder: Holder, writer: int) -> None:
        self.place, self.holder, self.writer = place, holder, writer


class StoreMachine(RuleBasedStateMachine):
    """The model: what is READY, WRITING, pinned and in quarantine, and what the directory knows."""

    @initialize(extent_count=st.integers(1, 3), probation=st.sampled_from([None, 0.0, 0.3]))
    def start(self, extent_count: int, probation: float | None) -> None:
        self.slab = FakeSlab(geometry_of(extent_count))
        self.probation = probation
        self.now_ms = 0
        self.ops = 0
        self.ready: dict[BlockKey, Place] = {}
        self.writing: dict[SlotIndex, Writing] = {}
        self.quarantine: dict[SlotIndex, tuple[Place, int]] = {}
        self.pins: dict[Holder, set[SlotIndex]] = {}
        self.directory: dict[BlockKey, Place] = {}
        self.core = self.new_core()

    def new_core(self) -> StoreCore:
        policy = Lru() if self.probation is None else Segmented(self.probation, 0.3)
        return StoreCore(
            self.slab.geometry, generation_mark=self.slab.mark, limits=LIMITS, policy=policy
        )

    # -- what the model knows ----------------------------------------------------------------------

    def op(self, client: ClientId) -> Holder:
        self.ops += 1
        return (client, OpId(self.ops))

    def pinned(self) -> set[SlotIndex]:
        return set().union(*self.pins.values())

    def pin_count(self) -> int:
        return sum(map(len, self.pins.values()))

    def settle(self, most: int | None = None) -> list[SlotIndex]:
        """Apply the effects, or at most so many; the slots that were evicted leave the model."""
        self.slab.evicted.clear()
        for effect in self.core.drain_effects()[:most]:
            self.slab.apply(effect)
        gone = list(self.slab.evicted)
        for key in [key for key, place in self.ready.items() if place.slot in gone]:
            del self.ready[key]
        return gone

    def room_for(self, size: int, spared: set[BlockKey]) -> bool:
        """Whether a slot of this size could still be had without touching another size."""
        geometry = self.slab.geometry
        taken = {*self.writing, *self.quarantine, *(place.slot for place in self.ready.values())}
        for extent, row in enumerate(self.slab.extents):
            first = extent * geometry.slots_per_extent
            if not taken & set(range(first, first + geometry.slots_per_extent)):
                return True  # spare
            if row["slot_bytes"] == aligned(size):
                count = geometry.slots_in_extent(size)
                if not set(range(first, first + count)) <= taken:
                    return True  # a free slot
        return any(
            aligned(place.bytes) == aligned(size) and place.slot not in self.pinned()
            for key, place in self.ready.items()
            if key not in spared
        )

    # -- writers -----------------------------------------------------------------------------------

    @rule(by=who, wanted=keys, mix=size_mixes, copy=st.booleans())
    def reserve(
        self, by: tuple[ClientId, int], wanted: list[BlockKey], mix: list[int], *, copy: bool
    ) -> None:
        before, pinned = dict(self.ready), self.pinned()
        writing_keys = {w.place.key for w in self.writing.values()}
        wants = list(zip(wanted, mix * len(wanted), strict=False))
        holder, writer, answers = self.ask_to_reserve(by, wants, copy=copy)
        gone = self.settle()
        assert not pinned & set(gone), "evicted under a reader"
        granted: set[BlockKey] = set()
        for (key, size), answer in zip(wants, answers, strict=True):
            present = key in before or key in writing_keys or key in granted
            assert (answer is Grant.PRESENT) == present
            if isinstance(answer, Place):
                assert (answer.key, answer.bytes) == (key, size)
                assert answer.slot not in self.writing, "given out twice"
                assert answer.slot not in self.quarantine, "given out of quarantine"
                self.writing[answer.slot] = Writing(answer, holder, writer)
                granted.add(key)
        assert all(key in self.ready for key in wanted if key in before), "PRESENT, and evicted"
        if len(self.writing) < LIMITS.max_reservations:
            for (_, size), answer in zip(wants, answers, strict=True):
                spared = set(wanted)
                assert answer is not Grant.FULL or not self.room_for(size, spared), "there is room"

    @rule(by=who, wanted=keys, mix=size_mixes, copy=st.booleans())
    def store(
        self, by: tuple[ClientId, int], wanted: list[BlockKey], mix: list[int], *, copy: bool
    ) -> None:
        """As it goes when nothing goes wrong: reserve, then commit all of it."""
        before = set(self.writing)
        self.reserve(by, wanted, mix, copy=copy)
        for slot in self.writing.keys() - before:
            w = self.writing.pop(slot)
            assert self.commit(w.holder, slot, w.place.generation)
            self.ready[w.place.key] = w.place

    @rule(by=who, wanted=keys, size=sizes, most=st.integers(0, 10), happens=rarely)
    def reserve_and_be_killed(
        self,
        by: tuple[ClientId, int],
        wanted: list[BlockKey],
        size: int,
        most: int,
        *,
        happens: bool,
    ) -> None:
        """The kill comes between two effects, before anybody is told of a slot."""
        if not happens:
            return
        wants = [(key, size) for key in wanted]
        holder, writer, answers = self.ask_to_reserve(by, wants, copy=False)
        self.settle(most)
        written = self.slab.slots_in(SlotState.WRITING)
        for answer in answers:
            if isinstance(answer, Place) and answer.slot in written:
                self.writing[answer.slot] = Writing(answer, holder, writer)
        self.kill_and_restart(happens=True)

    def ask_to_reserve(
        self, by: tuple[ClientId, int], wants: list[tuple[BlockKey, int]], *, copy: bool
    ) -> tuple[Holder, int, list[Grant | Place]]:
        client, row = by
        holder: Holder = (NODE, self.op(client)[1]) if copy else self.op(client)
        writer = WRITER_NODE if copy else row
        origin = Origin.COPY if copy else Origin.ORIGINAL
        answers = self.core.reserve(holder, wants, writer=writer, origin=origin, now_ms=self.now_ms)
        assert all(a.origin is origin for a in answers if isinstance(a, Place))
        return holder, writer, answers

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), how=st.sampled_from(["commit", "commit", "commit", "abandon", "late"]))
    def end_of_one(self, data: st.DataObject, how: str) -> None:
        slot = data.draw(st.sampled_from(sorted(self.writing)))
        w = self.writing[slot]
        end = self.core.abandon if how == "abandon" else self.commit
        other = self.op(CLIENTS[0][0])
        assert not end(other, slot, w.place.generation), "somebody else's"
        assert not end(w.holder, slot, w.place.generation - 1), "an older one"  # type: ignore[arg-type]  # not a Generation
        if how == "late":
            assert self.core.quarantine(slot, w.place.generation)
            self.quarantine[slot] = (w.place, w.writer)
        else:
            assert end(w.holder, slot, w.place.generation)
            if how == "commit":
                self.ready[w.place.key] = w.place
        del self.writing[slot]
        assert not self.commit(w.holder, slot, w.place.generation), "ended already"
        assert not self.core.abandon(w.holder, slot, w.place.generation)

    def commit(self, holder: Holder, slot: SlotIndex, generation: Any) -> bool:
        return self.core.commit(holder, slot, generation, self.now_ms)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abandon_all_of_one(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([w.holder for w in self.writing.values()]))
        places = [w.place for w in self.writing.values() if w.holder == holder]
        assert self.core.abandon_reservation(holder) == places
        for place in places:
            del self.writing[place.slot]

    @rule(by=who)
    def client_vanishes(self, by: tuple[ClientId, int]) -> None:
        client, _ = by
        lost = [w for w in self.writing.values() if w.holder[0] == client]
        assert Counter(self.core.client_gone(client)) == Counter(w.place for w in lost)
        for w in lost:
            del self.writing[w.place.slot]
            self.quarantine[w.place.slot] = (w.place, w.writer)
        self.pins = {holder: held for holder, held in self.pins.items() if holder[0] != client}

    @precondition(lambda self: self.quarantine)
    @rule(data=st.data(), returns=st.booleans())
    def end_of_quarantine(self, data: st.DataObject, *, returns: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.quarantine)))
        place, writer = self.quarantine[slot]
        taken = self.core.find(place.key) is not None or self.core.is_writing(place.key)
        room = len(self.writing) < LIMITS.max_reservations
        if returns and writer != WRITER_NODE:
            client, row = CLIENTS[writer]
            holder = self.op(client)
            assert not self.core.restore_writing(holder, slot, place.generation, writer=row + 1)
            restored = self.core.restore_writing(holder, slot, place.generation, writer=row)
            assert restored == (not taken and room)
            if restored:
                self.writing[slot] = Writing(place, holder, writer)
                del self.quarantine[slot]
        else:
            assert self.core.release(slot, place.generation)
            assert not self.core.release(slot, place.generation)
            del self.quarantine[slot]

    # -- readers -----------------------------------------------------------------------------------

    @rule(by=who, some=keys, size=st.none() | sizes, data=st.data())
    def pin(
        self, by: tuple[ClientId, int], some: list[BlockKey], size: int | None, data: st.DataObject
    ) -> None:
        """Under a new operation, or one that has pins already; keys that are here and others."""
        holder = data.draw(st.sampled_from([self.op(by[0]), *self.pins]))
        here = data.draw(st.lists(st.sampled_from(sorted(self.ready)))) if self.ready else []
        wanted = [*here, *some]
        held = set(self.pins.get(holder, ()))
        places = self.core.pin(holder, wanted, slot_bytes=size, now_ms=self.now_ms)
        for key, place in zip(wanted, places, strict=True):
            block = self.ready.get(key)
            if block is None:
                assert place is None
            elif block.slot in held:
                assert place == block
            elif size not in {None, block.bytes} or self.pin_count() >= LIMITS.max_pins:
                assert place is None
            else:
                assert place == block
                held.add(block.slot)
                self.pins[holder] = held

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(list(self.pins)))
        self.core.unpin(holder)
        self.core.unpin(holder)
        del self.pins[holder]

    @rule(wanted=keys)
    def touch(self, wanted: list[BlockKey]) -> None:
        self.core.touch(wanted, self.now_ms)

    @rule(wanted=keys, spared=keys, most=st.integers(1, 4))
    def hints(self, wanted: list[BlockKey], spared: list[BlockKey], most: int) -> None:
        """Right or wrong, they change nothing but the order of eviction."""
        self.core.spare(spared)
        self.core.read(wanted, self.now_ms)
        doubtful = self.core.take_doubtful(most)
        assert len(doubtful) <= most
        assert all(self.ready[key].slot not in self.pinned() for key in doubtful)
        assert self.core.take_doubtful(most) == []

    @rule(key=st.sampled_from(KEYS))
    def evict(self, key: BlockKey) -> None:
        may = key in self.ready and self.ready[key].slot not in self.pinned()
        assert self.core.evict(key) == may
        self.settle()
        assert not may or key not in self.ready

    @rule(happens=rarely)
    def clear(self, *, happens: bool) -> None:
        if not happens:
            return
        pinned = self.pinned()
        left = {place.slot for place in self.ready.values() if place.slot in pinned}
        assert self.core.clear() == len(self.ready) - len(left)
        self.settle()
        assert {place.slot for place in self.ready.values()} == left

    # -- time, announces, restarts -----------------------------------------------------------------

    @rule(passed_ms=st.sampled_from([1, 400, 1_500]))
    def time_passes(self, passed_ms: int) -> None:
        self.now_ms += passed_ms

    @rule(most=st.integers(1, 6))
    def announce(self, most: int) -> None:
        adds, removes = self.core.drain_changes(most)
        assert len(adds) + len(removes) <= most
        for key in removes:
            assert key in self.directory, "a remove of what was never said"
            del self.directory[key]
        for place in adds:
            assert self.directory.get(place.key) != place, "said twice"
            self.directory[place.key] = place

    @rule()
    def announce_everything(self) -> None:
        self.announce(1_000)
        assert self.core.drain_changes(1) == ([], [])
        assert self.directory == self.ready, "the directory has a phantom, or misses a block"

    @rule(happens=rarely)
    def kill_and_restart(self, *, happens: bool) -> None:
        """Whatever is in memory is lost; the directory drops the entries of the old epoch."""
        if not happens:
            return
        self.core = self.new_core()
        self.core.adopt(self.slab.extents.copy(), self.slab.headers.copy(), now_ms=self.now_ms)
        for slot, w in self.writing.items():
            self.quarantine[slot] = (w.place, w.writer)
        self.writing, self.pins, self.directory = {}, {}, {}

    # -- agreement ---------------------------------------------------------------------------------

    @invariant()
    def everybody_agrees(self) -> None:
        if not hasattr(self, "core"):
            return
        self.settle()
        self.core.check()
        assert {place.key: place for place in self.core.entries()} == self.ready
        for key in KEYS:
            assert self.core.find(key) == self.ready.get(key)
            assert self.core.is_writing(key) == any(
                w.place.key == key for w in self.writing.values()
            )
        fields = {
            key: (place.slot, place.generation, place.offset, place.bytes)
            for key, place in self.ready.items()
        }
        assert self.slab.ready() == fields
        assert self.slab.slots_in(SlotState.WRITING) == sorted(self.writing)
        assert self.slab.slots_in(SlotState.QUARANTINE) == sorted(self.quarantine)
        for writer in (0, 1, WRITER_NODE):
            assert sorted(self.core.quarantined_by(writer)) == sorted(
                (slot, place.generation)
                for slot, (place, w) in self.quarantine.items()
                if w == writer
            )
        self.what_may_be_wiped_is_the_rest()
        snapshot = self.core.snapshot()
        assert snapshot["pins"] == self.pin_count()
        assert snapshot["pinned"] == len(self.pinned())

    def what_may_be_wiped_is_the_rest(self) -> None:
        """Blocks and what is unoccupied are the whole payload, nothing is both; in steps, too."""
        geometry = self.slab.geometry
        begin, end = (
            geometry.payload_offset,
            geometry.payload_offset + geometry.extent_count * EXTENT,
        )
        places = [*self.ready.values(), *(w.place for w in self.writing.values())]
        places += [place for place, _ in self.quarantine.values()]
        blocks = [(place.offset, aligned(place.bytes)) for place in places]
        rest = list(self.core.unoccupied(begin, end))
        covered = begin
        for offset, length_bytes in sorted([*blocks, *rest]):
            assert offset == covered
            covered += length_bytes
        assert covered == end
        step_bytes = EXTENT // 4 + PAGE
        steps = range(begin, end, step_bytes)
        stepped = [self.core.unoccupied(at, min(at + step_bytes, end)) for at in steps]
        assert sum(n for ranges in stepped for _, n in ranges) == sum(n for _, n in rest)

    def teardown(self) -> None:
        """All readers stop, all writers end: no slot may be lost to whatever has happened."""
        if not hasattr(self, "core"):
            return
        for holder in list(self.pins):
            self.core.unpin(holder)
        for w in self.writing.values():
            assert self.core.abandon(w.holder, w.place.slot, w.place.generation)
        for slot, (place, _) in self.quarantine.items():
            assert self.core.release(slot, place.generation)
        assert self.core.clear() == len(self.ready)
        self.writing, self.quarantine, self.pins = {}, {}, {}
        self.everybody_agrees()
        assert self.slab.slots_in(SlotState.ABSENT) == list(range(self.slab.geometry.slot_count))
        self.announce_everything()
        assert self.directory == {}
        extents = self.slab.geometry.extent_count
        wants = [(key_of(100 + number), EXTENT) for number in range(extents + 1)]
        answers = self.core.reserve(
            self.op(CLIENTS[0][0]), wants, writer=0, origin=Origin.ORIGINAL, now_ms=self.now_ms
        )
        room = min(extents, LIMITS.max_reservations)
        assert [isinstance(a, Place) for a in answers] == [True] * room + [False]


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=300,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
