"""Slabs of tests: real files in /dev/shm, under a cluster's name that nobody else uses.

`python -m tests.slabs COMMAND JSON` is an owner in a process of its own, for what only a second
process can show: `hold` opens the slab and waits for its standard input to end, `write` fills and
rewrites blocks as fast as it can, `map` maps one as an engine does, `refused` tries to open one
without any privilege, `fork` is `hold` with a child that outlives it. Each prints a line for every
step.
"""

import ctypes
import json
import os
import resource
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvray.core.effects import Place
from kvray.core.ids import BlockKey, ClientId, NodeId, OpId, Origin, SlabId, SlotState
from kvray.core.layout import SLOT_ALIGN_BYTES, SLOT_HEADER_DTYPE, Geometry
from kvray.core.store import Holder, StoreCore
from kvray.errors import KVRayError
from kvray.node.mapped import MappedSlab
from kvray.node.slab import SlabOwner
from kvray.node.slab_file import SHM_DIRECTORY

NODE = NodeId("0123456789abcdef" + "0" * 40)
OTHER_NODE = NodeId("fedcba9876543210" + "0" * 40)
GEOMETRY = Geometry(slab_bytes=2 * 1024**2, extent_bytes=256 * 1024)
BLOCK_BYTES = 16 * 1024
PAYLOAD_STEPS = 64  # of one write, so that a kill comes in the middle of one
ROOT = Path(__file__).parent.parent


