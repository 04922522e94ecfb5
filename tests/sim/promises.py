"""What one life of a NodeStore has told its clients, kept from its own words: pins and waits, and
that what a client has copied, or has given up, is nobody's any more.

Not from the core's books, so that a core that forgets what it has said is found out.
"""

from dataclasses import dataclass

from kvray.core import clients
from kvray.core.codec import unpack_keys, unpack_slots
from kvray.core.commands import Waiter
from kvray.core.ids import BlockKey, ClientId, Generation, OpId, SlotIndex, SlotState
from kvray.core.lookups import MAX_WAIT_MS
from kvray.core.messages import Abandon, Commit, KeyState, Lookup, LookupReply, LookupUpdate
from tests.sim.slabs import WatchedSlab


@dataclass(slots=True)
class _Wait:
    keys: int  # not settled yet
    deadline_ms: int


class Promises:
    """Of one NodeProcess; times are by its clock."""

    def __init__(self, slab: WatchedSlab) -> None:
        self._slab = slab
        self._pins: dict[Waiter, list[tuple[SlotIndex, Generation]]] = {}
        self._asked: dict[Waiter, int] = {}  # deadlines of lookups that are not answered
        self._waits: dict[Waiter, _Wait] = {}
        self._wanted: dict[Waiter, list[tuple[BlockKey, int]]] = {}  # keys and bytes of lookups
        self._copied: dict[Waiter, list[tuple[SlotIndex, Generation]]] = {}  # and not acknowledged
        self._silent_since_ms: dict[ClientId, int] = {}
        slab.pins.clear()

    def holds(self, waiter: Waiter) -> bool:
        """Whether what was told about this lookup still counts."""
        return waiter in self._pins

    # -- what is said ----------------------------------------------------------------------------

    def on_lookup(self, client_id: ClientId, lookup: Lookup, now_ms: int) -> None:
        self.drop((client_id, lookup.op))
        self._asked[client_id, lookup.op] = now_ms + min(lookup.deadline_ms, MAX_WAIT_MS)
        sizes: list[int] = []
        for length, size in zip(lookup.run_lengths, lookup.run_slot_bytes, strict=True):
            sizes += [size] * length
        self._wanted[client_id, lookup.op] = list(zip(unpack_keys(lookup.keys), sizes, strict=True))

    def on_reply(self, client_id: ClientId, reply: LookupReply | LookupUpdate) -> None:
        waiter = (client_id, reply.op)
        rows = unpack_slots(reply.slots)
        count = len(reply.states)
        indices = range(count) if isinstance(reply, LookupReply) else reply.indices
        placed = [
            (index, state)
            for index, state in zip(indices, reply.states, strict=True)
            if state in (KeyState.HIT, KeyState.COMING)
        ]
        for (index, state), (slot, generation, _) in zip(placed, rows, strict=True):
            assert self._slab.rows[slot][1] == generation, "a slot that is another's"
            row = self._slab.headers[slot]
            found = (row["key"].tobytes(), row["bytes"])
            assert found == self._wanted[waiter][index], "not what was asked for"
            if state == KeyState.HIT:
                assert self._slab.rows[slot][0] is SlotState.READY, "a HIT that is not there"
                self._slab.pins[slot] = self._slab.pins.get(slot, 0) + 1
                self._pins.setdefault(waiter, []).append((slot, generation))
            else:
                assert self._slab.rows[slot][0] is SlotState.WRITING, "nobody brings it"
        waiting = sum(state in (KeyState.WAIT, KeyState.COMING) for state in reply.states)
        if isinstance(reply, LookupReply):
            deadline_ms = self._asked.pop(waiter)
            if waiting:
                self._waits[waiter] = _Wait(waiting, deadline_ms)
        else:
            wait = self._waits[waiter]
            wait.keys -= len(reply.states) - waiting
            assert wait.keys >= 0, "settled twice"
            if not wait.keys:
                del self._waits[waiter]

    def on_copied(self, client_id: ClientId, said: Commit | Abandon) -> None:
        """A client writes into these no more."""
        if said.slots and said.slab_id == self._slab.slab_id:
            places = [(slot, generation) for slot, generation, _ in unpack_slots(said.slots)]
            self._copied[client_id, said.op] = places

    def on_ack(self, client_id: ClientId, op: OpId) -> None:
        """The NodeStore has taken note of it."""
        for slot, generation in self._copied.pop((client_id, op), ()):
            state, now = self._slab.rows[slot]
            is_over = now != generation or state in (SlotState.READY, SlotState.ABSENT)
            assert is_over, f"{state.name} still, and its writer has said that it has ended"

    def drop(self, waiter: Waiter) -> None:
        """Unpin, or the end of the client."""
        self._wanted.pop(waiter, None)
        self._waits.pop(waiter, None)
        self._asked.pop(waiter, None)
        for slot, _ in self._pins.pop(waiter, ()):
            self._slab.pins[slot] -= 1
            if not self._slab.pins[slot]:
                del self._slab.pins[slot]

    # -- sessions --------------------------------------------------------------------------------

    def on_hello(self, client_id: ClientId) -> None:
        self.end_waits(client_id)
        self._silent_since_ms.pop(client_id, None)

    def on_closed(self, client_id: ClientId, now_ms: int) -> None:
        self.end_waits(client_id)
        self._silent_since_ms[client_id] = now_ms

    def end_waits(self, client_id: ClientId) -> None:
        for table in (self._waits, self._asked):
            for waiter in [waiter for waiter in table if waiter[0] == client_id]:
                del table[waiter]

    def end_client(self, client_id: ClientId) -> None:
        """Bye, or gone."""
        self.end_waits(client_id)
        for waiter in [waiter for waiter in self._wanted if waiter[0] == client_id]:
            self.drop(waiter)
        for waiter in [waiter for waiter in self._copied if waiter[0] == client_id]:
            del self._copied[waiter]

    def lapse(self, now_ms: int) -> None:
        """Pins of clients that have been silent for the grace end now."""
        for client_id, since_ms in list(self._silent_since_ms.items()):
            if now_ms >= since_ms + clients.SESSION_GRACE_MS:
                del self._silent_since_ms[client_id]
                self.end_client(client_id)

    def check(self, now_ms: int) -> None:
        """Nobody waits beyond the deadline. To be called when what was due has been done."""
        assert not self._asked, "a lookup was not answered"
        for waiter, wait in self._waits.items():
            assert now_ms < wait.deadline_ms, f"{waiter[1]} waits beyond its deadline"

    @property
    def is_waited_for(self) -> bool:
        return bool(self._waits)
