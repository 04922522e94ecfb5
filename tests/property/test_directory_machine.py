"""Goal: whatever is lost, repeated, late or out of order, the directory names no place of an epoch
that is over and none that never was; and once messages arrive again, it knows exactly what the
nodes have.

Method: a hypothesis machine of three nodes, each with its true set, and a network that hands the
directory any message that was ever sent, in any order, and loses answers. `Process` keeps to the
protocol as a NodeStore does. At the end everything heals, and the directory must be equal to the
union of the sets: no phantom, none missing.
"""

from collections import Counter
from dataclasses import dataclass, field

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvray.core.codec import decode, encode, pack_entries, pack_keys, unpack_locations
from kvray.core.directory import DirectoryCore, DirectoryLimits, NodeState
from kvray.core.ids import (
    BlockKey,
    Epoch,
    Generation,
    Maker,
    NodeId,
    Origin,
    SlabId,
    SlotIndex,
    Term,
)
from kvray.core.messages import (
    MAX_CALL_BYTES,
    Announce,
    AnnounceReply,
    AnnounceStatus,
    ControlMessage,
    Locate,
    NodeHello,
    NodeInfo,
)

NODES = 3


def maker_of(slot: int) -> Maker:
    """A few, the unknown one among them."""
    return Maker(slot % 4 << 62)


KEYS = [BlockKey(bytes([i]) * 16) for i in range(12)]
ROOMY, TIGHT = 10_000, 15  # TIGHT: less than all sets together, and room for few while resyncing
nodes = st.integers(0, NODES - 1)
Place = tuple[int, int]  # slot, generation


@dataclass
class Sent:
    """An announce under way, or one that was: the network may hand it over again."""

    process: "Process"
    announce: Announce


