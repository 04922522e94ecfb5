"""Two processes for transfer.py: one owns a slab full of READY blocks, the other reads them.

    owner    a file in /dev/shm with real slot headers; a LinkThread that is kept awake, as the
             NodeStore of a peer keeps it while it reads
    reader   three ways to the same bytes, between the same slots:
             fetch    FetchCore and LinkThread: payload, then the slots' headers in a second read,
                      each block proven by its header
             raw      a NIXL agent of its own, lists prepared once for all slots, one transfer
             memcpy   inside this process

What is left out of a fetch is the directory's answer and the slab's bookkeeping: benchmarks/ttft.py
measures the whole way. Every word of the owner's payload follows from its place, so whoever reads
can tell what should be there.
"""

import mmap
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.transfer_stages import TimedLink, stages_of
from kvray.core.commands import (
    Arrived,
    AskDirectory,
    Coming,
    CommitTargets,
    FetchCommand,
    PostRead,
    ReserveTargets,
)
from kvray.core.effects import Place
from kvray.core.fetch import FetchCore, Source
from kvray.core.ids import (
    UNKNOWN_MAKER,
    BlockKey,
    ClientId,
    Epoch,
    Generation,
    OpId,
    Origin,
    SlotIndex,
    SlotState,
)
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE, Geometry
from kvray.core.messages import NodeInfo
from kvray.link.nixl import NixlLink
from kvray.link.nixl_package import load_nixl
from kvray.node.pace import QUICKEST_US
from kvray.node.peers import Ending, LinkEvent, ReadEnded
from kvray.node.serving import WAKE_PERIOD_MS
from tests.link_node import EVENT_LIMIT_S, LinkNode

PAGE_WORDS = 512
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: no two words of a slab are equal

Words = npt.NDArray[np.uint64]


