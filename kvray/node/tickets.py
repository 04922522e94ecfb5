"""What an engine holds of its questions: a Ticket for each lookup, a Reservation for each reserve.

A chain of keys longer than a message is asked page by page; it is one ticket over several ops:

    keys    [ 0 ............. 1023 | 1024 ........... 2047 | 2048 .......... ]
    asked     Lookup, ops[0]         Lookup, ops[1]          not asked: its prefix broke in ops[1]

The client's threads write a ticket and the engine's thread reads it without a lock: a place is
there before its state says HIT, and a state only ever leaves WAIT. No socket and no clock here.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from kvray.core.codec import unpack_slots
from kvray.core.ids import BlockKey, OpId, SlabId
from kvray.core.layout import Geometry
from kvray.core.messages import MAX_KEYS_PER_MESSAGE, SLOT_DTYPE, Grant, KeyState
from kvray.errors import RemoteProtocolError

Place = tuple[int, int, int]  # slot, generation, offset from the start of the slab

_WAIT, _MISS = bytes([KeyState.WAIT]), bytes([KeyState.MISS])
_HIT, _GRANTED = int(KeyState.HIT), int(Grant.GRANTED)  # numpy compares with these ten times faster


class Ticket:
    """One lookup of an engine. states: one KeyState a key, WAIT until the NodeStore has answered.

    Every ticket is given back with NodeClient.unpin, whatever became of it. lost: the connection
    ended meanwhile. Then each WAIT is a MISS; a HIT stays one, since its bytes lie in the mapped
    slab and are proven by their header when they are loaded.
    """

    __slots__ = (
        "_from_peer",
        "_places",
        "_released",
        "answered",
        "keys",
        "lost",
        "ops",
        "slab_id",
        "states",
    )

    def __init__(self, keys: Sequence[BlockKey], slab_id: SlabId) -> None:
        self.keys = list(keys)
        self.slab_id = slab_id  # the slab that the places are in
        self.ops: list[OpId] = []  # the Lookups sent, one a page
        self.states = bytearray(_WAIT) * len(self.keys)
        self.answered = not self.keys  # something was said of each key, if only WAIT
        self.lost = False
        self._places: dict[int, Place] = {}
        self._from_peer: set[int] = set()
        self._released = False

    @property
    def settled(self) -> bool:
        """No key is waited for any more."""
        return KeyState.WAIT not in self.states

    def place(self, index: int) -> Place | None:
        """Where the block of keys[index] lies; None unless its state is HIT."""
        return self._places.get(index)

    def from_peer(self, index: int) -> bool:
        """Whether a HIT came after a WAIT, that is from a peer (or from an engine of this node
        that was writing it just then). For statistics.
        """
        return index in self._from_peer

    # ---- for the client

    def put(
        self, start: int, states: bytes, hits: npt.NDArray[np.intp], places: Sequence[Place]
    ) -> None:
        """The first answer for the keys from start on; hits: which of them are, and where."""
        self._places.update(zip((hits + start).tolist(), places, strict=True))
        self.states[start : start + len(states)] = states

    def settle(self, index: int, place: Place | None) -> None:
        """A later answer for one key that was waited for; None is a MISS."""
        if place is None:
            self.states[index] = KeyState.MISS
        else:
            self._places[index] = place
            self._from_peer.add(index)
            self.states[index] = KeyState.HIT

    def miss(self, start: int = 0, stop: int | None = None) -> None:
        """Every WAIT among keys [start, stop) is a MISS."""
        self.states[start:stop] = self.states[start:stop].replace(_WAIT, _MISS)

    def lose(self) -> None:
        self.lost = True
        self.miss()

    def release(self) -> bool:
        """Whether this was the first call, so that the ops are to be unpinned."""
        first, self._released = not self._released, True
        self.miss()
        return first


@dataclass(frozen=True, slots=True)
class Reservation:
    """The answer to a reserve. grants: one Grant a key; places of the GRANTED ones by index."""

    op: OpId  # of the first page
    slab_id: SlabId
    grants: bytes
    places: dict[int, Place]


@dataclass(frozen=True, slots=True)
class Run:
    """Keys [start, stop) of a request that belong together and have slots of one size."""

    start: int
    stop: int
    is_prefix: bool
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Keys [start, stop) of a request, cut along its runs: what one message asks about."""

    start: int
    stop: int
    runs: tuple[Run, ...]
    continues: Run | None = None  # the run that goes on behind stop, if there is one

    def sizes_of(self, indices: npt.NDArray[np.intp]) -> npt.NDArray[np.int64] | int:
        """slot_bytes of these keys, counted from start; one number if it is the same for all."""
        if len(self.runs) == 1:
            return self.runs[0].slot_bytes
        sizes = np.array([run.slot_bytes for run in self.runs], np.int64)
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
    end = start + MAX_KEYS_PER_MESSAGE
    parts = [
        Run(max(run.start, start), min(run.stop, end), run.is_prefix, run.slot_bytes)
        for run in runs
        if run.stop > start and run.start < end
    ]
    continues = next((run for run in runs if run.start < end < run.stop), None)
    return Cut(start, parts[-1].stop, tuple(parts), continues)


