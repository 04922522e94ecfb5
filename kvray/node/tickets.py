"""What an engine holds of its questions: a Ticket for each lookup, a Reservation for each reserve.

A chain of keys longer than a message is asked page by page; it is one ticket over several ops:

    keys    [ 0 ............. 1023 | 1024 ........... 2047 | 2048 .......... ]
    asked     Lookup, ops[0]         Lookup, ops[1]          not asked: its prefix broke in ops[1]

The client's threads write a ticket and the engine's thread reads it without a lock: a place is
there before its state says HIT or COMING, a cause before its state says MISS, and a state never
comes back to WAIT. No socket and no
clock here.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt

from kvray.core.codec import unpack_slots
from kvray.core.ids import BlockKey, OpId, SlabId
from kvray.core.layout import Geometry
from kvray.core.messages import MAX_KEYS_PER_MESSAGE, SLOT_DTYPE, Grant, KeyState
from kvray.core.reasons import MissReason
from kvray.errors import RemoteProtocolError

Place = tuple[int, int, int]  # slot, generation, offset from the start of the slab

# Plain numbers: numpy compares with these ten times faster.
_HIT, _MISS, _WAIT = int(KeyState.HIT), int(KeyState.MISS), int(KeyState.WAIT)
_COMING, _GRANTED = int(KeyState.COMING), int(Grant.GRANTED)
_PLACED, _WAITING = (_HIT, _COMING), (_WAIT, _COMING)
_ALL_WAIT = bytes([_WAIT])
_SETTLED = bytes.maketrans(bytes(_WAITING), bytes([_MISS, _MISS]))  # what is waited for is lost


class Ticket:
    """One lookup of an engine. states: one KeyState a key, WAIT until the NodeStore has answered.

    Every ticket is given back with NodeClient.unpin, whatever became of it. lost: the connection
    ended meanwhile. Then each WAIT or COMING is a MISS; a HIT stays one, since its bytes lie in the
    mapped slab and are proven by their header when they are loaded.
    """

    __slots__ = (
        "_from_peer",
        "_has_come",
        "_packed",
        "_places",
        "answered",
        "causes",
        "keys",
        "lost",
        "ops",
        "released",
        "slab_id",
        "states",
    )

    def __init__(self, keys: Sequence[BlockKey], slab_id: SlabId) -> None:
        self.keys = list(keys)
        self.slab_id = slab_id  # the slab that the places are in
        self.ops: list[OpId] = []  # the Lookups sent, one a page
        self.states = bytearray(_ALL_WAIT) * len(self.keys)
        self.answered = not self.keys  # something was said of each key, if only WAIT
        self.lost = False
        self.causes: dict[int, MissReason] = {}  # why the first keys that are a MISS are one
        self._packed: list[tuple[int, bytes, bytes]] = []  # what `place` has still to unpack
        self._places: dict[int, Place] = {}
        self._from_peer: set[int] = set()
        self._has_come = False
        self.released = False  # given back

    @property
    def settled(self) -> bool:
        """No key is waited for any more."""
        return _WAIT not in self.states and _COMING not in self.states

    @property
    def arriving(self) -> bool:
        """Something is COMING, the place of each such key is known, and a first one has come: so
        whoever sends them does send. A load of the whole may begin.
        """
        return self._has_come and _COMING in self.states and _WAIT not in self.states

    def place(self, index: int) -> Place | None:
        """Where the block of keys[index] lies, or will; None unless its state is HIT or COMING.
        For the engine's thread alone: it unpacks what the answers have brought since it was called
        last, which an update that came meanwhile knows better.
        """
        while self._packed:
            start, states, slots = self._packed[0]
            placed = (start + i for i, state in enumerate(states) if state in _PLACED)
            for at, place in zip(placed, unpack_slots(slots), strict=True):
                self._places.setdefault(at, place)
            del self._packed[0]
        if self.states[index] not in _PLACED:
            return None
        return self._places.get(index)

    def from_peer(self, index: int) -> bool:
        """Whether a HIT came after a WAIT, or is COMING: from a peer (or from an engine of this
        node that was writing it just then). For statistics.
        """
        return index in self._from_peer

    # ---- for the client

    def put(self, start: int, states: bytes, slots: bytes) -> None:
        """The first answer for the keys from start on. slots: SLOT_DTYPE rows of what is HIT or
        COMING, which are not unpacked before somebody asks: an engine waits for the end of this.
        """
        if slots:
            self._packed.append((start, states, slots))
        if _COMING in states:
            self._from_peer.update(start + i for i, s in enumerate(states) if s == _COMING)
        self.states[start : start + len(states)] = states

    def change(self, index: int, state: int, place: Place | None) -> None:
        """A later answer for one key that was waited for: COMING or HIT with its place, or MISS."""
        if place is not None:
            self._places[index] = place
            self._from_peer.add(index)
        self._has_come = self._has_come or state == _HIT
        self.states[index] = state

    def miss(self, start: int = 0, stop: int | None = None) -> None:
        """Everything that is waited for among keys [start, stop) is a MISS."""
        self.states[start:stop] = self.states[start:stop].translate(_SETTLED)

    def lose(self) -> None:
        self.lost = True
        self.miss()

    def release(self) -> bool:
        """Whether this was the first call, so that the ops are to be unpinned. Whoever sees a WAIT
        become a MISS by this sees `released`, too.
        """
        first, self.released = not self.released, True
        self.miss()
        return first


@dataclass(frozen=True, slots=True)
class Reservation:
    """The answer to a reserve. grants: one Grant a key; places of the GRANTED ones by index."""

    op: OpId  # of the first page
    slab_id: SlabId
    grants: bytes
    places: dict[int, Place]


class Run(msgspec.Struct, frozen=True, gc=False):
    """Keys [start, stop) of a request that belong together and have slots of one size."""

    start: int
    stop: int
    is_prefix: bool
    slot_bytes: int


class Cut(msgspec.Struct, frozen=True, gc=False):
    """Keys [start, stop) of a request, cut along its runs: what one message asks about."""

    start: int
    stop: int
    runs: tuple[Run, ...]
    continues: Run | None = None  # the run that goes on behind stop, if there is one

    def sizes_where(self, codes: bytes, *chosen: int) -> npt.NDArray[np.uint64] | int:
        """slot_bytes of the keys with one of these codes, codes having one a key; one number if it
        is the same for all.
        """
        if len(self.runs) == 1:
            return self.runs[0].slot_bytes
        return self.sizes_of(np.flatnonzero(np.isin(np.frombuffer(codes, np.uint8), chosen)))

    def sizes_of(self, indices: npt.NDArray[np.intp]) -> npt.NDArray[np.uint64] | int:
        """slot_bytes of these keys, counted from start; one number if it is the same for all."""
        if len(self.runs) == 1:
            return self.runs[0].slot_bytes
        sizes = np.array([run.slot_bytes for run in self.runs], np.uint64)
        return np.repeat(sizes, [run.stop - run.start for run in self.runs])[indices]


def make_runs(
    lengths: Sequence[int], is_prefix: Sequence[bool], slot_bytes: Sequence[int]
) -> list[Run]:
    runs: list[Run] = []
    start = 0
    for length, prefix, size in zip(lengths, is_prefix, slot_bytes, strict=True):
        if length:
            runs.append(Run(start, start + length, prefix, size))
        start += length
    return runs


def cut_page(runs: Sequence[Run], start: int) -> Cut:
    """The next at most MAX_KEYS_PER_MESSAGE keys from start on."""
    if not start and runs[-1].stop <= MAX_KEYS_PER_MESSAGE:
        return Cut(0, runs[-1].stop, tuple(runs))
    end = start + MAX_KEYS_PER_MESSAGE
    parts = [
        Run(max(run.start, start), min(run.stop, end), run.is_prefix, run.slot_bytes)
        for run in runs
        if run.stop > start and run.start < end
    ]
    continues = next((run for run in runs if run.start < end < run.stop), None)
    return Cut(start, parts[-1].stop, tuple(parts), continues)


class LookupPage(msgspec.Struct, eq=False):
    """One Lookup under way and the ticket that it is a part of.

    asked ──answer──▶ answered ──updates, until nothing is waited for──▶ done
    """

    ticket: Ticket
    cut: Cut
    geometry: Geometry
    answered: bool = False
    overdue: bool = False  # the engine waits no more; whatever comes is late
    waiting: int = 0  # keys that an update has still to come for

    @property
    def done(self) -> bool:
        return self.answered and not self.waiting

    def answer(
        self, states: bytes, slots: bytes, causes: Mapping[int, MissReason] | None = None
    ) -> None:
        """Raises RemoteProtocolError if this can not be the answer to what was asked."""
        count = self.cut.stop - self.cut.start
        if self.answered or len(states) != count:
            raise RemoteProtocolError(f"{len(states)} states answer a lookup of {count} keys")
        _require_payload(slots, self.cut.sizes_where(states, *_PLACED), self.geometry)
        self._note(causes)
        self.ticket.put(self.cut.start, states, slots)
        self.waiting = _count_waiting(states)
        self.answered = self.ticket.answered = True

    def update(
        self,
        indices: Sequence[int],
        states: bytes,
        slots: bytes,
        causes: Mapping[int, MissReason] | None = None,
    ) -> None:
        """Raises RemoteProtocolError as answer does."""
        if not self.answered:
            raise RemoteProtocolError("an update came before the answer")
        start, stop = self.cut.start, self.cut.stop
        for i in indices:
            if not (i < stop - start and self.ticket.states[start + i] in _WAITING):
                if self.ticket.released:
                    return  # given back while this was on its way: nothing is waited for any more
                raise RemoteProtocolError(f"an update settles key {i}, which is not waited for")
        placed = np.array([i for i, s in zip(indices, states, strict=True) if s != _MISS], np.intp)
        places = iter(_unpack(slots, self.cut.sizes_of(placed), self.geometry))
        self._note(causes)
        for i, state in zip(indices, states, strict=True):
            place = None if state == _MISS else next(places)
            self.ticket.change(start + i, state, place)
        self.waiting -= len(indices) - _count_waiting(states)

    def _note(self, causes: Mapping[int, MissReason] | None) -> None:
        """causes: by index into the keys of this page."""
        for index, reason in (causes or {}).items():
            self.ticket.causes[self.cut.start + index] = reason

    def give_up(self) -> None:
        """The NodeStore will say nothing more about this page."""
        self.ticket.miss(self.cut.start, self.cut.stop)
        self.answered = self.ticket.answered = True
        self.waiting = 0


@dataclass(slots=True)
class ReservePage:
    """One Reserve under way. grants stays None if it was refused."""

    cut: Cut
    geometry: Geometry
    answered: bool = False
    grants: bytes | None = None
    places: dict[int, Place] = field(default_factory=dict)

    def answer(self, grants: bytes, slots: bytes) -> None:
        """Raises RemoteProtocolError if this can not be the answer to what was asked."""
        count = self.cut.stop - self.cut.start
        if len(grants) != count:
            raise RemoteProtocolError(f"{len(grants)} grants answer a reserve of {count} keys")
        places = _unpack(slots, self.cut.sizes_where(grants, _GRANTED), self.geometry)
        granted = (self.cut.start + i for i, grant in enumerate(grants) if grant == _GRANTED)
        self.places = dict(zip(granted, places, strict=True))
        self.grants = grants
        self.answered = True

    def give_up(self) -> None:
        self.answered = True


def _count_waiting(states: bytes) -> int:
    return states.count(_WAIT) + states.count(_COMING)


@functools.lru_cache(maxsize=8)  # a process sees one slab, or the next; five sums cost 5 us
def _payload(geometry: Geometry) -> tuple[int, int]:
    return geometry.payload_offset, geometry.used_bytes


def _unpack(slots: bytes, sizes: npt.NDArray[np.uint64] | int, geometry: Geometry) -> list[Place]:
    """SLOT_DTYPE rows for slots of these sizes. Raises as _require_payload does."""
    _require_payload(slots, sizes, geometry)
    return cast("list[Place]", unpack_slots(slots))


def _require_payload(slots: bytes, sizes: npt.NDArray[np.uint64] | int, geometry: Geometry) -> None:
    """An engine will copy to or from these SLOT_DTYPE rows, so one that does not lie in the payload
    is refused (RemoteProtocolError). Sizes are at most those of an extent.
    """
    if not slots:
        return
    begin, end = _payload(geometry)
    payload_bytes = end - begin
    if len(slots) == SLOT_DTYPE.itemsize and isinstance(sizes, int):  # numpy takes 4 us to begin
        ((_, _, offset),) = unpack_slots(slots)
        fits = 0 <= offset - begin <= payload_bytes - sizes
    else:
        # What lies before the payload wraps round, and is far behind its end.
        starts = np.frombuffer(slots, SLOT_DTYPE)["offset"] - np.uint64(begin)
        if isinstance(sizes, int):
            fits = int(starts.max()) <= payload_bytes - sizes
        else:
            fits = (
                int(starts.max()) <= payload_bytes and int((starts + sizes).max()) <= payload_bytes
            )
    if not fits:
        raise RemoteProtocolError("a place does not lie in the payload of the slab")