class Host:
    """One machine's /dev/shm and runtime folder, as far as one test sees them."""

    def __init__(self, runtime: Path) -> None:
        self.cluster = f"test-{os.getpid()}-{secrets.token_hex(4)}"
        self.runtime = runtime
        self._open: list[SlabOwner] = []

    def open(self, node: NodeId = NODE, geometry: Geometry = GEOMETRY, **options: Any) -> SlabOwner:
        slab = SlabOwner.open(
            self.cluster,
            node,
            geometry,
            **{"lock_mode": "off", "runtime": self.runtime, **options},
        )
        self._open.append(slab)
        return slab

    def files(self) -> list[str]:
        """Node names of the slabs that are there."""
        prefix = f"kvray-{self.cluster}-"
        return sorted(
            path.name.removeprefix(prefix).removesuffix(".slab")
            for path in SHM_DIRECTORY.glob(f"{prefix}*.slab")
        )

    @contextmanager
    def process(self, command: str, **options: Any) -> Iterator["subprocess.Popen[str]"]:
        """Killed at the end, if it is still there."""
        words = {"cluster": self.cluster, "runtime": str(self.runtime), **options}
        with subprocess.Popen(
            [sys.executable, "-m", "tests.slabs", command, json.dumps(words)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        ) as process:
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def close(self) -> None:
        for slab in self._open:
            slab.close(unlink=True)
        for path in SHM_DIRECTORY.glob(f"kvray-{self.cluster}-*.slab"):
            path.unlink()


def map_slab(slab: SlabOwner) -> MappedSlab:
    """As an engine that was handed the descriptor."""
    descriptor = os.dup(slab.fd)
    try:
        return MappedSlab.from_fd(
            descriptor, slab.geometry.slab_bytes, slab.geometry.extent_bytes, slab.slab_id
        )
    finally:
        os.close(descriptor)


def key_of(number: int) -> BlockKey:
    """Ends in zero bytes for some numbers, which S16 columns would lose."""
    return BlockKey(number.to_bytes(8, "little") + bytes(8))


class Writer:
    """A StoreCore on a real slab, the smallest NodeStore and engine in one. A block is filled with
    its generation, so that its bytes prove whose they are."""

    def __init__(self, slab: SlabOwner) -> None:
        self.slab = slab
        self.core = StoreCore(slab.geometry, generation_mark=slab.generation_mark)
        self.core.adopt(slab.extents, slab.headers, now_ms=0)
        self.apply()
        self._ops = 0
        self._holders: dict[Place, Holder] = {}  # of what is being written
        self._client = ClientId(pid=os.getpid(), start_ticks=1, nonce=1)

    def apply(self) -> None:
        self.slab.apply_all(self.core.drain_effects())

    def evict(self, key: BlockKey) -> None:
        assert self.core.evict(key)
        self.apply()

    def reserve(self, key: BlockKey) -> Place:
        self._ops += 1
        holder = (self._client, OpId(self._ops))
        (place,) = self.core.reserve(
            holder, [(key, BLOCK_BYTES)], writer=0, origin=Origin.ORIGINAL, now_ms=self._ops
        )
        assert isinstance(place, Place)
        self._holders[place] = holder
        self.apply()
        return place

    def fill(self, place: Place) -> None:
        step = place.bytes // PAYLOAD_STEPS
        content = place.generation.to_bytes(8, "little") * (step // 8)
        for offset in range(place.offset, place.offset + place.bytes, step):
            self.slab.memory[offset : offset + step] = content

    def commit(self, place: Place) -> None:
        holder = self._holders.pop(place)
        assert self.core.commit(holder, place.slot, place.generation, self._ops)
        self.apply()

    def abandon(self, place: Place) -> None:
        assert self.core.abandon(self._holders.pop(place), place.slot, place.generation)
        self.apply()

    def write(self, key: BlockKey) -> Place:
        place = self.reserve(key)
        self.fill(place)
        self.commit(place)
        return place


def ready_blocks(slab: SlabOwner) -> dict[BlockKey, "np.ndarray[Any, np.dtype[np.uint64]]"]:
    """Key to payload of what the headers call READY, whose words must be the generation."""
    assert slab.headers.dtype == SLOT_HEADER_DTYPE
    found = {}
    for row in slab.headers[slab.headers["state"] == SlotState.READY]:
        begin, end = int(row["offset"]), int(row["offset"] + row["bytes"])
        payload = np.frombuffer(slab.memory[begin:end], dtype=np.uint64).copy()
        assert (payload == row["generation"]).all(), "a READY block with other bytes"
        found[BlockKey(row["key"].tobytes())] = payload
    return found


# ── the other process ────────────────────────────────────────────────────────────────────────────


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _write_for_ever(slab: SlabOwner) -> None:
    """Says what is committed after it is, and what is evicted before it is."""
    writer = Writer(slab)
    keys = [place.key for place in writer.core.entries()]
    number = max((int.from_bytes(key[:8], "little") for key in keys), default=0)
    _say("adopted", len(keys), writer.core.snapshot()["quarantined"])
    for slot, generation in writer.core.quarantined_by(0):
        writer.core.release(slot, generation)
    writer.apply()
    while True:
        number += 1
        room = 3 * slab.geometry.slots_in_extent(BLOCK_BYTES)
        if len(keys) >= room:
            oldest = keys.pop(0)
            _say("evict", oldest.hex())
            writer.evict(oldest)
        writer.write(key_of(number))
        keys.append(key_of(number))
        _say("commit", key_of(number).hex())


def _look_at(mapped: MappedSlab) -> None:
    """Every page, without a copy of it."""
    for offset in range(0, mapped.geometry.slab_bytes, SLOT_ALIGN_BYTES):
        assert ctypes.c_uint64.from_address(mapped.address + offset).value >= 0


def _drop_privileges(memlock_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_bytes, memlock_bytes))
    libc = ctypes.CDLL(None, use_errno=True)
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if libc.capset(version_3, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def main(command: str, words: dict[str, Any]) -> None:
    runtime = Path(words["runtime"])
    if command == "refused":
        _drop_privileges(words["memlock_bytes"])
        try:
            slab = SlabOwner.open(
                words["cluster"], NODE, GEOMETRY, lock_mode=words["lock"], runtime=runtime
            )
        except KVRayError as exc:
            _say(type(exc).__name__, exc)
        else:
            _say("open", slab.is_locked_in_memory)
            slab.close(unlink=True)
        return
    if command == "map":
        descriptor = os.open(words["path"], os.O_RDWR)
        slab_id = SlabId(bytes.fromhex(words["slab_id"]))
        mapped = MappedSlab.from_fd(descriptor, GEOMETRY.slab_bytes, GEOMETRY.extent_bytes, slab_id)
        os.close(descriptor)
        _look_at(mapped)
        _say("mapped")
        sys.stdin.read()
        return
    slab = SlabOwner.open(words["cluster"], NODE, GEOMETRY, lock_mode="off", runtime=runtime)
    if command == "write":
        _write_for_ever(slab)
    if command == "fork" and os.fork() == 0:
        _say("forked")
        sys.stdin.read()
        _say("outlived")
        os._exit(0)
    if command == "hold":
        _say("open")
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
