"""Who writes what: reserve, commit and abandon of engines, and what happens when they vanish.

    reserve ─▶ writing ──commit──▶ READY        the engine says so after every rank has reported
                  ├─────abandon──▶ free
                  └─────client silent for long, gone, restart of this node──▶ quarantine
                                        quarantine ──listed in a hello──▶ writing
                                        quarantine ──not listed, or all writers gone──▶ free

Between core.store, which knows slots, and core.clients, which knows who is there. It does not know
who waits for a key: its methods name the keys whose writing has ended.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat

from kvray.core.audit import Audits
from kvray.core.clients import Client, Clients
from kvray.core.codec import pack_slots, unpack_keys, unpack_slots
from kvray.core.commands import WriteClient
from kvray.core.effects import Effect, Place
from kvray.core.ids import BlockKey, ClientId, Generation, Maker, OpId, Origin, SlabId, SlotIndex
from kvray.core.layout import MAX_CLIENTS, WRITER_NODE
from kvray.core.messages import Abandon, Commit, Grant, Hello, Reserve, ReserveReply
from kvray.core.store import NODE, Holder, StoreCore
from kvray.core.trusted import Trusted

# Of slots that a hello lists: the Reserve that they came from is not known. Clients count from 1.
RESTORED_OP = OpId(0)
FETCH_HOLDER: Holder = (NODE, OpId(0))  # of all targets of fetches


class Storing:
    """One per NodeStore. Effects are collected here, in order, with the rows of clients."""

    def __init__(
        self, store: StoreCore, clients: Clients, audits: Audits, *, slab_id: SlabId
    ) -> None:
        self._audits = audits
        self._store = store
        self._clients = clients
        self._slab_id = slab_id
        self._effects: list[Effect | WriteClient] = []
        self.is_draining = False  # the node is about to leave: engines store nothing more
        self.has_changes = False  # for the directory; the caller sets it back
        self.counters = dict.fromkeys(
            ("granted", "present", "dropped", "committed", "abandoned", "quarantined"), 0
        )

    def drain_effects(self) -> list[Effect | WriteClient]:
        """What the slab must be told, in this order, before any answer leaves."""
        if not self._effects:
            return [*self._store.drain_effects()]
        effects, self._effects = self._effects, []
        effects += self._store.drain_effects()
        return effects

    def write_client(self, write: WriteClient) -> None:
        """After what has been decided about slots so far, before what comes."""
        self._effects += self._store.drain_effects()
        self._effects.append(write)

    # -- engines ---------------------------------------------------------------------------------

    def reserve(
        self, client: Client, message: Reserve, trusted: Trusted | None, now_ms: int
    ) -> ReserveReply:
        """trusted: by whom a block must be to count for this engine; None: it has not proven
        itself, and stores nothing.
        """
        keys = unpack_keys(message.keys)
        sizes: list[int] = []
        for length, slot_bytes in zip(message.run_lengths, message.run_slot_bytes, strict=True):
            sizes += [slot_bytes] * length
        wants = list(zip(keys, sizes, strict=True))
        if self.is_draining or trusted is None:
            answers = [self._present_or_full(key) for key in keys]
        else:
            self._make_way(keys, trusted)
            wants = self._audited(wants, trusted)
            holder = (client.client_id, message.op)
            makers, row = repeat(client.maker), client.row
            answers = self._reserve(holder, wants, row, Origin.ORIGINAL, now_ms, makers=makers)
        grants = bytearray()
        places: list[Place] = []
        for answer in answers:
            if isinstance(answer, Place):
                grants.append(Grant.GRANTED)
                places.append(answer)
                client.writing[answer.slot] = message.op
            else:
                grants.append(answer)
        if self._audits.is_busy:  # those for which there is no slot are none
            self._audits.end([key for (key, _), grant in zip(wants, grants, strict=True) if grant])
        self.counters["granted"] += len(places)
        self.counters["present"] += grants.count(Grant.PRESENT)
        self.counters["dropped"] += grants.count(Grant.FULL)
        return ReserveReply(message.op, bytes(grants), pack_places(places))

    def commit(self, client: Client, message: Commit, now_ms: int) -> list[BlockKey]:
        """The keys that are READY now."""
        if message.slab_id != self._slab_id:
            return []
        keys: list[BlockKey] = []
        # The last one first: what becomes READY later is hotter, and the head of a chain is worth
        # the most, since without it the others are worth nothing.
        for slot, generation, _ in reversed(unpack_slots(message.slots)):
            holder = self._holder(client, slot)
            occupant = self._store.occupant(slot, generation)
            if occupant is None:
                continue  # repeated, or of a reservation that is over
            if holder is not None and self._store.commit(holder, slot, generation, now_ms):
                del client.writing[slot]
                keys.append(occupant.key)
            else:
                self._release_own(client, slot, generation)
        if keys:
            keys.reverse()
            self.counters["committed"] += len(keys)
            self._audits.stored(len(keys))
            self.has_changes = True
        return keys

    def abandon(self, client: Client, message: Abandon) -> list[BlockKey]:
        """The keys that nobody writes any more."""
        keys: list[BlockKey] = []
        if message.slots and message.slab_id == self._slab_id:
            for slot, generation, _ in unpack_slots(message.slots):
                holder = self._holder(client, slot)
                occupant = self._store.occupant(slot, generation)
                if occupant is None:
                    continue  # repeated, or of a reservation that is over
                if holder is not None and self._store.abandon(holder, slot, generation):
                    del client.writing[slot]
                    keys.append(occupant.key)
                else:
                    self._release_own(client, slot, generation)
        elif not message.slots and message.reserve_op != RESTORED_OP:
            holder = (client.client_id, message.reserve_op)
            for place in self._store.abandon_reservation(holder):
                del client.writing[place.slot]
                keys.append(place.key)
        self.counters["abandoned"] += len(keys)
        return keys

    def restore(self, client: Client, hello: Hello) -> list[BlockKey]:
        """A hello lists what its engine may still write into. What it holds or is quarantined
        because of it and is not listed is free: nobody writes there, and what the engine wanted to
        say of it may have been lost. A hello that speaks of another slab lists nothing of this one
        and frees nothing. The keys that nobody writes any more.

        A listed slot whose key has come back in another one stays in quarantine, until the engine
        says that its copy has ended.
        """
        if not client.is_engine or hello.slab_id != self._slab_id:
            return []
        listed = {(slot, generation) for slot, generation, _ in unpack_slots(hello.writing)}
        keys: list[BlockKey] = []
        for held_by, places in self._store.reservations_of(client.client_id).items():
            for place in places:
                if (place.slot, place.generation) not in listed:
                    self._store.abandon(held_by, place.slot, place.generation)
                    del client.writing[place.slot]
                    keys.append(place.key)
        holder = (client.client_id, RESTORED_OP)
        for slot, generation in self._store.quarantined_by(client.row):
            if (slot, generation) not in listed:
                self._store.release(slot, generation)
            elif self._store.restore_writing(holder, slot, generation, writer=client.row):
                client.writing[slot] = RESTORED_OP
        return keys

    # -- those who vanish ------------------------------------------------------------------------

    def quarantine(self, client: Client) -> list[BlockKey]:
        """The client does not speak any more: its pins are dropped, and its slots wait until
        nobody can write into them. The keys that do not come.
        """
        places = self._store.client_gone(client.client_id)
        client.writing.clear()
        self.counters["quarantined"] += len(places)
        return [place.key for place in places]

    def release_gone(self) -> None:
        """Free what only processes that are gone could write into, and their rows."""
        for engine in self._clients.gone_engines():
            if not engine.is_engine or not self._clients.writers_of(engine):
                self._release_by(engine.row)
                self.write_client(self._clients.clear(engine))

    def release_adopted(self) -> None:
        """At the start: free what the NodeStore before this one could write into, which is gone
        for certain, and what rows say that have been cleared, which is done last.
        """
        taken = {client.row for client in self._clients}
        for row in (*(row for row in range(MAX_CLIENTS) if row not in taken), WRITER_NODE):
            self._release_by(row)

    # -- fetches ---------------------------------------------------------------------------------

    def reserve_targets(
        self,
        wants: Sequence[tuple[BlockKey, int]],
        makers: Sequence[Maker],
        now_ms: int,
        *,
        evicts: bool,
    ) -> list[Grant | Place]:
        """makers: of each, as its source was said to be; the header that proves it says so too."""
        origin = Origin.COPY
        return self._reserve(
            FETCH_HOLDER, wants, WRITER_NODE, origin, now_ms, makers=makers, evicts=evicts
        )

    def commit_targets(self, places: Iterable[Place], now_ms: int) -> None:
        for place in places:
            committed = self._store.commit(FETCH_HOLDER, place.slot, place.generation, now_ms)
            assert committed, "a target of a fetch was taken away"
        self.has_changes = True

    def release_targets(self, places: Iterable[Place]) -> None:
        """WRITING or QUARANTINE: nothing is read into them any more."""
        for place in places:
            slot, generation = place.slot, place.generation
            released = self._store.abandon(FETCH_HOLDER, slot, generation)
            released = released or self._store.release(slot, generation)
            assert released, "a target of a fetch was taken away"

    def quarantine_targets(self, places: Iterable[Place]) -> None:
        for place in places:
            quarantined = self._store.quarantine(place.slot, place.generation)
            assert quarantined, "a target of a fetch was taken away"

    # -- private ---------------------------------------------------------------------------------

    def _reserve(
        self,
        holder: Holder,
        wants: Sequence[tuple[BlockKey, int]],
        writer: int,
        origin: Origin,
        now_ms: int,
        *,
        makers: Iterable[Maker],
        evicts: bool = True,
    ) -> list[Grant | Place]:
        self._effects += self._store.drain_effects()
        answers = self._store.reserve(
            holder,
            wants,
            writer=writer,
            origin=origin,
            makers=makers,
            now_ms=now_ms,
            evicts=evicts,
        )
        effects = self._store.drain_effects()
        granted = sum(isinstance(answer, Place) for answer in answers)
        # One header each; whatever comes on top has evicted something, but for a mark now and then.
        self.has_changes = self.has_changes or len(effects) > granted
        self._effects += effects
        return answers

    def _make_way(self, keys: Sequence[BlockKey], trusted: Trusted) -> None:
        """What is here under these keys and can not count for the engine that has computed them
        makes way: else it could never have them cached. Two makers of one node that store one
        prompt in turn, and trust each other not, so each have a miss for it.
        """
        if not trusted.refused:
            return
        for key, block in zip(keys, self._store.blocks_of(keys), strict=True):
            if block is not None and block.mark and block.place.maker in trusted.refused:
                self.has_changes = self._store.evict(key) or self.has_changes

    def _audited(
        self, wants: list[tuple[BlockKey, int]], trusted: Trusted
    ) -> list[tuple[BlockKey, int]]:
        """What is here by another maker, whom this one trusts, is stored once more now and then,
        under another name.
        """
        blocks = self._store.blocks_of([key for key, _ in wants])
        for i, ((key, size), block) in enumerate(zip(wants, blocks, strict=True)):
            if block is None or not block.mark or block.place.maker == trusted.maker:
                continue
            if block.place.bytes == size and block.place.maker in trusted.makers:
                name = self._audits.begin(key)
                if name is not None:
                    wants[i] = (name, size)
        return wants

    def _present_or_full(self, key: BlockKey) -> Grant | Place:
        is_here = self._store.find(key) is not None or self._store.is_writing(key)
        return Grant.PRESENT if is_here else Grant.FULL

    def _holder(self, client: Client, slot: SlotIndex) -> tuple[ClientId, OpId] | None:
        op = client.writing.get(slot)
        return None if op is None else (client.client_id, op)

    def _release_own(self, client: Client, slot: SlotIndex, generation: Generation) -> None:
        """The engine says that the copy into a quarantined slot of its own has ended."""
        if (slot, generation) in self._store.quarantined_by(client.row):
            self._store.release(slot, generation)

    def _release_by(self, row: int) -> None:
        for slot, generation in self._store.quarantined_by(row):
            self._store.release(slot, generation)

    def check(self) -> None:
        """Assert that the table of clients and the store agree on who writes what."""
        for client in self._clients:
            held = {
                (place.slot, op)
                for (_, op), places in self._store.reservations_of(client.client_id).items()
                for place in places
            }
            assert held == set(client.writing.items()), "a slot of nobody, or a writer of no slot"


def pack_places(places: list[Place]) -> bytes:
    """SLOT_DTYPE rows."""
    return pack_slots((place.slot, place.generation, place.offset) for place in places)