@dataclass
class Process:
    """One NodeStore from its start to its end: its set, and what it has to say about it."""

    info: NodeInfo
    wall_clock_ms: int
    blocks: dict[BlockKey, Place] = field(default_factory=dict)
    history: set[tuple[BlockKey, Place]] = field(default_factory=set)
    adds: set[BlockKey] = field(default_factory=set)
    removes: set[BlockKey] = field(default_factory=set)
    due_part_count: int = 0  # of a resync that has to begin
    parts: list[list[tuple[BlockKey, Place]]] = field(default_factory=list)  # not sent yet
    part: int = 0
    resync_sequence: int = 0  # of part 1: an answer to anything before says nothing new
    sequence: int = 0
    term: Term | None = None  # of the directory that has admitted it
    generation: int = 0
    roster: dict[NodeId, NodeInfo] = field(default_factory=dict)
    roster_version: int = 0

    def store(self, key: BlockKey) -> None:
        self.generation += 1
        self.blocks[key] = (self.generation % 7, self.generation)
        self.history.add((key, self.blocks[key]))
        self.adds.add(key)
        self.removes.discard(key)

    def evict(self, key: BlockKey) -> None:
        if self.blocks.pop(key, None):
            self.adds.discard(key)
            self.removes.add(key)

    def begin_resync(self) -> None:
        """When part 1 is sent, from a copy of the set as it is then; changes go on beside it."""
        rows = sorted(self.blocks.items())
        size = -(-len(rows) // self.due_part_count) or 1
        self.parts = [rows[i * size : (i + 1) * size] for i in range(self.due_part_count)]
        self.due_part_count = self.part = 0
        self.resync_sequence = self.sequence

    def next_announce(self, *, a_part: bool) -> Announce:
        """A part of the set, if one is due and wanted, else the changes."""
        assert self.term is not None
        self.sequence += 1
        rows, removes, part, last = [], b"", 0, False
        if a_part and self.due_part_count:
            self.begin_resync()
        if a_part and self.parts:
            rows = self.parts.pop(0)
            self.part += 1
            part, last = self.part, not self.parts
        else:
            rows = [(key, self.blocks[key]) for key in sorted(self.adds)]
            removes = pack_keys(sorted(self.removes))
            self.adds.clear()
            self.removes.clear()
        return Announce(
            node_id=self.info.node_id,
            epoch=self.info.epoch,
            term=self.term,
            sequence=self.sequence,
            roster_version=self.roster_version,
            adds=pack_entries(
                (key, SlotIndex(slot), 9, Generation(generation), Origin.ORIGINAL, maker_of(slot))
                for key, (slot, generation) in rows
            ),
            removes=removes,
            resync_part=part,
            resync_last=last,
        )

    def on_reply(self, announce: Announce, reply: AnnounceReply, part_count: int) -> None:
        if (announce.epoch, announce.term) != (self.info.epoch, self.term):
            return  # an answer to what was said in a life before
        self.follow(reply)
        if reply.status is AnnounceStatus.RESYNC and announce.sequence >= self.resync_sequence:
            self.due_part_count = part_count
        elif reply.status in (AnnounceStatus.BURIED, AnnounceStatus.UNKNOWN):
            self.term = None

    def follow(self, reply: AnnounceReply) -> None:
        """Replies may overtake each other here: news of another version is no news."""
        news = reply.news
        if news is None or news.since not in (0, self.roster_version):
            return
        if news.since == 0:
            self.roster = {}
        for node_id in news.left:
            self.roster.pop(node_id, None)  # it may have come and gone meanwhile
        self.roster |= {info.node_id: info for info in news.joined}
        self.roster_version = reply.roster_version


def wire(message: ControlMessage) -> ControlMessage:
    return decode(encode(message), max_bytes=MAX_CALL_BYTES, expect=ControlMessage)


class DirectoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0
        self.term = 0
        self.network: list[Sent] = []
        self.living: list[Process | None] = [None] * NODES
        self.histories: dict[tuple[NodeId, Epoch], set[tuple[BlockKey, Place]]] = {}
        self.highest: Counter[NodeId] = Counter()
        self.core: DirectoryCore | None = None

    @initialize(max_entries=st.sampled_from([ROOMY, ROOMY, TIGHT]))
    def begin(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self.new_directory()
        for index in range(NODES):
            self.start(index, keep=False, clock_ms=index)
            self.hello(index)

    @property
    def directory(self) -> DirectoryCore:
        assert self.core is not None
        return self.core

    # -- processes and directory come and go

    @rule()
    def new_directory(self) -> None:
        self.term += 1
        self.highest.clear()
        self.core = DirectoryCore(Term(self.term), DirectoryLimits(max_entries=self.max_entries))

    @rule(index=nodes, keep=st.booleans(), clock_ms=st.integers(0, 50))
    def start(self, index: int, keep: bool, clock_ms: int) -> None:  # noqa: FBT001 - a rule
        """Kill a process, if there is one, and start the next, with or without the old slab."""
        old = self.living[index]
        info = NodeInfo(
            node_id=NodeId(f"n{index}"),
            epoch=Epoch(old.info.epoch + 1 if old and keep else 1),
            link_name="",
            link_metadata=b"",
            slab_id=SlabId(bytes(16)),
            slab_address=self.now_ms + len(self.histories),  # no two processes say the same hello
            slab_bytes=2**24,
            extent_bytes=2**20,
            host="",
            kvray_version="",
            format_version=1,
        )
        process = Process(info, wall_clock_ms=clock_ms)
        if old and keep:
            process.generation = old.generation
            for key in old.blocks:
                process.store(key)
        self.living[index] = process

    @rule(index=nodes)
    def hello(self, index: int) -> None:
        """As often as it takes to be admitted."""
        process = self.living[index]
        assert process is not None
        for _ in range(3):
            hello = NodeHello(
                info=process.info,
                wall_clock_ms=process.wall_clock_ms,
                sequence=process.sequence,
            )
            reply = self.directory.on_hello(hello, self.now_ms)
            wire(reply)
            if reply.accepted_epoch == process.info.epoch:
                break
            process.info = msgspec.structs.replace(process.info, epoch=reply.accepted_epoch)
            process.sequence = process.resync_sequence = 0
        else:
            raise AssertionError("never admitted")
        assert process.info in reply.roster
        process.term = reply.term
        process.roster = {info.node_id: info for info in reply.roster}
        process.roster_version = reply.roster_version
        process.due_part_count, process.parts = 0, []
        name = (process.info.node_id, process.info.epoch)
        self.histories[name] = process.history
        assert process.info.epoch >= self.highest[process.info.node_id]
        self.highest[process.info.node_id] = process.info.epoch

    # -- life

    @rule(index=nodes, key=st.sampled_from(KEYS))
    def store(self, index: int, key: BlockKey) -> None:
        self.alive(index).store(key)

    @rule(index=nodes, key=st.sampled_from(KEYS))
    def evict(self, index: int, key: BlockKey) -> None:
        self.alive(index).evict(key)

    def alive(self, index: int) -> Process:
        process = self.living[index]
        assert process is not None
        return process

    # -- messages

    @rule(index=nodes, a_part=st.booleans())
    def send(self, index: int, a_part: bool) -> None:  # noqa: FBT001 - a rule
        process = self.alive(index)
        if process.term is not None:
            self.network.append(Sent(process, process.next_announce(a_part=a_part)))

    @precondition(lambda self: self.network)
    @rule(data=st.data(), again=st.booleans(), answered=st.booleans(), part_count=st.integers(1, 3))
    def deliver(
        self,
        data: st.DataObject,
        again: bool,  # noqa: FBT001 - a rule
        answered: bool,  # noqa: FBT001 - a rule
        part_count: int,
    ) -> None:
        """Any message, old ones of processes that are gone included. again: it stays there."""
        index = data.draw(st.integers(0, len(self.network) - 1))
        message = self.network[index] if again else self.network.pop(index)
        self.hand_over(message, answered=answered, part_count=part_count)

    @rule(index=nodes, a_part=st.booleans(), part_count=st.integers(1, 3))
    def send_and_deliver(self, index: int, a_part: bool, part_count: int) -> None:  # noqa: FBT001
        process = self.alive(index)
        if process.term is not None:
            message = Sent(process, process.next_announce(a_part=a_part))
            self.hand_over(message, answered=True, part_count=part_count)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    def hand_over(self, message: Sent, *, answered: bool, part_count: int) -> None:
        announce = wire(message.announce)
        assert isinstance(announce, Announce)
        reply = wire(self.directory.on_announce(announce, self.now_ms))
        assert isinstance(reply, AnnounceReply)
        if answered and message.process in self.living:
            message.process.on_reply(announce, reply, part_count)

    # -- time

    @rule(duration_ms=st.sampled_from([100, 250, 400]))
    def tick(self, duration_ms: int) -> None:
        self.now_ms += duration_ms
        self.directory.on_tick(self.now_ms)

    @rule(index=nodes, lag=st.integers(0, 1))
    def death_notice(self, index: int, lag: int) -> None:
        """lag: of an epoch before, which must not hurt anybody."""
        info = self.alive(index).info
        state = self.directory.state_of(info.node_id)
        self.directory.on_node_dead(info.node_id, Epoch(info.epoch - lag))
        if lag and self.highest[info.node_id] == info.epoch:
            assert self.directory.state_of(info.node_id) is state

    # -- what must hold always

    @invariant()
    def nothing_is_located_that_never_was_or_is_over(self) -> None:
        if self.core is None:
            return
        self.directory.check()
        roster = {info.node_id: info.epoch for info in self.directory.roster()}
        for node_id, epoch in roster.items():
            assert epoch == self.highest[node_id], "an epoch that is over"
        for key, locations in zip(KEYS, self.directory.where(KEYS), strict=True):
            for found in locations:
                assert roster[found.node_id] == found.epoch
                history = self.histories[found.node_id, found.epoch]
                assert (key, (found.slot, found.generation)) in history, "a place that never was"
        assert self.directory.snapshot()["catalogue"]["rows"] <= self.max_entries

    @invariant()
    def who_knows_a_version_of_the_roster_knows_that_roster(self) -> None:
        if self.core is None:
            return
        snapshot = self.directory.snapshot()
        roster = {info.node_id: info for info in self.directory.roster()}
        for process in self.living:
            if (
                process is not None
                and process.term == self.term
                and process.roster_version == snapshot["roster_version"]
            ):
                assert process.roster == roster

    @rule(index=nodes)
    def locate(self, index: int) -> None:
        info = self.alive(index).info
        asked = Locate(info.node_id, info.epoch, pack_keys(KEYS))
        reply = self.directory.on_locate(asked, self.now_ms)
        wire(reply)
        located = [
            (KEYS[row[0]], reply.nodes[row[1]], reply.epochs[row[1]], row[2], row[4], row[5])
            for row in unpack_locations(reply.locations)
        ]
        assert located == [
            (key, found.node_id, found.epoch, found.slot, found.generation, maker_of(found.slot))
            for key, locations in zip(KEYS, self.directory.where(KEYS), strict=True)
            for found in locations
            if found.node_id != info.node_id
        ]
        suspects = [
            self.directory.state_of(node_id) is NodeState.SUSPECT for _, node_id, *_ in located
        ]
        for one, other in zip(range(len(located)), range(1, len(located)), strict=False):
            if located[one][0] == located[other][0]:
                assert suspects[one] <= suspects[other], "a suspect is not the last"

    # -- healing

    def teardown(self) -> None:
        if self.core is None:
            return
        self.network.clear()
        # Under TIGHT both the old and the new set of a node must fit while it is replaced.
        if self.max_entries == TIGHT:
            for index in range(NODES):
                process = self.alive(index)
                for key in list(process.blocks)[TIGHT // (2 * NODES) :]:
                    process.evict(key)
        for _ in range(20):
            self.now_ms += 100
            for index in range(NODES):
                if self.alive(index).term is None:
                    self.hello(index)
                self.send_and_deliver(index, a_part=True, part_count=2)
            self.directory.on_tick(self.now_ms)
            self.nothing_is_located_that_never_was_or_is_over()
        union = {
            (key, process.info.node_id, process.info.epoch, place)
            for process in map(self.alive, range(NODES))
            for key, place in process.blocks.items()
        }
        known = [
            (key, found.node_id, found.epoch, (found.slot, found.generation))
            for key, locations in zip(KEYS, self.directory.where(KEYS), strict=True)
            for found in locations
        ]
        assert len(known) == len(set(known))
        assert set(known) == union, "a phantom, or one is missing"
        snapshot = self.directory.snapshot()
        assert snapshot["entries"] == len(union)
        assert snapshot["catalogue"]["rows"] == len(union), "something is never swept"
        assert {node["mirror"] for node in snapshot["nodes"].values()} == {"in step"}


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