class Slab:
    """A slab file without a NodeStore. Its name goes at once."""

    def __init__(self, geometry: Geometry) -> None:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.posix_fallocate(file.fileno(), 0, geometry.slab_bytes)
            mapping = mmap.mmap(file.fileno(), geometry.slab_bytes)
        self.geometry = geometry
        self.words: Words = np.frombuffer(mapping, np.uint64)
        self.bytes = self.words.view(np.uint8)
        self.address = int(self.words.ctypes.data)

    def fill(self) -> None:
        np.multiply(np.arange(len(self.words), dtype=np.uint64), SPREAD, out=self.words)

    def write_headers(self, slot_bytes: int) -> None:
        """Cut all of it into slots of this size, each with a READY block named after its slot."""
        geometry = self.geometry
        table = self.bytes[geometry.slot_table_offset :][: geometry.slot_count * HEADER_BYTES]
        headers = table.view(SLOT_HEADER_DTYPE)
        headers["state"] = SlotState.ABSENT
        headers["maker"] = UNKNOWN_MAKER
        for slot in slots_of(geometry, slot_bytes).tolist():
            header = headers[slot]
            header["generation"] = slot + 1
            header["key"] = np.void(_key(slot))
            header["offset"] = geometry.slot_offset(SlotIndex(slot), slot_bytes)
            header["bytes"] = slot_bytes
            header["state"] = SlotState.READY

    def at(self, place: Place) -> Words:
        return self.words[place.offset // 8 : (place.offset + place.bytes) // 8]


def slots_of(geometry: Geometry, slot_bytes: int) -> npt.NDArray[np.int64]:
    """All slots that there are when every extent is cut into slots of this size."""
    extents = np.arange(geometry.extent_count) * geometry.slots_per_extent
    return (extents[:, None] + np.arange(geometry.slots_in_extent(slot_bytes))).ravel()


def _key(slot: int) -> BlockKey:
    return BlockKey(slot.to_bytes(16, "little"))


def _node(slab: Slab, role: str, make_link: Callable[[str], NixlLink] | None = None) -> LinkNode:
    return LinkNode(
        f"{role}-{os.getpid()}",
        slab_address=slab.address,
        geometry=slab.geometry,
        make_link=make_link,
    )


def own(pipe: Connection, geometry: Geometry) -> None:
    """The owner: says who it is, then cuts its slab for each size it hears, until the pipe ends."""
    slab = Slab(geometry)
    slab.fill()
    node = _node(slab, "owner")
    pipe.send(node.info)
    while True:
        while not pipe.poll(WAKE_PERIOD_MS / 1_000):
            node.thread.wake()
        try:
            slab.write_headers(pipe.recv())
        except EOFError:
            break
        pipe.send(None)
    node.thread.close()


class Reader:
    """The reader. cut() before the first draw() of a size."""

    def __init__(self, owner: Connection, geometry: Geometry, *, seed: int) -> None:
        self._owner = owner
        self._slab = Slab(geometry)
        self._slab.words[::PAGE_WORDS] = 0  # the pages of this process, too
        self._random = np.random.default_rng(seed)
        self._node = _node(self._slab, "reader", self._make_link)
        assert owner.poll(EVENT_LIMIT_S), "the owner does not start"
        self._peer: NodeInfo = owner.recv()
        self._core = FetchCore()
        self.plan_s = 0.0  # of the last fetch
        self.stages: dict[str, float] | None = None  # of the last fetch, if it was one read
        self._core.on_roster({self._peer.node_id: self._peer}, now_ms=0)
        self._node.connect(self._peer)
        self._raw = Raw(self._slab, self._peer)
        self._op = 0

    def _make_link(self, name: str) -> TimedLink:
        self._link = TimedLink(name)
        return self._link

    def cut(self, slot_bytes: int) -> None:
        self._owner.send(slot_bytes)
        assert self._owner.poll(EVENT_LIMIT_S)
        self._owner.recv()
        self._slot_bytes = slot_bytes
        self._slots = slots_of(self._slab.geometry, slot_bytes)
        self._raw.prepare(self._slots, slot_bytes)

    def draw(self, count: int) -> None:
        """Which slots to read, and into which. What was in those is wiped, a word a page."""
        geometry, size = self._slab.geometry, self._slot_bytes
        self._from = self._random.choice(len(self._slots), count, replace=False)
        self._to = self._random.choice(len(self._slots), count, replace=False)
        self._sources = [
            Source(self._peer.node_id, Epoch(1), SlotIndex(slot), Generation(slot + 1), size)
            for slot in self._slots[self._from].tolist()
        ]
        self._targets: dict[BlockKey, Place] = {}
        for source, slot in zip(self._sources, self._slots[self._to].tolist(), strict=True):
            offset = geometry.slot_offset(SlotIndex(slot), size)
            key = _key(source.slot)
            place = Place(SlotIndex(slot), Generation(1), offset, size, key, Origin.COPY)
            self._targets[key] = place

    def wipe(self) -> None:
        for place in self._targets.values():
            self._slab.at(place)[::PAGE_WORDS] = 0

    def assert_arrived(self, *, every_word: bool) -> None:
        """The targets hold what the owner has written: a word a page, or all of them."""
        step = 1 if every_word else PAGE_WORDS
        for source, place in zip(self._sources, self._targets.values(), strict=True):
            begin = self._slab.geometry.slot_offset(source.slot, source.bytes) // 8
            words = np.arange(begin, begin + source.bytes // 8, step, dtype=np.uint64)
            assert np.array_equal(self._slab.at(place)[::step], words * SPREAD), place

    # -- the three ways --------------------------------------------------------------------------

    def fetch(self) -> float:
        """Seconds from the first read's being posted to the proof of the last block. What has been
        decided before (wish, sources, plan, reservation) took plan_s.
        """
        core, events, mark = self._core, self._node.events, self._link.mark
        self._link.marks.clear()
        self._op += 1
        waiter = (ClientId(1, 1, 1), OpId(self._op))
        wants = [(key, place.bytes) for key, place in self._targets.items()]
        located = dict(zip(self._targets, self._sources, strict=True))
        posted = 0.0
        begun = time.perf_counter()
        missing = len(wants)
        commands = deque[FetchCommand](core.want(waiter, wants, deadline_ms=_now_ms() + 30_000))
        while missing:
            if not commands:
                commands.extend(core.advance(_now_ms()))
            if not commands:
                end = events.get(timeout=EVENT_LIMIT_S)
                mark("got")
                commands.extend(self._on_end(end))
                mark("proven")
                continue
            command = commands.popleft()
            match command:
                case PostRead():
                    mark("posted")
                    posted = posted or time.perf_counter()
                    self._node.thread.submit(command)
                case AskDirectory(locate_id, keys):
                    found = [(located[key],) for key in keys]
                    commands.extend(core.on_located(locate_id, found, now_ms=_now_ms()))
                case ReserveTargets(batch_id, wanted):
                    targets = [self._targets[key] for key, _ in wanted]
                    commands.extend(core.on_reserved(batch_id, targets))
                case Arrived(_, keys):
                    missing -= len(keys)
                case CommitTargets() | Coming():
                    pass
                case _:
                    raise AssertionError(f"a read that did not succeed: {command}")
        taken_s = time.perf_counter() - posted
        self.plan_s = posted - begun
        self.stages = stages_of(self._link.marks)
        return taken_s

    def _on_end(self, end: LinkEvent) -> Sequence[FetchCommand]:
        assert isinstance(end, ReadEnded), end
        assert end.ending is Ending.DONE, end.reason
        if len(end.headers):
            return self._core.on_headers(end.read_id, end.headers, now_ms=_now_ms())
        return self._core.on_read_done(end.read_id, ok=True, now_ms=_now_ms())

    def read_raw(self) -> float:
        """Seconds of one transfer between the same slots, without any header."""
        return self._raw.read(self._to.tolist(), self._from.tolist())

    def copy(self) -> float:
        """Seconds of a memcpy of as many slots inside this slab."""
        size, at = self._slot_bytes, self._slab.geometry.slot_offset
        places = [
            (at(SlotIndex(source), size), place.offset)
            for source, place in zip(
                self._slots[self._from].tolist(), self._targets.values(), strict=True
            )
        ]
        data = self._slab.bytes
        begun = time.perf_counter()
        for source, target in places:
            data[target : target + size] = data[source : source + size]
        return time.perf_counter() - begun

    def ways(self) -> dict[str, Callable[[], float]]:
        return {"fetch": self.fetch, "nixl": self.read_raw, "memcpy": self.copy}

    def close(self) -> None:
        self._raw.close()
        assert self._node.thread.close() == 0


class Raw:
    """NIXL without kvray: an agent on the same memory, connected to the same owner."""

    def __init__(self, slab: Slab, peer: NodeInfo) -> None:
        nixl = load_nixl()
        self._slab = slab
        self._peer = peer
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent: Any = nixl.nixl_agent(f"raw-{os.getpid()}", config)
        region = [(slab.address, slab.geometry.slab_bytes, 0, "")]
        self._region = self._agent.register_memory(region, "DRAM")
        self._agent.add_remote_agent(peer.link_metadata)
        self._lists: tuple[Any, ...] = ()

    def prepare(self, slots: npt.NDArray[np.int64], slot_bytes: int) -> None:
        """Both sides' lists, once for all reads of this slot size."""
        for handle in self._lists:
            self._agent.release_dlist_handle(handle)
        geometry = self._slab.geometry
        offsets = np.array(
            [geometry.slot_offset(SlotIndex(slot), slot_bytes) for slot in slots.tolist()],
            np.uint64,
        )
        sizes, device = np.full_like(offsets, slot_bytes), np.zeros_like(offsets)
        self._lists = tuple(
            self._agent.prep_xfer_dlist(
                name, np.column_stack((np.uint64(address) + offsets, sizes, device)), "DRAM"
            )
            for name, address in (
                ("NIXL_INIT_AGENT", self._slab.address),
                (self._peer.link_name, self._peer.slab_address),
            )
        )

    def read(self, local: list[int], remote: list[int]) -> float:
        """Seconds; polled for as kvray's link thread does it."""
        ours, theirs = self._lists
        agent = self._agent
        begun = time.perf_counter()
        handle = agent.make_prepped_xfer("READ", ours, local, theirs, remote)
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(QUICKEST_US / 1e6)
            state = agent.check_xfer_state(handle)
        taken_s = time.perf_counter() - begun
        assert state == "DONE", state
        agent.release_xfer_handle(handle)
        return taken_s

    def close(self) -> None:
        for handle in self._lists:
            self._agent.release_dlist_handle(handle)
        self._agent.remove_remote_agent(self._peer.link_name)
        self._agent.deregister_memory(self._region)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
