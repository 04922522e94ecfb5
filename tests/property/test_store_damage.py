"""Goal: whatever bytes a slab holds, a store that adopts it is sound and loses no slot.

Method: a slab with some READY and some WRITING blocks of several sizes, in whose two tables numbers
are overwritten with others that are near what they could be, or extreme.
"""

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from kvray.core.effects import Place
from kvray.core.ids import SlotState
from kvray.core.layout import EXTENT_DTYPE, SLOT_HEADER_DTYPE
from tests.fake_slab import EXTENT, PAGE, FakeSlab, StoreOnSlab, key_of

SIZES = [PAGE * 4, PAGE * 4 - 100, PAGE * 8, EXTENT]
sizes = st.sampled_from(SIZES)


def _table(draw: st.DrawFn, dtype: np.dtype[Any], filled: np.ndarray[Any, Any]) -> None:
    """Overwrite fields of some rows with numbers near what they could be, or anything."""
    names = [name for name in dtype.names or () if name not in {"key", "spare"}]
    for _ in range(draw(st.integers(0, 12))):
        row, name = draw(st.integers(0, len(filled) - 1)), draw(st.sampled_from(names))
        limit = 2 ** (8 * dtype[name].itemsize) - 1
        near = st.integers(0, min(limit, 70_000)) | st.sampled_from([0, 1, limit, PAGE, EXTENT])
        filled[name][row] = min(limit, draw(near))


@st.composite
def damaged_slabs(draw: st.DrawFn) -> FakeSlab:
    store = StoreOnSlab(extent_count=3)
    for number, size in enumerate(draw(st.lists(sizes, max_size=10))):
        holder = store.op()
        (answer,) = store.reserve(holder, [key_of(number)], payload_bytes=size)
        if isinstance(answer, Place) and draw(st.booleans()):
            assert store.core.commit(holder, answer.slot, answer.generation, 0)
            store.settle()
    _table(draw, EXTENT_DTYPE, store.slab.extents)
    _table(draw, SLOT_HEADER_DTYPE, store.slab.headers)
    return store.slab


@given(damaged_slabs())
@settings(max_examples=200, deadline=None)
def test_whatever_a_slab_says_a_store_on_it_is_sound(slab: FakeSlab) -> None:
    """A READY header is believed only if a peer's own arithmetic would lead to the same bytes."""
    store = StoreOnSlab(slab=slab).restarted()
    for place in store.core.entries():
        geometry = slab.geometry
        assert geometry.holds(place.slot, place.bytes)
        assert place.offset == geometry.slot_offset(place.slot, place.bytes)
        assert place.generation < slab.mark
    for writer in range(2**16):
        for slot, generation in store.core.quarantined_by(writer):
            assert store.core.release(slot, generation)
        if not store.core.snapshot()["quarantined"]:
            break
    store.core.clear()
    store.settle()
    assert slab.slots_in(SlotState.ABSENT) == list(range(slab.geometry.slot_count))
    assert len(store.fill(map(key_of, range(100, 103)), payload_bytes=EXTENT)) == 3
