"""What a restart may believe of a slab. Pure arithmetic on the tables that the shell has read.

A header counts only if everything in it fits: its extent is cut, the cut is the one that the
header names, slot and offset lie inside it, the payload is of its size class, and the generation
lies below the mark, which is written before a generation is used for the first time. Whatever a
kill has left half written fails one of these or is not READY (see core.effects).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvray.core.effects import Place
from kvray.core.ids import (
    KEY_BYTES,
    BlockKey,
    ExtentIndex,
    Generation,
    Maker,
    Origin,
    SlotIndex,
    SlotState,
)
from kvray.core.layout import SLOT_ALIGN_BYTES, Geometry

Table = npt.NDArray[Any]  # EXTENT_DTYPE or SLOT_HEADER_DTYPE
_Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Cut:
    """An extent that serves a slot size, and those of its slots that stay in use."""

    extent: ExtentIndex
    generation: int
    slot_bytes: int
    occupied: list[SlotIndex]


@dataclass(frozen=True, slots=True)
class Kept:
    """A slot that stays in use, as its header says."""

    place: Place
    state: SlotState  # never ABSENT
    writer: int


@dataclass(frozen=True, slots=True)
class Belief:
    """The outcome. A slot that is in none of these is ABSENT and says so."""

    cuts: list[Cut]
    kept: list[Kept]  # by generation, so that the oldest is adopted as the coldest
    doubles: list[Kept]  # READY blocks whose key is READY with a higher generation too
    garbage: list[SlotIndex]


def believe(geometry: Geometry, extents: Table, headers: Table, *, generation_mark: int) -> Belief:
    """Read the two tables of a slab. generation_mark: from its header page."""
    assert len(extents) == geometry.extent_count
    assert len(headers) == geometry.slot_count
    cuts = _believed_cuts(geometry, extents, generation_mark)
    slots = np.flatnonzero(headers["state"])
    rows = headers[slots]
    fits = _fits(geometry, cuts, slots.astype(np.uint64), rows, generation_mark)
    order = np.argsort(rows["generation"][fits], kind="stable")
    candidates = _rows_of(slots[fits][order], rows[fits][order])
    newest = {row.place.key: row for row in candidates if row.state is SlotState.READY}
    kept: list[Kept] = []
    doubles: list[Kept] = []
    occupied: dict[int, list[SlotIndex]] = {}
    for row in candidates:
        if row.state is SlotState.READY and newest[row.place.key] is not row:
            doubles.append(row)
            continue
        kept.append(row)
        occupied.setdefault(geometry.extent_of(row.place.slot), []).append(row.place.slot)
    return Belief(
        cuts=[
            Cut(
                ExtentIndex(extent),
                int(cuts["extent_generation"][extent]),
                int(cuts["slot_bytes"][extent]),
                occupied.get(extent, []),
            )
            for extent in np.flatnonzero(cuts["slot_bytes"]).tolist()
        ],
        kept=kept,
        doubles=doubles,
        garbage=slots[~fits].tolist(),
    )


def _believed_cuts(geometry: Geometry, extents: Table, generation_mark: int) -> Table:
    """The descriptors, with slot_bytes 0 where one says nothing that can be true."""
    cuts = extents.copy()
    fits = (
        (cuts["slot_bytes"] % SLOT_ALIGN_BYTES == 0)
        & (cuts["slot_bytes"] <= geometry.extent_bytes)
        & (cuts["extent_generation"] > 0)
        & (cuts["extent_generation"] < generation_mark)
    )
    cuts["slot_bytes"][~fits] = 0
    return cuts


def _fits(
    geometry: Geometry, cuts: Table, slots: _Numbers, rows: Table, generation_mark: int
) -> npt.NDArray[np.bool_]:
    """Which rows (headers of `slots`) can be true. All arithmetic in unsigned 64 bits."""
    extent, index = np.divmod(slots, np.uint64(geometry.slots_per_extent))
    size: _Numbers = cuts["slot_bytes"][extent]
    extent_generation: _Numbers = cuts["extent_generation"][extent]
    extent_bytes = np.uint64(geometry.extent_bytes)
    offset = np.uint64(geometry.payload_offset) + extent * extent_bytes + index * size
    fits: npt.NDArray[np.bool_] = (
        (size > 0)
        & (index < extent_bytes // np.maximum(size, np.uint64(1)))
        & (rows["extent_generation"] == extent_generation)
        & (rows["offset"] == offset)
        & (rows["bytes"] <= size)
        & (rows["bytes"] + np.uint64(SLOT_ALIGN_BYTES) > size)
        & (rows["bytes"] > 0)
        & (rows["generation"] > extent_generation)
        & (rows["generation"] < generation_mark)
        & (rows["state"] <= max(SlotState))
        & (rows["origin"] <= max(Origin))
    )
    return fits


def _rows_of(slots: npt.NDArray[Any], rows: Table) -> list[Kept]:
    """Python objects of headers that fit; 100,000 take about 0.1 s."""
    keys = rows["key"].tobytes()
    states, origins = list(SlotState), list(Origin)
    columns = zip(
        slots.tolist(),
        rows["generation"].tolist(),
        rows["offset"].tolist(),
        rows["bytes"].tolist(),
        rows["origin"].tolist(),
        rows["state"].tolist(),
        rows["writer"].tolist(),
        rows["maker"].tolist(),
        range(0, len(keys), KEY_BYTES),
        strict=True,
    )
    return [
        Kept(
            Place(
                SlotIndex(slot),
                Generation(generation),
                offset,
                payload_bytes,
                BlockKey(keys[at : at + KEY_BYTES]),
                origins[origin],
                Maker(maker),
            ),
            states[state],
            writer,
        )
        for slot, generation, offset, payload_bytes, origin, state, writer, maker, at in columns
    ]
