"""A slab that consists of what StoreCore's effects have written, and that refuses a wrong write.

It knows nothing of StoreCore: only the rules that a reader and a restart rely on. `StoreOnSlab` is
a StoreCore with such a slab under it, in which each verb is followed by its effects and by both
parties' checks.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvray.core.effects import Effect, MarkGeneration, Place, WriteExtent, WriteHeader
from kvray.core.eviction import Policy
from kvray.core.ids import BlockKey, ClientId, Generation, OpId, Origin, SlotIndex, SlotState
from kvray.core.layout import EXTENT_DTYPE, SLOT_HEADER_DTYPE, Geometry, aligned
from kvray.core.messages import Grant
from kvray.core.store import Holder, StoreCore, StoreLimits

ENGINE = ClientId(pid=100, start_ticks=1, nonce=7)
OTHER_ENGINE = ClientId(pid=200, start_ticks=2, nonce=8)
PAGE = 4_096
EXTENT = 64 * 1024  # 16 slots of one page, 4 of four, 1 of sixteen

_LEGAL = {
    (SlotState.ABSENT, SlotState.WRITING),
    (SlotState.WRITING, SlotState.READY),
    (SlotState.WRITING, SlotState.ABSENT),
    (SlotState.WRITING, SlotState.QUARANTINE),
    (SlotState.READY, SlotState.ABSENT),
    (SlotState.QUARANTINE, SlotState.ABSENT),
    (SlotState.QUARANTINE, SlotState.WRITING),
}
_FIELDS = ("generation", "key", "offset", "bytes", "origin", "writer", "extent_generation", "maker")


def key_of(number: int) -> BlockKey:
    """Ends in zero bytes for some numbers, which S16 columns would lose."""
    return BlockKey(b"key-%04d" % number + bytes(8))


def geometry_of(extent_count: int) -> Geometry:
    one = Geometry(1024**2, EXTENT).smallest_slab_bytes
    geometry = Geometry(one + (extent_count - 1) * (EXTENT + 17 * 64), EXTENT)
    assert geometry.extent_count == extent_count
    return geometry


class FakeSlab:
    """Headers, descriptors and the mark of one slab."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.extents = np.zeros(geometry.extent_count, EXTENT_DTYPE)
        self.headers = np.zeros(geometry.slot_count, SLOT_HEADER_DTYPE)
        self.mark = 0
        self.evicted: list[SlotIndex] = []  # slots that have left READY, in order
        self.extent_writes = 0
        self._last_generation = 0

    def apply(self, effect: Effect) -> None:
        match effect:
            case MarkGeneration(high_water=mark):
                assert mark > self.mark
                self.mark = mark
            case WriteExtent():
                self._write_extent(effect)
            case WriteHeader(generation=0):
                self._blank(effect)
            case WriteHeader():
                self._write_header(effect)

    def ready(self) -> dict[BlockKey, tuple[int, ...]]:
        """What a reader would find: key to (slot, generation, offset, bytes)."""
        found: dict[BlockKey, tuple[int, ...]] = {}
        for slot in self.slots_in(SlotState.READY):
            row = self.headers[slot]
            key = BlockKey(row["key"].tobytes())
            assert key not in found, "one key in two READY slots"
            found[key] = (slot, *(int(row[name]) for name in ("generation", "offset", "bytes")))
        return found

    def slots_in(self, state: SlotState) -> list[int]:
        slots: list[int] = np.flatnonzero(self.headers["state"] == state).tolist()
        return slots

    def state_of(self, slot: SlotIndex) -> SlotState:
        return SlotState(int(self.headers["state"][slot]))

    def _first_use(self, generation: int) -> None:
        assert generation < self.mark, "used before the mark was raised"
        assert generation > self._last_generation, "a generation was used twice, or went back"
        self._last_generation = generation

    def _write_extent(self, effect: WriteExtent) -> None:
        count = self.geometry.slots_per_extent
        states = self.headers["state"][effect.extent * count : (effect.extent + 1) * count]
        assert not states.any(), "an extent was cut while a header of it was not ABSENT"
        assert effect.slot_bytes % PAGE == 0
        self._first_use(effect.extent_generation)
        row = self.extents[effect.extent]
        row["extent_generation"] = effect.extent_generation
        row["slot_bytes"] = effect.slot_bytes
        self.extent_writes += 1

    def _write_header(self, effect: WriteHeader) -> None:
        row: npt.NDArray[np.void] = self.headers[effect.slot]
        before = SlotState(int(row["state"]))
        assert (before, effect.state) in _LEGAL, f"{before.name} to {effect.state.name}"
        fields = {name: getattr(effect, name) for name in _FIELDS}
        if before is SlotState.ABSENT:
            self._first_use(effect.generation)
            self._fits_extent(effect)
            for name, value in fields.items():
                row[name] = np.void(value) if name == "key" else value
        else:
            found = {n: row[n].tobytes() if n == "key" else int(row[n]) for n in _FIELDS}
            assert found == fields, "more than the state of a header in use was changed"
        if before is SlotState.READY:
            self.evicted.append(effect.slot)
        row["state"] = effect.state

    def _fits_extent(self, effect: WriteHeader) -> None:
        extent = self.extents[self.geometry.extent_of(effect.slot)]
        assert extent["slot_bytes"] == aligned(effect.bytes), "not of its extent's slot size"
        assert extent["extent_generation"] == effect.extent_generation
        assert self.geometry.holds(effect.slot, effect.bytes)
        assert effect.offset == self.geometry.slot_offset(effect.slot, effect.bytes)

    def _blank(self, effect: WriteHeader) -> None:
        assert effect.state is SlotState.ABSENT, "only garbage has no generation"
        self.headers[effect.slot] = np.zeros((), SLOT_HEADER_DTYPE)


