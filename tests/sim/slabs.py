"""A slab that is watched: who may write where, who has been told that a block stays.

Payload goes in and out in pieces, a quarter of a block each, so that a copy and a rewrite can
overlap. What may never happen to a slot is asserted where it would happen.
"""

from random import Random

import numpy as np

from kvray.core.commands import WriteClient
from kvray.core.effects import Effect, WriteHeader
from kvray.core.ids import BlockKey, Generation, SlotIndex, SlotState
from kvray.core.layout import PAGE_BYTES
from tests.shells import Slab
from tests.sim.makers import content_of

PIECES = 4  # of a block: enough for a torn one

_LEGAL = {
    (SlotState.WRITING, SlotState.READY),
    (SlotState.WRITING, SlotState.QUARANTINE),
    (SlotState.QUARANTINE, SlotState.WRITING),
    (SlotState.WRITING, SlotState.ABSENT),
    (SlotState.QUARANTINE, SlotState.ABSENT),
    (SlotState.READY, SlotState.ABSENT),
}


class Writing:
    """Somebody who may write into one slot, in one generation, until `end`."""

    def __init__(
        self, slab: "WatchedSlab", slot: SlotIndex, generation: Generation, offset: int, size: int
    ) -> None:
        self.slab = slab
        self.slot = slot
        self.generation = generation
        self.offset = offset
        self.bytes = size
        for page in self._pages():
            slab.writings.setdefault(page, []).append(self)

    def _pages(self) -> range:
        return range(self.offset // PAGE_BYTES, (self.offset + self.bytes - 1) // PAGE_BYTES + 1)

    def put(self, piece: int, data: bytes | bytearray) -> None:
        """Write one piece, which must be allowed."""
        state, generation = self.slab.rows[self.slot]
        assert generation == self.generation, "writes into a slot that is another's by now"
        assert state in (SlotState.WRITING, SlotState.QUARANTINE), f"writes into a {state.name}"
        start = self.offset + piece * len(data)
        self.slab.memory[start : start + len(data)] = data

    def end(self) -> None:
        for page in self._pages():
            left = [writing for writing in self.slab.writings[page] if writing is not self]
            if left:
                self.slab.writings[page] = left
            else:
                del self.slab.writings[page]


class WatchedSlab(Slab):
    """See the module's docstring. `rows`: state and generation of every header, for speed."""

    def __init__(self, name: str, *, extent_count: int) -> None:
        super().__init__(name, slot_count=16 * extent_count)
        self.name = name
        self.rows = [(SlotState.ABSENT, Generation(0))] * self.geometry.slot_count
        self.writings: dict[int, list[Writing]] = {}  # by page of the slab
        self.pins: dict[SlotIndex, int] = {}  # told to clients; see sim.promises
        self.last_generation = 0

    def apply(self, effect: Effect | WriteClient) -> None:
        if isinstance(effect, WriteHeader):
            self._judge(effect)
        super().apply(effect)
        if isinstance(effect, WriteHeader):
            self.rows[effect.slot] = (effect.state, effect.generation)

    def apply_torn(self, effect: WriteHeader, random: Random) -> None:
        """The process is killed in the middle of this: some words of the header are written."""
        self._judge(effect)
        row = self.headers[effect.slot]
        old, written = row.copy(), random.sample(range(8), random.randrange(9))
        super().apply(effect)
        row = self.headers[effect.slot]
        as_words = self.headers.view(np.uint64).reshape(-1, 8)[effect.slot]
        old_words = np.frombuffer(old.tobytes(), np.uint64)
        for word in set(range(8)) - set(written):
            as_words[word] = old_words[word]
        self.rows[effect.slot] = (SlotState(int(row["state"])), Generation(int(row["generation"])))

    def damage_extent(self, random: Random) -> None:
        """While nobody works on it: other words in the descriptor of an extent, but not of one into
        which somebody may be writing: such a slot is known by its header, which has to fit.
        """
        slots_per_extent = self.geometry.slots_per_extent
        extents = []
        for extent in range(self.geometry.extent_count):
            rows = self.rows[extent * slots_per_extent : (extent + 1) * slots_per_extent]
            states = {state for state, _ in rows}
            if self.extents[extent]["slot_bytes"] and states <= {SlotState.ABSENT, SlotState.READY}:
                extents.append(extent)
        if not extents:
            return
        row = self.extents[random.choice(extents)]
        if random.randrange(2):
            row["extent_generation"] = random.choice((0, random.randrange(1, 1 << 12), 1 << 63))
        else:
            row["slot_bytes"] = random.choice((0, 4_096, 8_192, 12_288, 1 << 40, 17))

    def piece(self, offset: int, piece_bytes: int) -> bytes:
        return bytes(self.memory[offset : offset + piece_bytes])

    def keeps(
        self, slot: SlotIndex, generation: Generation, block: BlockKey, offset: int, size: int
    ) -> bool:
        """What an engine compares after a copy out of the slab."""
        if self.rows[slot] != (SlotState.READY, generation):
            return False
        row = self.headers[slot]
        return (row["key"].tobytes(), row["offset"], row["bytes"]) == (block, offset, size)

    def check(self) -> None:
        """All READY blocks are what they say."""
        keys: set[bytes] = set()
        for slot, (state, generation) in enumerate(self.rows):
            row = self.headers[slot]
            assert (row["state"], row["generation"]) == (state, generation)
            if state is SlotState.READY:
                block = row["key"].tobytes()
                assert block not in keys, "two READY slots of one key"
                keys.add(block)
                self._hold_to_extent(slot, row)
                sizes = int(row["offset"]), int(row["bytes"])
                self._hold_to_stamp(block, *sizes, maker=int(row["maker"]))

    # -- private ---------------------------------------------------------------------------------

    def _judge(self, effect: WriteHeader) -> None:
        """Whether this may be written now."""
        state, generation = self.rows[effect.slot]
        slot = effect.slot
        if effect.generation == 0:
            assert effect.state is SlotState.ABSENT, "only what a restart finds torn is blanked"
            return
        if effect.generation != generation:
            self._judge_new(effect, state)
            return
        assert (state, effect.state) in _LEGAL, f"{state.name} becomes {effect.state.name}"
        row = self.headers[slot]
        names = ("offset", "bytes", "extent_generation", "maker")
        told = (row["key"].tobytes(), *(row[name] for name in names))
        said = (effect.key, *(getattr(effect, name) for name in names))
        assert told == said, "more than the state has changed"
        if state is SlotState.READY:
            assert slot not in self.pins, "a pinned block is evicted"
        elif effect.state is SlotState.READY:
            self._hold_to_stamp(effect.key, effect.offset, effect.bytes, maker=effect.maker)
            self._assert_nobody_writes(effect)
        elif effect.state is SlotState.ABSENT:
            self._assert_nobody_writes(effect)

    def _judge_new(self, effect: WriteHeader, state: SlotState) -> None:
        assert state is SlotState.ABSENT, f"{state.name}, and given to another generation"
        assert effect.state is SlotState.WRITING
        assert self.last_generation < effect.generation < self.generation_mark, "generations"
        assert effect.slot not in self.pins, "a pinned slot is rewritten"
        self.last_generation = effect.generation
        self._assert_nobody_writes(effect)

    def _assert_nobody_writes(self, effect: WriteHeader) -> None:
        stop = effect.offset + effect.bytes
        for page in range(effect.offset // PAGE_BYTES, (stop - 1) // PAGE_BYTES + 1):
            assert page not in self.writings, f"{effect.state.name} while somebody may write"

    def _hold_to_extent(self, slot: int, row: np.void) -> None:
        """A header is believed only while the descriptor of its extent says the same."""
        extent = self.extents[slot // self.geometry.slots_per_extent]
        assert row["extent_generation"] == extent["extent_generation"], "of another cut"
        assert int(row["bytes"]) <= int(extent["slot_bytes"]), "larger than its slot"

    def _hold_to_stamp(self, block: bytes, offset: int, size: int, *, maker: int) -> None:
        held = self.memory[offset : offset + size]
        assert held == content_of(BlockKey(block), size, maker), "READY, but with other bytes"
