"""Lookups of engines: what is here, what is on its way, and who is told what.

    key READY here ─▶ HIT, pinned
    key being written by an engine of this node ─▶ WAIT ─committed─▶ HIT
    key that peers may have, or that is being fetched ─▶ WAIT ─slot reserved─▶ COMING ─▶ HIT
    anything else, and what comes to nothing or not before the deadline ─▶ MISS

Within a prefix run nothing behind the first MISS is worth anything: it is neither fetched nor
waited for, and what waits there is a MISS too. What is pinned stays pinned until Unpin.

A lookup is kept here only as long as it waits: pins are in the store, under (client, op). What
settles in one event is told in one message.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from kvray.core.audit import Audits
from kvray.core.break_even import ALWAYS, Worth
from kvray.core.codec import pack_slot, unpack_keys
from kvray.core.commands import (
    Arrived,
    Coming,
    FetchCommand,
    Missed,
    Send,
    Waiter,
)
from kvray.core.durations import Durations
from kvray.core.effects import Place
from kvray.core.fetch import FetchCore
from kvray.core.ids import KEY_BYTES, BlockKey, ClientId, OpId
from kvray.core.look import Look, Run, runs_of
from kvray.core.messages import KeyState, Lookup, LookupReply, LookupUpdate
from kvray.core.reasons import MissReason
from kvray.core.store import StoreCore
from kvray.core.trusted import Trusted
from kvray.core.waits import Waits

MAX_WAITING_LOOKUPS = 1_024  # requests of a node's engines that wait at a time: far more than run
MAX_WAIT_MS = 60_000  # whatever a lookup asks for: after a minute a recompute was cheaper

_HIT, _MISS, _WAIT, _COMING = KeyState.HIT, KeyState.MISS, KeyState.WAIT, KeyState.COMING


class _Lookup(msgspec.Struct, eq=False):
    """A lookup that waits for something."""

    client_id: ClientId
    op: OpId
    session_id: int
    runs: list[Run]
    states: bytearray  # one KeyState a key
    waiting: dict[BlockKey, int]  # key and its index
    slots: dict[int, bytes]  # SLOT_DTYPE rows of what is HIT or COMING and has not been told
    deadline_ms: int
    begun_ms: int
    is_answered: bool = False  # the LookupReply is out: the rest goes into LookupUpdates
    changed: set[int] = set()  # other than what was told last
    causes: dict[int, MissReason] = {}  # of misses that have not been told
    is_stranger: bool = False  # see Lookups.begin
    trusted: Trusted | None = None  # never None while it waits

    def accepts(self, place: Place) -> bool:
        """Whether a block counts for the engine that asks."""
        return self.trusted is not None and self.trusted.accepts(place.maker)

    @property
    def waiter(self) -> Waiter:
        return (self.client_id, self.op)

    def run_of(self, index: int) -> Run:
        return next(run for run in self.runs if index < run.stop)


class Lookups:
    """All lookups of one NodeStore. Pins and unpins; wants of, and forgets in, FetchCore."""

    def __init__(self, store: StoreCore, fetch: FetchCore, audits: Audits) -> None:
        self._audits = audits
        self._store = store
        self._fetch = fetch
        self._waiting: dict[Waiter, _Lookup] = {}
        self._writes = Waits()  # for keys that engines of this node are writing
        self._untold: dict[Waiter, _Lookup] = {}
        self.misses = dict.fromkeys(MissReason, 0)  # in keys, as the counters are
        self.durations = Durations()  # until nothing of a look-up was waited for any more
        self.counters = dict.fromkeys(
            ("lookups", "looked_up", "hits_local", "hits_fetched", "hits_awaited", "waits"), 0
        )

    # -- a lookup's life -------------------------------------------------------------------------

    def begin(
        self,
        client_id: ClientId,
        session_id: int,
        message: Lookup,
        *,
        trusted: Trusted,
        no_fetch: MissReason | None,
        is_stranger: bool = False,
        now_ms: int,
    ) -> tuple[LookupReply | None, list[FetchCommand]]:
        """trusted: whose blocks count. no_fetch: why nothing can be fetched now; None if it can.
        is_stranger: other engines of its model have other names for the same blocks, so what is
        nowhere may be theirs.

        Returns the reply, or None if the lookup waits: it is told by take_told then. And what
        FetchCore has said to its wants.
        """
        keys = unpack_keys(message.keys)
        waiter: Waiter = (client_id, message.op)
        self.unpin(waiter)  # an op that was used before: its pins would never be asked for again
        if len(self._waiting) >= MAX_WAITING_LOOKUPS:
            no_fetch = MissReason.OVERLOADED
        elif not message.fetch:
            no_fetch = MissReason.LOCAL_ONLY
        if no_fetch is MissReason.NEVER_SEEN and is_stranger:
            no_fetch = MissReason.NAMESPACE_DIFFERS
        look = Look(self._store, self._fetch, keys, trusted, no_fetch)
        runs = runs_of(message)
        for run in runs:
            look.run(run)
        may_audit = message.may_audit and self._audits.is_due
        if may_audit and (key := look.audit(runs)) is not None:
            self._audits.want(key)
        worth = self._weigh(message, runs, look, now_ms)
        self.counters["lookups"] += 1
        self.counters["looked_up"] += len(keys)
        slots = self._pin(waiter, look, now_ms)
        for reason, count in look.misses.items():
            self.misses[reason] += count
        if not look.writes and not look.wants:
            self.durations.add(0)
            return LookupReply(message.op, bytes(look.states), b"".join(slots), look.causes()), []
        deadline_ms = now_ms + min(message.deadline_ms, MAX_WAIT_MS)
        lookup = _Lookup(
            client_id,
            message.op,
            session_id,
            runs,
            look.states,
            {keys[i]: i for i in sorted((*look.writes, *look.wants))},
            dict(zip(look.hits(), slots, strict=True)),
            deadline_ms,
            now_ms,
            causes=look.causes(),
            is_stranger=is_stranger,
            trusted=trusted,
        )
        self.counters["waits"] += len(lookup.waiting)
        self._waiting[waiter] = self._untold[waiter] = lookup
        for i in look.writes:
            self._writes.join(waiter, keys[i], deadline_ms)
        wants = [(keys[i], run.slot_bytes) for run in runs for i in look.wants_of(run)]
        if not wants:
            return None, []
        return None, self._fetch.want(
            waiter, wants, worth=worth, trusted=trusted, deadline_ms=deadline_ms
        )

    def refuse(self, message: Lookup, reason: MissReason) -> LookupReply:
        """All of it is missed, wherever it may be."""
        count = len(message.keys) // KEY_BYTES
        self.counters["lookups"] += 1
        self.counters["looked_up"] += count
        self.misses[reason] += count
        self.durations.add(0)
        return LookupReply(message.op, bytes(count), b"", {0: reason} if count else {})

    def unpin(self, waiter: Waiter) -> None:
        """The pins of a lookup are dropped and nothing is waited for any more; not told."""
        self._store.unpin(waiter)
        lookup = self._waiting.pop(waiter, None)
        if lookup is not None:
            self._stop_waiting(lookup, list(lookup.waiting))
            self._untold.pop(waiter, None)

    def end_session(self, client_id: ClientId) -> None:
        """Nobody hears the answers of this client's lookups. Their pins stay."""
        for waiter, lookup in list(self._waiting.items()):
            if lookup.client_id == client_id:
                self._stop_waiting(lookup, list(lookup.waiting))
                del self._waiting[waiter]
                self._untold.pop(waiter, None)

    def on_tick(self, now_ms: int) -> None:
        """Whoever waits for an engine's write hears at its deadline that it is a miss. For fetches
        FetchCore says so.
        """
        for waiter in self._writes.take_due(now_ms):
            keys = self._writes.keys_of(waiter)
            self._writes.leave(waiter, keys)
            for key in keys:
                self._writes.tell_missed(waiter, key, MissReason.DEADLINE)
        self._settle_writes(now_ms)

    def next_deadline_ms(self) -> int | None:
        return self._writes.next_ms()

    # -- what settles ----------------------------------------------------------------------------

    def on_committed(self, keys: Iterable[BlockKey], now_ms: int) -> None:
        """An engine has written these."""
        if not self._writes:
            return
        for key in keys:
            self._writes.arrive(key)
        self._settle_writes(now_ms)

    def on_given_up(self, keys: Iterable[BlockKey], now_ms: int) -> None:
        """An engine was writing these, and they do not come."""
        for key in keys:
            self._writes.miss(key, MissReason.WRITER_FAILED)
        self._settle_writes(now_ms)

    def on_arrived(self, told: Arrived, now_ms: int, *, counter: str = "hits_fetched") -> None:
        """Pins at once what has arrived: it may be the first to be evicted."""
        lookup = self._waiting.get(told.waiter)
        if lookup is None:
            return  # all of it was behind a miss of the same event
        for key in told.keys:
            if key in lookup.waiting:
                place = self._store.find(key)
                if place is not None and not lookup.accepts(place):
                    self._miss(lookup, key, MissReason.UNTRUSTED)
        keys = [key for key in told.keys if key in lookup.waiting]
        sizes = [lookup.run_of(lookup.waiting[key]).slot_bytes for key in keys]
        places = self._store.pin(told.waiter, keys, slot_bytes=sizes, now_ms=now_ms)
        for key, place in zip(keys, places, strict=True):
            index = lookup.waiting.get(key)
            if index is None:
                continue  # a miss of this event was before it in its run
            if place is not None:
                del lookup.waiting[key]
                lookup.states[index] = _HIT
                lookup.slots[index] = pack_slot(place.slot, place.generation, place.offset)
                self._note(lookup, index)
                self.counters[counter] += 1
            elif self._store.is_writing(key) and key not in self._fetch:
                self._writes.join(told.waiter, key, lookup.deadline_ms)
            else:
                is_here = self._store.find(key) is not None
                reason = MissReason.OTHER_SIZE if is_here else MissReason.OVERLOADED
                self._miss(lookup, key, reason)
        self._forget_if_settled(lookup, now_ms)

    def on_coming(self, told: Coming) -> None:
        """Nothing is pinned yet, and nothing is settled: these are waited for as before. A slot
        that was reserved for a block of a maker whom another one trusts is not told to this one,
        who would begin to load it.
        """
        lookup = self._waiting.get(told.waiter)
        if lookup is None:
            return
        for place in told.places:
            index = lookup.waiting.get(place.key)
            if index is not None and lookup.accepts(place):
                lookup.states[index] = _COMING
                lookup.slots[index] = pack_slot(place.slot, place.generation, place.offset)
                self._note(lookup, index)

    def on_missed(self, told: Missed, now_ms: int) -> None:
        lookup = self._waiting.get(told.waiter)
        if lookup is None:
            return  # all of it was behind a miss of the same event
        for key in told.keys:
            if key in lookup.waiting:
                self._miss(lookup, key, told.reason)
        self._forget_if_settled(lookup, now_ms)

    def take_told(self) -> list[Send]:
        """The replies and updates that are due."""
        if not self._untold:
            return []
        sends = [Send(lookup.session_id, _message(lookup)) for lookup in self._untold.values()]
        self._untold.clear()
        return sends

    # -- private ---------------------------------------------------------------------------------

    def _weigh(self, message: Lookup, runs: list[Run], look: Look, now_ms: int) -> Worth:
        """Refuse what the engine computes sooner than it could be fetched. What is under way
        already costs nothing more.
        """
        block_us = message.key_compute_us
        if not block_us or not look.wants:
            return ALWAYS
        worth = Worth(block_us, block_us * len(look.wants))
        new_bytes = sum(run.slot_bytes * look.new_wants_of(run) for run in runs)
        if new_bytes and not self._fetch.pays(new_bytes, worth, now_ms):
            for run in runs:
                if look.new_wants_of(run):
                    look.refuse(run, MissReason.BELOW_BREAK_EVEN)
        return worth

    def _pin(self, waiter: Waiter, look: Look, now_ms: int) -> list[bytes]:
        """Pin the hits of a look; their rows. Beyond the limit of pins there is no hit and nothing
        to wait for: half a chain would have to be computed anyway.
        """
        blocks = look.blocks()
        if not self._store.pin_blocks(waiter, blocks, now_ms):
            look.spoil(MissReason.OVERLOADED)
            return []
        self.counters["hits_local"] += len(blocks)
        return [block.row for block in blocks]

    def _settle_writes(self, now_ms: int) -> None:
        for told in self._writes.take_told():
            if isinstance(told, Missed):
                self.on_missed(told, now_ms)
            elif isinstance(told, Arrived):
                self.on_arrived(told, now_ms, counter="hits_awaited")

    def _miss(self, lookup: _Lookup, key: BlockKey, reason: MissReason) -> None:
        """The key is a miss; in a prefix run so is everything behind it that is waited for."""
        index = lookup.waiting.pop(key)
        self._note_miss(lookup, index)
        if reason is MissReason.NEVER_SEEN:
            if self._store.was_evicted(key):
                reason = MissReason.EVICTED
            elif lookup.is_stranger:
                reason = MissReason.NAMESPACE_DIFFERS
        self.misses[reason] += 1
        run = lookup.run_of(index)
        if not any(run.start <= at < index for at in lookup.causes):
            lookup.causes[index] = reason
        if not run.is_prefix:
            return
        behind = {k: i for k, i in lookup.waiting.items() if index < i < run.stop}
        for i in behind.values():
            self._note_miss(lookup, i)
        self.misses[MissReason.BEHIND] += len(behind)
        self._stop_waiting(lookup, list(behind))

    def _stop_waiting(self, lookup: _Lookup, keys: list[BlockKey]) -> None:
        self._fetch.forget(lookup.waiter, keys)
        self._writes.leave(lookup.waiter, keys)
        for key in keys:
            del lookup.waiting[key]

    def _note_miss(self, lookup: _Lookup, index: int) -> None:
        lookup.states[index] = _MISS
        lookup.slots.pop(index, None)  # where it would have been
        self._note(lookup, index)

    def _note(self, lookup: _Lookup, index: int) -> None:
        if lookup.is_answered:
            lookup.changed.add(index)
            self._untold[lookup.waiter] = lookup

    def _forget_if_settled(self, lookup: _Lookup, now_ms: int) -> None:
        if not lookup.waiting and self._waiting.pop(lookup.waiter, None) is not None:
            self.durations.add(now_ms - lookup.begun_ms)

    def fetching(self) -> list[Waiter]:
        """The lookups that wait for a fetch."""
        return [waiter for waiter in self._waiting if self._fetch.wanted_by(waiter)]

    def snapshot(self) -> dict[str, Any]:
        return (
            {
                "waiting": len(self._waiting),
                "waiting_for_writes": self._writes.snapshot(),
                "durations": list(self.durations.counts),
            }
            | self.counters
            | {"misses": {reason.value: count for reason, count in self.misses.items() if count}}
        )

    def check(self) -> None:
        """Assert that each lookup waits for something, that somebody brings it, and that nothing
        is brought to nobody.
        """
        assert len(self._waiting) <= MAX_WAITING_LOOKUPS
        assert not self._untold, "not told"
        self._writes.check()
        for waiter, lookup in self._waiting.items():
            assert lookup.waiter == waiter
            assert lookup.waiting, "waits for nothing"
            assert lookup.is_answered
            written = set(self._writes.keys_of(waiter))
            fetched = set(self._fetch.wanted_by(waiter))
            assert not written & fetched, "waits twice for a key"
            assert written | fetched == lookup.waiting.keys(), "waits for what nobody brings"
            assert all(self._store.is_writing(key) for key in written)
            assert not any(key in self._fetch for key in written)
            indices = [i for i, state in enumerate(lookup.states) if state in (_WAIT, _COMING)]
            assert indices == sorted(lookup.waiting.values())
        for waiter in self._writes.waiters():
            assert waiter in self._waiting, "something is brought to nobody"


def _message(lookup: _Lookup) -> LookupReply | LookupUpdate:
    """What there is to tell of a lookup, which is told then."""
    slots = b"".join(lookup.slots[i] for i in sorted(lookup.slots))
    lookup.slots = {}
    causes, lookup.causes = lookup.causes, {}
    if not lookup.is_answered:
        lookup.is_answered = True
        return LookupReply(lookup.op, bytes(lookup.states), slots, causes)
    indices = sorted(lookup.changed)
    lookup.changed = set()
    states = bytes(lookup.states[i] for i in indices)
    return LookupUpdate(lookup.op, indices, states, slots, causes)
