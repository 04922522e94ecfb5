"""What an engine says without waiting for an answer, and which slots it may still write into.

    granted ──▶ written into by the ranks ──commit──▶ said, repeated ──Ack──▶ forgotten
                                          ──abandon─▶ forgotten, and said, repeated ──Ack──

A Hello after a lost connection lists what is granted and neither abandoned nor known to be
committed: those slots are not given away by a NodeStore that has come back (rule 3). One thread,
which sleeps while there is nothing to say or nobody to say it to.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvray.core.codec import SlotRow, encode, pack_slots, unpack_slots
from kvray.core.ids import Generation, OpId, SlabId, SlotIndex
from kvray.core.messages import (
    MAX_KEYS_PER_MESSAGE,
    MAX_WRITING_LISTED,
    Abandon,
    Bye,
    Commit,
    Introduce,
    Report,
    Unpin,
)
from kvray.node import wire
from kvray.node.connector import Connection
from kvray.node.outbox import Outbox, OutboxMessage
from kvray.node.tickets import Place


class Teller:
    """All methods may be called from any thread, and only drain, bye and close wait.

    ops: the client's operation numbers. counters: gets outbox_dropped.
    """

    def __init__(self, ops: Iterator[int], counters: Counter[str], *, outbox_limit: int) -> None:
        self._ops = ops
        self._counters = counters
        self._outbox = Outbox(outbox_limit)
        # Single operations on a set are atomic under the GIL, and a copy of it is one.
        self._writing: set[tuple[SlabId, int, int]] = set()  # slab, slot, generation
        self._introduced_op: OpId | None = None  # of the last introduction, until it is heard
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="kvray-outbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def granted(self, slab_id: SlabId, places: Iterable[Place]) -> None:
        """The NodeStore has given us these slots to write into."""
        for slot, generation, _ in places:
            self._writing.add((slab_id, slot, generation))

    def commit(self, slab_id: SlabId, places: Sequence[Place]) -> None:
        for rows in _pages(places):
            self._put(Commit(self._next_op(), slab_id, rows))

    def abandon(self, slab_id: SlabId, places: Sequence[Place]) -> None:
        self._forget(slab_id, places)
        for rows in _pages(places):
            self._put(Abandon(self._next_op(), slab_id, rows))

    def undo(self, reserve_ops: Sequence[OpId], slab_id: SlabId, places: Iterable[Place]) -> None:
        """Cancel these reserves as a whole. It is sent behind them on the same socket, so it does
        not matter whether they have been answered, or ever are.
        """
        places = list(places)
        self._forget(slab_id, places)
        for reserve_op in reserve_ops:
            self._put(Abandon(self._next_op(), slab_id, b"", reserve_op=reserve_op))
        # A hello that came in between has listed these: then they are no part of it any more.
        for rows in _pages(places):
            self._put(Abandon(self._next_op(), slab_id, rows))

    def unpin(self, lookup_op: OpId) -> None:
        self._put(Unpin(self._next_op(), lookup_op=lookup_op))

    @property
    def is_introducing(self) -> bool:
        """Whether the NodeStore may still take this engine for what it was before."""
        return self._introduced_op is not None

    def introduce(self, introduction: Introduce) -> None:
        """It has an op of its own already."""
        self._introduced_op = introduction.op
        self._put(introduction)

    def report(self, counters: Mapping[str, int]) -> None:
        self._put(Report(self._next_op(), dict(counters)))

    # ---- the connection

    def open(self, connection: Connection) -> None:
        """Say everything again that was not acknowledged, and go on."""
        self._connection = connection
        self._outbox.rewind()

    def lost(self) -> None:
        self._connection = None
        self._outbox.pause()

    def acknowledged(self, op: OpId) -> None:
        message = self._outbox.acknowledge(op)
        if isinstance(message, Commit):
            self._forget(message.slab_id, unpack_slots(message.slots))
        elif op == self._introduced_op:
            self._introduced_op = None

    def still_written(self, slab_id: SlabId) -> list[SlotRow]:
        """What a Hello has to list: slots of this slab that a rank may be writing; then, as far as
        there is room, those whose commit has still to be heard, which would else be freed.

        More than MAX_WRITING_LISTED come back only if so many are really being written.
        """
        committed = {
            (slot, generation)
            for message in self._outbox.unacknowledged()
            if isinstance(message, Commit) and message.slab_id == slab_id
            for slot, generation, _ in unpack_slots(message.slots)
        }
        granted = {
            (slot, generation) for of, slot, generation in self._writing.copy() if of == slab_id
        }
        rows = sorted(granted - committed)
        rows += sorted(granted & committed)[: max(0, MAX_WRITING_LISTED - len(rows))]
        return [(SlotIndex(slot), Generation(generation), 0) for slot, generation in rows]

    # ---- the end

    def drain(self, deadline_s: float) -> bool:
        return self._outbox.wait_empty(deadline_s)

    def bye(self, deadline_s: float) -> bool:
        """The last word; whether it was acknowledged by the deadline, or the connection lost."""
        self._put(Bye(self._next_op()))
        return self.drain(deadline_s)

    def close(self, join_s: float) -> None:
        """What has not been said is dropped. The connection has been ended before, so that the
        thread does not sleep on it.
        """
        self._outbox.close()
        if self._thread.ident is not None:
            self._thread.join(join_s)

    # ---- the thread

    def _run(self) -> None:
        """What can not be sent now is sent after the next hello."""
        while (message := self._outbox.take()) is not None:
            connection = self._connection
            if connection is None:
                continue
            data = encode(message)
            with connection.sending:
                while not connection.has_ended():
                    try:
                        wire.send(connection.sock, data)
                        break
                    except BlockingIOError:
                        connection.wait_room()
                    except OSError as exc:
                        connection.end(f"the connection broke: {exc.strerror}")

    # ---- helpers

    def _next_op(self) -> OpId:
        return OpId(next(self._ops))

    def _put(self, message: OutboxMessage) -> None:
        dropped = self._outbox.put(message)
        if dropped is not None:
            self._counters["outbox_dropped"] += 1
            if isinstance(dropped, Commit):
                self._forget(dropped.slab_id, unpack_slots(dropped.slots))
            connection = self._connection
            if isinstance(dropped, Abandon | Commit) and connection is not None:
                # Else whoever wants one of these keys would wait for us in vain, each time.
                connection.end("more is to be said than is heard: the next hello says what is ours")

    def _forget(self, slab_id: SlabId, places: Iterable[tuple[int, int, int]]) -> None:
        for slot, generation, _ in places:
            self._writing.discard((slab_id, slot, generation))

    def snapshot(self) -> dict[str, int]:
        return {
            "writing": len(self._writing),
            # An introduction waits for a NodeStore as long as there is none, and is no work.
            "unacknowledged": sum(
                not isinstance(message, Introduce) for message in self._outbox.unacknowledged()
            ),
        }

    def check(self) -> None:
        self._outbox.check()


def _pages(places: Sequence[Place]) -> Iterator[bytes]:
    """SLOT_DTYPE rows for one message after another."""
    for start in range(0, len(places), MAX_KEYS_PER_MESSAGE):
        page = itertools.islice(places, start, start + MAX_KEYS_PER_MESSAGE)
        yield pack_slots((SlotIndex(slot), Generation(gen), offset) for slot, gen, offset in page)
