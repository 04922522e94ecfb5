"""NodeCores with everything around them played by the test: slabs, engines, directory, link, time.

The smallest cluster there can be: calls and reads are carried when the test says so (`settle`), a
slab is a few arrays, and an engine's copy stamps the block with its key, so that whoever says HIT
can be held to it. Everything a core says is done in order, as a shell would, and checked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvray.core.codec import decode, encode, pack_keys, pack_slots, unpack_slots
from kvray.core.commands import (
    NodeCommand,
    ReadKind,
    WriteClient,
)
from kvray.core.directory import DirectoryCore
from kvray.core.effects import MarkGeneration, WriteExtent, WriteHeader
from kvray.core.fetch import FetchLimits
from kvray.core.ids import (
    BlockKey,
    ClientId,
    Generation,
    Maker,
    Namespace,
    NodeId,
    OpId,
    ReadId,
    Role,
    SlabId,
    SlotIndex,
    SlotState,
    Term,
)
from kvray.core.keys import canary_keys
from kvray.core.messages import (
    MAX_CALL_BYTES,
    Abandon,
    Ack,
    Announce,
    AnnounceReply,
    Bye,
    ChunkShape,
    Commit,
    Grant,
    Hello,
    HelloReply,
    Introduce,
    KeyState,
    LocalAnswer,
    LocalRequest,
    Locate,
    LocateReply,
    Lookup,
    LookupReply,
    LookupUpdate,
    NodeHello,
    NodeHelloReply,
    NoiseLevels,
    Refused,
    Report,
    Reserve,
    ReserveReply,
    Unpin,
)
from kvray.core.reasons import MissReason
from tests.shells import BLOCK_BYTES, Shell, Slab, stamp

WALL_CLOCK_OFFSET_MS = 1_000_000
Slot = tuple[SlotIndex, Generation, int]  # slot, generation, offset


class Node(Shell):
    """A NodeCore and its shell."""

    def __init__(
        self,
        cluster: "Cluster",
        name: str,
        slab: Slab,
        *,
        limits: FetchLimits | None = None,
    ) -> None:
        self.cluster = cluster
        super().__init__(
            name,
            slab,
            now_ms=cluster.now_ms,
            wall_clock_offset_ms=WALL_CLOCK_OFFSET_MS,
            limits=limits,
            requires_proof=cluster.requires_proof,
            audit_rate=cluster.audit_rate,
        )
        self.do(self.core.start(cluster.now_ms))

    # -- events ----------------------------------------------------------------------------------

    def hear(self, session_id: int, message: LocalRequest) -> list[LocalAnswer]:
        """What it answers this session at once."""
        before = len(self.sent.get(session_id, []))
        self.do(self.core.on_message(session_id, message, self.cluster.now_ms))
        return self.sent.get(session_id, [])[before:]

    def tick(self) -> None:
        self.do(self.core.on_tick(self.cluster.now_ms))
        due_ms = self.core.next_deadline_ms()
        assert due_ms is None or due_ms > self.cluster.now_ms, "something due was left"

    def answer_call(self, call_id: int) -> None:
        """The directory gets the call, and its answer comes back, both through the codec."""
        call = self.calls.pop(call_id)
        reply = self.cluster.ask(call.message)
        if reply is None:
            self.fail_call_of(call_id)
        else:
            self.do(self.core.on_directory_reply(call_id, reply, self.cluster.now_ms))

    def fail_call_of(self, call_id: int) -> None:
        self.calls.pop(call_id, None)
        self.do(self.core.on_directory_failed(call_id, self.cluster.now_ms))

    def end_read(self, read_id: ReadId, *, ok: bool = True) -> None:
        """A read ends now: bytes or headers are copied out of the peer's slab as it is now."""
        read = self.reads.pop(read_id)
        self.abandoned.discard(read_id)
        peer = self.cluster.nodes.get(read.node_id)
        is_there = peer is not None and peer.core.info.epoch == read.epoch
        if not (ok and is_there and peer is not None):
            self.do(self.core.on_read_done(read_id, ok=False, now_ms=self.cluster.now_ms))
        elif read.kind is ReadKind.PAYLOAD:
            for source, target, piece_bytes in zip(
                read.remote_offsets.tolist(),
                read.local_offsets.tolist(),
                read.bytes.tolist(),
                strict=True,
            ):
                self.slab.memory[target : target + piece_bytes] = peer.slab.memory[
                    source : source + piece_bytes
                ]
            self.do(self.core.on_read_done(read_id, ok=True, now_ms=self.cluster.now_ms))
        else:
            table_offset = peer.slab.geometry.slot_table_offset
            slots = (read.remote_offsets - np.uint64(table_offset)) // np.uint64(64)
            rows = peer.slab.headers[slots].copy()
            self.do(self.core.on_headers(read_id, rows, self.cluster.now_ms))

    def end_comparison(self, comparison_id: int) -> None:
        """The bytes are compared as they are now."""
        done = self.compare(comparison_id)
        self.do(
            self.core.on_compared(
                done.comparison_id, done.verdicts, pieces=done.pieces, now_ms=self.cluster.now_ms
            )
        )

    def process_gone(self, client_id: ClientId) -> None:
        """A process ends, and its pidfd says so; also to a node that starts later."""
        self.cluster.dead.add((client_id.pid, client_id.start_ticks))
        self.do([])

    # -- doing what the core says ----------------------------------------------------------------

    def do(self, commands: Sequence[NodeCommand]) -> None:
        effects_are_over = False
        for command in commands:
            is_effect = isinstance(command, (WriteHeader, WriteExtent, MarkGeneration, WriteClient))
            assert not (is_effect and effects_are_over), "an effect after what relies on it"
            effects_are_over = not is_effect
            self._do(command)
        self.core.check()
        for pid, start_ticks in self.watched & self.cluster.dead:
            self.watched.discard((pid, start_ticks))
            self.do(self.core.on_process_gone(pid, start_ticks, self.cluster.now_ms))

    def open_links(self) -> None:
        while self.linking:
            epoch = self.linking.pop()
            self.do(self.core.on_linked(self._info(epoch), self.cluster.now_ms))