class StoreOnSlab:
    """A StoreCore on a FakeSlab, with a clock that a test sets."""

    def __init__(
        self,
        extent_count: int = 2,
        *,
        slab: FakeSlab | None = None,
        limits: StoreLimits | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.slab = slab or FakeSlab(geometry_of(extent_count))
        self.now_ms = 1_000
        self.core = StoreCore(
            self.slab.geometry, generation_mark=self.slab.mark, limits=limits, policy=policy
        )
        self._ops = 0

    def restarted(self) -> "StoreOnSlab":
        """kill -9 and a new epoch on the same slab; pins and policy are lost."""
        after = StoreOnSlab(slab=self.slab)
        after.now_ms = self.now_ms
        after.core.adopt(self.slab.extents, self.slab.headers, now_ms=after.now_ms)
        after.settle()
        return after

    def settle(self) -> None:
        """Apply the effects; then core and slab must say the same."""
        for effect in self.core.drain_effects():
            self.slab.apply(effect)
        self.core.check()
        found = {
            place.key: (place.slot, place.generation, place.offset, place.bytes)
            for place in self.core.entries()
        }
        assert found == self.slab.ready(), "READY in the core and READY in the slab differ"
        counts = self.core.snapshot()
        assert counts["ready"] == len(found)
        assert counts["writing"] == len(self.slab.slots_in(SlotState.WRITING))
        assert counts["quarantined"] == len(self.slab.slots_in(SlotState.QUARANTINE))

    def op(self, client: ClientId = ENGINE) -> Holder:
        self._ops += 1
        return (client, OpId(self._ops))

    def reserve(
        self,
        holder: Holder,
        keys: Iterable[BlockKey],
        *,
        payload_bytes: int = PAGE,
        origin: Origin = Origin.ORIGINAL,
        writer: int = 1,
    ) -> list[Grant | Place]:
        wants = [(key, payload_bytes) for key in keys]
        answers = self.core.reserve(holder, wants, writer=writer, origin=origin, now_ms=self.now_ms)
        self.settle()
        return answers

    def fill(
        self,
        keys: Iterable[BlockKey],
        *,
        payload_bytes: int = PAGE,
        origin: Origin = Origin.ORIGINAL,
    ) -> list[Place]:
        """Reserve and commit; all must find room."""
        holder = self.op()
        answers = self.reserve(holder, keys, payload_bytes=payload_bytes, origin=origin)
        places = [answer for answer in answers if isinstance(answer, Place)]
        assert len(places) == len(answers), answers
        for place in places:
            assert self.core.commit(holder, place.slot, place.generation, self.now_ms)
        self.settle()
        return places

    def pin(self, holder: Holder, keys: Iterable[BlockKey]) -> list[Place | None]:
        places = self.core.pin(holder, list(keys), slot_bytes=None, now_ms=self.now_ms)
        self.settle()
        return places

    def unpin(self, holder: Holder) -> None:
        self.core.unpin(holder)
        self.settle()

    def has(self, *keys: BlockKey) -> list[bool]:
        return [self.core.find(key) is not None for key in keys]


def one_place(answers: list[Grant | Place]) -> Place:
    (answer,) = answers
    assert isinstance(answer, Place), answer
    return answer


def stale(generation: Generation) -> Generation:
    return Generation(generation - 1)
