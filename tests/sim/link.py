"""One one-sided read under way: pieces of a peer's slab land in ours, whoever is asleep.

    posted ──piece by piece──▶ DONE          slow: a second or more, late for its deadline
       │ ├──────────────────▶ ERR            fails in the middle
       │ └──────────────────▶ never          lands pieces now and then, until the process ends
       └──▶ stands still while there is a partition or the peer is frozen

The pieces of a payload come in any order, and the bytes are those of the moment. Headers are read
a few at a time; now and then right after their payload, in the same read.
"""

from typing import TYPE_CHECKING

import numpy as np

from kvray.core.commands import NodeCommand, PostRead, ReadKind
from kvray.core.header_runs import Offsets
from kvray.core.ids import SlotState
from kvray.core.layout import HEADER_BYTES
from tests.sim.slabs import PIECES, Writing

if TYPE_CHECKING:
    from tests.sim.process import NodeProcess

STALLED_LOOK_US = 150_000


class Transfer:
    """See the picture. It ends once, however late."""

    def __init__(self, reader: "NodeProcess", post: PostRead) -> None:
        self.abandoned = False
        self.stuck = False
        self.node_id = post.node_id  # of the peer
        self._reader = reader
        self._world = world = reader.world
        self._post = post
        peer = world.machines[post.node_id].process
        self._peer = peer if peer is not None and peer.core.info.epoch == post.epoch else None
        self._writings: list[Writing] = []
        self._steps: list[tuple[int, int]] = []  # (block, piece) or (header, 0)
        self._rows = np.empty(0)
        self._landing = post.kind
        if self._landing is ReadKind.PAYLOAD:
            self._begin_payload()
        else:
            self._begin_headers(post.remote_offsets)
        random = world.random
        self._brings_headers = random.randrange(2) == 0  # of a payload
        self._fails_at = len(self._steps) + 1
        self._step_us = random.randrange(20, 400)
        if world.hits("read_failed", reader.name, post.kind.value):
            self._fails_at = random.randrange(len(self._steps) + 1)
        elif world.hits("read_slow", reader.name, post.kind.value):
            self._step_us = random.choice((40_000, 200_000, 500_000))
        elif world.hits("read_stuck", reader.name, post.kind.value):
            self.stuck = True
            self._step_us = random.choice((300_000, 1_000_000, 3_000_000))
        self._pieces_a_step = random.choice((1, 2, 4))
        world.schedule.after(random.randrange(50, 400), self._step)

    def _begin_payload(self) -> None:
        post, slab, random = self._post, self._reader.watched_slab, self._world.random
        for target, size in zip(post.local_offsets.tolist(), post.bytes.tolist(), strict=True):
            (slot,) = (
                slot
                for slot, (state, _) in enumerate(slab.rows)
                if state is SlotState.WRITING and slab.headers[slot]["offset"] == target
            )
            generation = slab.rows[slot][1]
            self._writings.append(Writing(slab, slot, generation, target, size))  # type: ignore[arg-type]
        blocks = range(len(self._writings))
        self._steps = [(block, piece) for block in blocks for piece in range(PIECES)]
        if random.randrange(2):
            random.shuffle(self._steps)

    def _begin_headers(self, offsets: Offsets) -> None:
        peer = self._peer
        self._steps = [(n, 0) for n in range(len(offsets))]
        if peer is not None:
            table = peer.slab.geometry.slot_table_offset
            self._slots = ((offsets - np.uint64(table)) // HEADER_BYTES).tolist()
            self._rows = np.zeros(len(self._steps), peer.slab.headers.dtype)

    def _step(self) -> None:
        """The next pieces, or the end."""
        reader, peer, world = self._reader, self._peer, self._world
        if reader.ended or reader.transfers.get(self._post.read_id) is not self:
            return
        if peer is None or peer.ended or self._fails_at <= 0:
            self.stuck = self.stuck or world.hits("read_stuck", reader.name, "peer is gone")
            if not self.stuck:
                self._end(ok=False)
            return
        if world.network.is_cut(reader.name, peer.name) or (
            peer.frozen and not peer.reads_when_frozen
        ):
            world.schedule.after(STALLED_LOOK_US, self._step)
            return
        for _ in range(self._pieces_a_step):
            if self._steps and self._fails_at > 0:
                self._fails_at -= 1
                self._land(*self._steps.pop())
        if self._steps or self._fails_at <= 0:
            world.schedule.after(self._step_us, self._step)
        elif not self.stuck:
            world.schedule.after(world.random.randrange(10, 300), self._finish)

    def _finish(self) -> None:
        if self._reader.ended:
            return
        if self._landing is ReadKind.HEADERS or not self._brings_headers or self.abandoned:
            self._end(ok=True)
            return
        self._landing = ReadKind.HEADERS
        assert self._post.header_runs is not None
        self._begin_headers(self._post.header_runs.offsets)
        self._fails_at = len(self._steps) + 1
        if self._world.hits("read_failed", self._reader.name, "headers"):
            self._fails_at = self._world.random.randrange(len(self._steps) + 1)
        self._world.schedule.after(self._step_us, self._step)

    def _land(self, block: int, piece: int) -> None:
        assert self._peer is not None
        if self.abandoned:
            self._world.count("late_landing")
        source = self._peer.watched_slab
        if self._landing is ReadKind.HEADERS:
            self._rows[block] = source.headers[self._slots[block]]
            return
        writing = self._writings[block]
        piece_bytes = writing.bytes // PIECES
        offset = int(self._post.remote_offsets[block]) + piece * piece_bytes
        writing.put(piece, source.piece(offset, piece_bytes))

    def _end(self, *, ok: bool) -> None:
        reader, post = self._reader, self._post
        del reader.transfers[post.read_id]
        self._forget()
        rows = self._rows

        def ended(now_ms: int) -> list[NodeCommand]:
            reader.reads.pop(post.read_id)
            reader.abandoned.discard(post.read_id)
            if ok and self._landing is ReadKind.HEADERS:
                return reader.core.on_headers(post.read_id, rows, now_ms)
            return reader.core.on_read_done(post.read_id, ok=ok, now_ms=now_ms)

        reader.event(ended)

    def heal(self) -> None:
        """A stuck read ends after all."""
        if self.stuck:
            self.stuck = False
            self._world.schedule.after(1, self._finish if not self._steps else self._step)

    def die(self) -> None:
        """The process that reads has ended."""
        self._forget()

    def _forget(self) -> None:
        for writing in self._writings:
            writing.end()
        self._writings = []