@dataclass
class Cluster:
    """Time, the directory and all nodes."""

    now_ms: int = 0
    directory: DirectoryCore | None = None
    nodes: dict[NodeId, Node] = field(default_factory=dict)
    link_is_up: bool = True
    compares: bool = True  # False: end_comparison by hand
    requires_proof: bool | None = None
    audit_rate: float = 0.0
    dead: set[tuple[int, int]] = field(default_factory=set)  # processes, by pid and start
    terms: int = 1
    next_session: int = 1
    next_pid: int = 100

    @classmethod
    def of(
        cls,
        *names: str,
        slot_count: int = 32,
        limits: FetchLimits | None = None,
        requires_proof: bool | None = None,
        audit_rate: float = 0.0,
    ) -> "Cluster":
        """Nodes that have joined and know each other."""
        cluster = cls(
            directory=DirectoryCore(Term(1)), requires_proof=requires_proof, audit_rate=audit_rate
        )
        for name in names:
            cluster.start(name, Slab(name, slot_count=slot_count), limits=limits)
        cluster.pass_ms(500)
        return cluster

    def __getitem__(self, name: str) -> Node:
        return self.nodes[NodeId(name)]

    def start(self, name: str, slab: Slab, *, limits: FetchLimits | None = None) -> Node:
        node = self.nodes[NodeId(name)] = Node(self, name, slab, limits=limits)
        return node

    def kill(self, name: str) -> Slab:
        """kill -9: only the slab is left. Its engines see their sessions end by themselves."""
        return self.nodes.pop(NodeId(name)).slab

    def restart_directory(self) -> None:
        self.terms += 1
        self.directory = DirectoryCore(Term(self.terms))

    def ask(self, message: object) -> NodeHelloReply | AnnounceReply | LocateReply | None:
        if self.directory is None:
            return None
        reply: NodeHelloReply | AnnounceReply | LocateReply
        if isinstance(message, NodeHello):
            reply = self.directory.on_hello(message, self.now_ms)
        elif isinstance(message, Announce):
            reply = self.directory.on_announce(message, self.now_ms)
        else:
            assert isinstance(message, Locate)
            reply = self.directory.on_locate(message, self.now_ms)
        return decode(
            encode(reply),
            max_bytes=MAX_CALL_BYTES,
            expect=NodeHelloReply | AnnounceReply | LocateReply,
        )

    def settle(self) -> None:
        """Carry calls and reads until nobody says anything more at this moment."""
        while True:
            busy = False
            for node in list(self.nodes.values()):
                node.open_links()
                for call_id in sorted(node.calls):
                    node.answer_call(call_id)
                    busy = True
                for read_id in sorted(node.reads) if self.link_is_up else ():
                    node.end_read(read_id)
                    busy = True
                for comparison_id in sorted(node.comparisons) if self.compares else ():
                    node.end_comparison(comparison_id)
                    busy = True
                node.tick()
                busy = busy or bool(node.calls)
            if not busy:
                return

    def pass_ms(self, duration_ms: int) -> None:
        """Let time pass from one deadline to the next."""
        end_ms = self.now_ms + duration_ms
        while True:
            self.settle()
            due = [at for n in self.nodes.values() if (at := n.core.next_deadline_ms()) is not None]
            self.now_ms = min([end_ms, *due])
            if self.directory is not None:
                self.directory.on_tick(self.now_ms)
            if self.now_ms == end_ms:
                self.settle()
                return


