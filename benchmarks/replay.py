"""A cluster for replays: NodeCores and a DirectoryCore with as little around them as can be.

Whatever decides is the real thing: look-ups, planner, fetches and their proof, storing, eviction,
announces, the directory. Played are the slab (its headers, without payload), the engines (one a
node, whose copies take no time), the link (a read ends at once) and the clock. Messages are not
encoded; the tests do that. `check()` is not called here, the tests do that too.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvray.core.codec import pack_keys, pack_slots, unpack_slots
from kvray.core.commands import CallDirectory, NodeCommand, PostRead, ReadKind, Send, TakeEpoch
from kvray.core.directory import TICK_MS, DirectoryCore
from kvray.core.effects import WriteHeader
from kvray.core.eviction import Replacement, policy_named
from kvray.core.ids import (
    KEY_BYTES,
    BlockKey,
    ClientId,
    Epoch,
    Maker,
    Namespace,
    NodeId,
    OpId,
    Role,
    SlabId,
    Term,
)
from kvray.core.layout import (
    FORMAT_VERSION,
    HEADER_BYTES,
    MIN_EXTENT_BYTES,
    SLOT_ALIGN_BYTES,
    SLOT_HEADER_DTYPE,
    Geometry,
)
from kvray.core.messages import (
    Announce,
    AnnounceReply,
    Commit,
    Grant,
    Hello,
    KeyState,
    LocalAnswer,
    Locate,
    LocateReply,
    Lookup,
    LookupReply,
    LookupUpdate,
    NodeHello,
    NodeHelloReply,
    NodeInfo,
    Reserve,
    ReserveReply,
    Unpin,
)
from kvray.core.node import NodeCore
from kvray.core.store import StoreCore

BLOCK_BYTES = SLOT_ALIGN_BYTES  # the smallest slot: nothing depends on it here
EXTENT_BLOCKS = MIN_EXTENT_BYTES // BLOCK_BYTES
WALL_CLOCK_OFFSET_MS = 1_000_000
JOIN_MS = 5_000  # until each node has joined and knows the others, many times over
DEADLINE_MS = 60_000
SESSION_ID = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """capacity_blocks: of a node, a multiple of EXTENT_BLOCKS. peers: whether nodes fetch.
    probation_fraction, reused_fraction: see Config.
    """

    node_count: int
    capacity_blocks: int
    replacement: Replacement
    probation_fraction: float
    reused_fraction: float
    peers: bool


@dataclass(frozen=True, slots=True)
class Served:
    """How many blocks of a request were hits, from its first on, and how many needed no peer."""

    hit_count: int
    local_count: int


class Node:
    """A NodeCore, the headers of its slab, and its engine."""

    def __init__(self, cluster: "ReplayCluster", name: str, settings: Settings) -> None:
        self._cluster = cluster
        self._peers = settings.peers
        self._ops = itertools.count(1)
        self._answers: list[LocalAnswer] = []
        self.node_id = NodeId(name)
        geometry = _geometry(settings.capacity_blocks)
        self._slot_table_offset = geometry.slot_table_offset
        self.headers: list[WriteHeader | None] = [None] * geometry.slot_count
        self._slab_id = SlabId(name.encode().ljust(16, b"."))
        policy = policy_named(
            settings.replacement,
            probation_fraction=settings.probation_fraction,
            reused_fraction=settings.reused_fraction,
        )
        self._info = NodeInfo(
            node_id=self.node_id,
            epoch=Epoch(WALL_CLOCK_OFFSET_MS),
            link_name=name,
            link_metadata=b"",
            slab_id=self._slab_id,
            slab_address=0,
            slab_bytes=geometry.slab_bytes,
            extent_bytes=geometry.extent_bytes,
            host="here",
            kvray_version="0",
            format_version=FORMAT_VERSION,
        )
        self.core = NodeCore(
            self._info,
            StoreCore(geometry, policy=policy),
            wall_clock_offset_ms=WALL_CLOCK_OFFSET_MS,
            now_ms=cluster.now_ms,
        )

    def start(self) -> None:
        self._do(self.core.start(self._cluster.now_ms))
        client = ClientId(1, 1, 1)
        self._say(
            Hello(
                self._op(),
                client,
                Role.ENGINE,
                1,
                Namespace(b"n" * 16),
                "replay",
                SlabId(b""),
                maker=Maker(1),
            )
        )

    def tick(self) -> None:
        due_ms = self.core.next_deadline_ms()
        if due_ms is not None and due_ms <= self._cluster.now_ms:
            self._do(self.core.on_tick(self._cluster.now_ms))

    def serve(self, keys: Sequence[BlockKey]) -> Served:
        """As an engine does: look up, load what is there, compute the rest, store it."""
        op = self._op()
        run = ([len(keys)], [True], [BLOCK_BYTES])
        fetched: set[int] = set()
        states = bytearray()
        for answer in self._say(
            Lookup(op, pack_keys(keys), *run, deadline_ms=DEADLINE_MS, fetch=self._peers)
        ):
            if isinstance(answer, LookupReply):
                states[:] = answer.states
                fetched = {i for i, state in enumerate(states) if state == KeyState.WAIT}
            elif isinstance(answer, LookupUpdate):
                for index, state in zip(answer.indices, answer.states, strict=True):
                    states[index] = state
        assert KeyState.WAIT not in states, "a read does not end at once"
        hits = list(itertools.takewhile(lambda i: states[i] == KeyState.HIT, range(len(keys))))
        self._say(Unpin(self._op(), op))
        self._store(keys[len(hits) :])
        return Served(len(hits), sum(i not in fetched for i in hits))

    def _store(self, keys: Sequence[BlockKey]) -> None:
        if not keys:
            return
        reserve = Reserve(self._op(), pack_keys(keys), [len(keys)], [BLOCK_BYTES])
        (reply,) = self._say(reserve)
        assert isinstance(reply, ReserveReply)
        assert Grant.FULL not in reply.grants, "a request is larger than a node"
        if reply.slots:
            rows = pack_slots(unpack_slots(reply.slots))
            self._say(Commit(self._op(), self._slab_id, rows))

    def _op(self) -> OpId:
        return OpId(next(self._ops))

    def _say(self, message: Hello | Lookup | Unpin | Reserve | Commit) -> list[LocalAnswer]:
        self._answers = []
        self._do(self.core.on_message(SESSION_ID, message, self._cluster.now_ms))
        return self._answers

    def _do(self, commands: list[NodeCommand]) -> None:
        """What comes of it is done before the next command: nothing takes time."""
        for command in commands:
            match command:
                case WriteHeader():
                    self.headers[command.slot] = command
                case Send():
                    self._answers.append(command.message)
                case PostRead():
                    self._cluster.later.append((self, command))
                case CallDirectory():
                    self._cluster.later.append((self, command))
                case TakeEpoch():
                    self._do(self.core.on_linked(self._info, self._cluster.now_ms))
                case _:
                    pass  # links, watches and the log need nobody here
        self._cluster.settle()

    def end(self, command: PostRead | CallDirectory) -> None:
        """A call or a read has ended."""
        cluster, core = self._cluster, self.core
        if isinstance(command, CallDirectory):
            reply = cluster.ask(command.message)
            self._do(core.on_directory_reply(command.call_id, reply, cluster.now_ms))
        elif command.kind is ReadKind.PAYLOAD:
            self._do(core.on_read_done(command.read_id, ok=True, now_ms=cluster.now_ms))
        else:
            rows = cluster.nodes[command.node_id].header_rows(command.remote_offsets.tolist())
            self._do(core.on_headers(command.read_id, rows, cluster.now_ms))

    def header_rows(self, offsets: list[int]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        rows = np.zeros(len(offsets), SLOT_HEADER_DTYPE)
        for row, offset in zip(rows, offsets, strict=True):
            header = self.headers[(offset - self._slot_table_offset) // HEADER_BYTES]
            if header is not None:
                row["generation"], row["offset"] = header.generation, header.offset
                row["bytes"], row["state"] = header.bytes, header.state
                row["key"], row["maker"] = np.void(header.key), header.maker
        return rows


class ReplayCluster:
    """Nodes that have joined. Without peers they are silos, each with its engine."""

    def __init__(self, settings: Settings) -> None:
        self.now_ms = 0
        self.later: list[tuple[Node, PostRead | CallDirectory]] = []
        self._is_settling = False
        self._directory = DirectoryCore(Term(1))
        names = [f"node-{number}" for number in range(settings.node_count)]
        self.nodes = {NodeId(name): Node(self, name, settings) for name in names}
        self._order = list(self.nodes.values())
        for node in self._order:
            node.start()
        if settings.peers:
            self.pass_ms(JOIN_MS)

    def serve(self, node: int, keys: Sequence[BlockKey]) -> Served:
        """A request at this node."""
        return self._order[node].serve(keys)

    def pass_ms(self, duration_ms: int) -> None:
        """Let time pass, from one deadline of a node or of the directory to the next."""
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            due = [at for node in self._order if (at := node.core.next_deadline_ms()) is not None]
            next_tick_ms = (self.now_ms // TICK_MS + 1) * TICK_MS
            self.now_ms = max(self.now_ms, min([end_ms, next_tick_ms, *due]))
            if self.now_ms % TICK_MS == 0:
                self._directory.on_tick(self.now_ms)
            for node in self._order:
                node.tick()

    def settle(self) -> None:
        """End the calls and reads that are under way, and those that come of it."""
        if self._is_settling:
            return
        self._is_settling = True
        while self.later:
            node, command = self.later.pop(0)
            node.end(command)
        self._is_settling = False

    def ask(
        self, message: NodeHello | Announce | Locate
    ) -> NodeHelloReply | AnnounceReply | LocateReply:
        if isinstance(message, NodeHello):
            return self._directory.on_hello(message, self.now_ms)
        if isinstance(message, Announce):
            return self._directory.on_announce(message, self.now_ms)
        return self._directory.on_locate(message, self.now_ms)


def key_of(number: int) -> BlockKey:
    """Spread over 16 bytes, as a digest is."""
    return BlockKey((number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128).to_bytes(KEY_BYTES))


def _geometry(capacity_blocks: int) -> Geometry:
    """Of a slab with exactly so many slots of BLOCK_BYTES."""
    assert capacity_blocks % EXTENT_BLOCKS == 0
    extent_count = capacity_blocks // EXTENT_BLOCKS
    one = Geometry(1 << 22, MIN_EXTENT_BYTES)
    slab_bytes = one.smallest_slab_bytes + (extent_count - 1) * (
        MIN_EXTENT_BYTES + (one.slots_per_extent + 1) * HEADER_BYTES
    )
    geometry = Geometry(slab_bytes, MIN_EXTENT_BYTES)
    assert geometry.slot_count == capacity_blocks
    return geometry