@dataclass(slots=True)
class LookupPage:
    """One Lookup under way and the ticket that it is a part of.

    asked ──answer──▶ answered ──update, once for each WAIT──▶ done
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

    def answer(self, states: bytes, slots: bytes) -> None:
        """Raises RemoteProtocolError if this can not be the answer to what was asked."""
        count = self.cut.stop - self.cut.start
        if self.answered or len(states) != count:
            raise RemoteProtocolError(f"{len(states)} states answer a lookup of {count} keys")
        hits = np.flatnonzero(np.frombuffer(states, np.uint8) == _HIT)
        places = _unpack(slots, self.cut.sizes_of(hits), self.geometry)
        self.ticket.put(self.cut.start, states, hits, places)
        self.waiting = states.count(KeyState.WAIT)
        self.answered = self.ticket.answered = True

    def update(self, indices: Sequence[int], states: bytes, slots: bytes) -> None:
        """Raises RemoteProtocolError as answer does."""
        if not self.answered:
            raise RemoteProtocolError("an update came before the answer")
        start, stop = self.cut.start, self.cut.stop
        for i in indices:
            if not (i < stop - start and self.ticket.states[start + i] == KeyState.WAIT):
                raise RemoteProtocolError(f"an update settles key {i}, which is not waited for")
        hits = np.array(indices, np.intp)[np.frombuffer(states, np.uint8) == _HIT]
        places = iter(_unpack(slots, self.cut.sizes_of(hits), self.geometry))
        for i, state in zip(indices, states, strict=True):
            self.ticket.settle(start + i, next(places) if state == KeyState.HIT else None)
        self.waiting -= len(indices)

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
        granted = np.flatnonzero(np.frombuffer(grants, np.uint8) == _GRANTED)
        places = _unpack(slots, self.cut.sizes_of(granted), self.geometry)
        self.places = dict(zip((granted + self.cut.start).tolist(), places, strict=True))
        self.grants = grants
        self.answered = True

    def give_up(self) -> None:
        self.answered = True


@functools.lru_cache(maxsize=8)  # a process sees one slab, or the next; five sums cost 5 us
def _payload(geometry: Geometry) -> tuple[int, int]:
    return geometry.payload_offset, geometry.used_bytes


def _unpack(slots: bytes, sizes: npt.NDArray[np.int64] | int, geometry: Geometry) -> list[Place]:
    """SLOT_DTYPE rows for slots of these sizes. An engine will copy to or from them, so one that
    does not lie in the payload is refused here (RemoteProtocolError).
    """
    if not slots:
        return []
    begin, end = _payload(geometry)
    offsets = np.frombuffer(slots, SLOT_DTYPE)["offset"].astype(np.int64)  # from 2**63 on: negative
    if offsets.min() < begin or (offsets > end - sizes).any():
        raise RemoteProtocolError("a place does not lie in the payload of the slab")
    return cast("list[Place]", unpack_slots(slots))