class Engine:
    """An EngineCore with its workers in the same process, unless worker() makes others."""

    def __init__(
        self,
        node: Node,
        *,
        pid: int | None = None,
        model: str = "a model",
        namespace: bytes = b"n" * 16,
        maker: int = 1 << 32 | 1,
        noise: NoiseLevels | None = None,
    ) -> None:
        self.node = node
        self.maker, self.noise = Maker(maker), noise or NoiseLevels()
        self.chunks = [ChunkShape(BLOCK_BYTES, BLOCK_BYTES // 4, "float32")]
        self.model, self.namespace = model, Namespace(namespace)
        cluster = node.cluster
        cluster.next_pid += 1
        pid = cluster.next_pid if pid is None else pid
        self.client_id = ClientId(pid, 1, cluster.next_pid)
        self.session_id = 0
        self.ops = 0
        self.states: dict[OpId, bytearray] = {}
        self.places: dict[OpId, dict[int, Slot]] = {}
        self.coming: dict[OpId, dict[int, Slot]] = {}  # where it was said last that it will be
        self.keys: dict[OpId, list[BlockKey]] = {}
        self.causes: dict[OpId, dict[int, MissReason]] = {}
        self.seen = 0
        self.reserved: dict[BlockKey, Slot] = {}
        self.hello()

    # -- saying ----------------------------------------------------------------------------------

    def hello(
        self,
        writing: Iterable[Slot] = (),
        *,
        node: Node | None = None,
        slab_id: SlabId | None = None,
    ) -> HelloReply | None:
        """Connect, or connect again. None if it was dropped."""
        self.node = node or self.node
        cluster = self.node.cluster
        self.session_id = cluster.next_session
        cluster.next_session += 1
        self.seen = 0
        hello = Hello(
            self._op(),
            self.client_id,
            Role.ENGINE,
            self.client_id.nonce,
            self.namespace,
            "a label",
            slab_id or self.node.slab.slab_id,
            pack_slots((slot, generation, 0) for slot, generation, _ in writing),
            self.model,
            {},
            self.maker,
            self.chunks,
            self.noise,
        )
        answers = self.node.hear(self.session_id, hello)
        if not answers:
            assert self.session_id in self.node.dropped
            return None
        (reply,) = answers
        assert isinstance(reply, HelloReply)
        return reply

    def lookup(
        self,
        *runs: Sequence[BlockKey],
        prefix: bool = True,
        within_ms: int = 1_000,
        fetch: bool = True,
        block_bytes: int = BLOCK_BYTES,
        op: OpId | None = None,
        key_compute_us: int = 0,
        may_audit: bool = True,
    ) -> OpId:
        op = op or self._op()
        self.keys[op] = [k for run in runs for k in run]
        message = Lookup(
            op,
            pack_keys(self.keys[op]),
            [len(run) for run in runs],
            [prefix] * len(runs),
            [block_bytes] * len(runs),
            within_ms,
            fetch,
            key_compute_us,
            may_audit,
        )
        self.say(message)
        return op

    def unpin(self, op: OpId) -> None:
        (answer,) = self.say(Unpin(self._op(), op))
        assert isinstance(answer, Ack)

    def reserve(self, *keys: BlockKey, block_bytes: int = BLOCK_BYTES) -> bytes:
        """The grants. What was granted is in `reserved`."""
        op = self._op()
        reserve = Reserve(op, pack_keys(keys), [len(keys)], [block_bytes])
        (reply,) = [a for a in self.say(reserve) if isinstance(a, ReserveReply)]
        places = iter(unpack_slots(reply.slots))
        for k, grant in zip(keys, reply.grants, strict=True):
            if grant == Grant.GRANTED:
                self.reserved[k] = next(places)
        self.last_reserve = op
        return reply.grants

    def write(self, *keys: BlockKey) -> None:
        for k in keys:
            _, _, offset = self.reserved[k]
            self.node.slab.memory[offset : offset + BLOCK_BYTES] = stamp(k)

    def commit(self, *keys: BlockKey) -> None:
        slots = [self.reserved.pop(k) for k in keys]
        self.say(Commit(self._op(), self.node.slab.slab_id, pack_slots(slots)))

    def abandon(self, *keys: BlockKey) -> None:
        slots = [self.reserved.pop(k) for k in keys]
        self.say(Abandon(self._op(), self.node.slab.slab_id, pack_slots(slots)))

    def store(self, *keys: BlockKey) -> None:
        """A prefill: reserve, copy, commit what was granted."""
        self.reserve(*keys)
        granted = [k for k in keys if k in self.reserved]
        self.write(*granted)
        self.commit(*granted)

    def introduce(self, *, namespace: bytes | None = None, maker: int | None = None) -> None:
        """With what has changed."""
        self.namespace = self.namespace if namespace is None else Namespace(namespace)
        self.maker = self.maker if maker is None else Maker(maker)
        (answer,) = self.say(
            Introduce(self._op(), self.namespace, {}, self.maker, self.chunks, self.noise)
        )
        assert isinstance(answer, Ack)

    def store_canary(self, content: "np.ndarray[Any, np.dtype[np.float32]]") -> None:
        """What this engine computes for its canary: a row of numbers for each of its chunks."""
        keys = canary_keys(self.namespace, self.maker, 0, len(content))
        assert list(self.reserve(*keys)) == [Grant.GRANTED] * len(keys)
        for k, numbers in zip(keys, content, strict=True):
            _, _, offset = self.reserved[k]
            self.node.slab.memory[offset : offset + BLOCK_BYTES] = numbers.tobytes()
        self.commit(*keys)

    def report(self, **counters: int) -> None:
        self.say(Report(self._op(), counters))

    def bye(self) -> None:
        self.say(Bye(self._op()))

    def lose_session(self) -> None:
        self.node.do(self.node.core.on_session_closed(self.session_id, self.node.cluster.now_ms))

    def die(self) -> None:
        self.node.process_gone(self.client_id)

    def say(self, message: LocalRequest) -> list[LocalAnswer]:
        answers = self.node.hear(self.session_id, message)
        self.listen()
        return answers

    def _op(self) -> OpId:
        self.ops += 1
        return OpId(self.ops)

    # -- hearing ---------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take in what has come, as the client does, and hold every HIT to its bytes."""
        answers = self.node.sent.get(self.session_id, [])
        for answer in answers[self.seen :]:
            if isinstance(answer, LookupReply):
                states = bytearray(answer.states)
                self.states[answer.op] = states
                self.causes[answer.op] = dict(answer.causes)
                self._take(answer.op, range(len(states)), answer.states, answer.slots)
            elif isinstance(answer, LookupUpdate) and answer.op in self.states:
                states = self.states[answer.op]
                for i, state in zip(answer.indices, answer.states, strict=True):
                    assert states[i] in (KeyState.WAIT, KeyState.COMING), "settled twice"
                    states[i] = state
                self.causes[answer.op] |= answer.causes
                self._take(answer.op, answer.indices, answer.states, answer.slots)
        self.seen = len(answers)

    def _take(self, op: OpId, indices: Iterable[int], states: bytes, slots: bytes) -> None:
        rows = iter(unpack_slots(slots))
        for i, state in zip(indices, states, strict=True):
            if state == KeyState.HIT:
                self.places.setdefault(op, {})[i] = row = next(rows)
                self.assert_holds(self.keys[op][i], row)
            elif state == KeyState.COMING:
                self.coming.setdefault(op, {})[i] = next(rows)
        assert not list(rows), "places of nothing"

    def assert_holds(self, block: BlockKey, row: Slot) -> None:
        slot, generation, offset = row
        header = self.node.slab.headers[slot]
        assert header["state"] == SlotState.READY
        assert header["generation"] == generation
        assert header["offset"] == offset
        assert header["key"].tobytes() == block
        assert self.node.slab.block(offset) == stamp(block), "a HIT with other bytes"

    def answer(self, op: OpId) -> str:
        """The states of a lookup, a letter each."""
        self.listen()
        return "".join("mhwc"[state] for state in self.states[op])

    def cause(self, op: OpId) -> MissReason:
        """Of its first miss, as an engine counts it."""
        self.listen()
        causes = self.causes[op]
        assert causes, "no miss"
        first = min(causes)
        assert first == self.states[op].index(KeyState.MISS), "the first miss has no cause"
        return causes[first]

    def refusals(self) -> list[str]:
        answers = self.node.sent.get(self.session_id, [])
        return [answer.reason for answer in answers if isinstance(answer, Refused)]


def worker_of(engine: Engine) -> ClientId:
    """A worker in a process of its own, that has said hello and mapped the slab."""
    cluster = engine.node.cluster
    cluster.next_pid += 1
    client_id = ClientId(cluster.next_pid, 1, cluster.next_pid)
    session_id = cluster.next_session
    cluster.next_session += 1
    hello = Hello(
        OpId(1),
        client_id,
        Role.WORKER,
        engine.client_id.nonce,
        Namespace(b""),
        "rank 0",
        SlabId(b""),
    )
    (reply,) = engine.node.hear(session_id, hello)
    assert isinstance(reply, HelloReply)
    return client_id
