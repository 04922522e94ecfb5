"""The owner's side of a slab: made or adopted, written header by header, given back.

    open ─┬─ a slab of this node, boot, format and geometry is there ──▶ adopted: nothing is lost
          ├─ one of a node that is gone is there, as good ────────────▶ adopted under our name
          └─ otherwise: a new file; the old one is unlinked, never cut anew in place

A slab outlives its NodeStore on purpose: after kill -9 the next one maps the same file and finds
in it, written before any answer left: the headers, the extents, the clients, the generation mark
and the epoch. What of that is to be believed is core.store's decision, not this file's.

The order of stores in a header is a promise to readers on other hosts, who see it by one-sided
reads and by nothing else:

    to READY        everything, then the state
    to any other    the state, then everything else (and the payload only after that)

x86-64 makes the stores of one thread visible in program order (TSO), to DMA too, and CPython does
not reorder its own calls. Elsewhere there is a memory_barrier() between the two halves. No field is
torn in a way that matters: the state lies in one aligned word.

Everything here is called on the NodeStore's own thread.
"""

import ctypes
import logging
import os
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from struct import Struct

import numpy as np
import numpy.typing as npt

from kvray.config import LOCK_MODES, LockMode
from kvray.core.effects import Effect, MarkGeneration, WriteExtent, WriteHeader
from kvray.core.header_page import (
    HEADER_PAGE_DTYPE,
    ClientRow,
    read_number,
    rows_in_use,
    write_client,
    write_number,
)
from kvray.core.ids import ClientId, Epoch, NodeId, Role, SlabId, SlotState
from kvray.core.layout import (
    EXTENT_DTYPE,
    HEADER_BYTES,
    MAGIC,
    MAX_CLIENTS,
    PAGE_BYTES,
    SLOT_HEADER_DTYPE,
    Geometry,
)
from kvray.errors import ConfigError, SlabBusyError, SlabError
from kvray.node.mapped import memory_barrier
from kvray.node.memory import (
    RAY_MEMORY_USAGE_THRESHOLD,
    Progress,
    lock_pages,
    lock_refusal,
)
from kvray.node.process import boot_id, start_ticks
from kvray.node.slab_file import (
    SHM_DIRECTORY,
    SlabLock,
    SlabPaths,
    owner_of,
    remove_slab,
    runtime_directory,
    slab_paths,
    sweep,
)
from kvray.node.slab_opening import Opening, SlabFile

logger = logging.getLogger("kvray.node")

_TWO_WORDS = Struct("<QQ")
_WORDS = HEADER_BYTES // 8
_READY = int(SlotState.READY)

assert sys.byteorder == "little", "slabs are little-endian, see core.layout"


class SlabOwner:
    """The one process that works on a slab. Made by open(), ended by close()."""

    def __init__(self, *, file: SlabFile, paths: SlabPaths, lock: SlabLock, locked: bool) -> None:
        self.paths = paths
        self.geometry = file.geometry
        self.fd = file.descriptor
        self.adopted = file.adopted
        self.reason = file.reason  # of the adoption, or of there being none: for logs and status
        self.is_locked_in_memory = locked
        self.previous_owner = file.previous_owner  # (pid, start ticks); it is gone for certain
        self._lock: SlabLock | None = lock
        self._mapping = file.mapping
        self._map(file.geometry)
        self.slab_id = SlabId(self._page["slab_id"][0].tobytes())
        # From here on our own: engines map this page too.
        self._epoch = self._number("epoch")
        self._mark = self._number("generation_mark")

    def _number(self, name: str) -> int:
        found = read_number(self._page, name)
        assert found is not None, f"{name} of a page that was looked at"
        return found

    def _map(self, geometry: Geometry) -> None:
        whole = np.frombuffer(self._mapping, dtype=np.uint8)
        self.address: int = whole.ctypes.data
        self._page = whole[:PAGE_BYTES].view(HEADER_PAGE_DTYPE)
        extents = whole[geometry.extent_table_offset :][: geometry.extent_count * HEADER_BYTES]
        self._extents = extents.view(EXTENT_DTYPE)
        begin, end = geometry.slot_table_offset, geometry.payload_offset
        self._headers = whole[begin:end].view(SLOT_HEADER_DTYPE)[: geometry.slot_count]
        self.memory = memoryview(self._mapping)  # the whole file; payload at the offsets of places
        self._words = self.memory[begin:end].cast("Q")

    @classmethod
    def open(
        cls,
        cluster: str,
        node_id: NodeId,
        geometry: Geometry,
        *,
        lock_mode: LockMode = "auto",
        live_node_ids: Collection[NodeId] | None = None,
        memory_usage_threshold: float = RAY_MEMORY_USAGE_THRESHOLD,
        on_progress: Progress | None = None,
        runtime: Path | None = None,
        shm: Path = SHM_DIRECTORY,
    ) -> "SlabOwner":
        """Adopt the slab of this node, or make one. Blocks for about 0.5 s/GiB of a new slab.

        live_node_ids: if given, slabs of other nodes of the cluster on this host are adopted or
        removed. Raises ConfigError before anything is allocated if the slab does not fit,
        SlabBusyError if another process works on it, SlabError for what the host refuses.
        """
        assert lock_mode in LOCK_MODES, lock_mode
        runtime = runtime_directory(runtime)
        paths = slab_paths(cluster, node_id, runtime=runtime, shm=shm)
        if lock_mode == "required" and (refusal := lock_refusal(geometry.slab_bytes)):
            raise ConfigError(f"lock=required: {refusal}")
        lock = SlabLock.acquire(paths.lock)
        if lock is None:
            raise SlabBusyError(
                f"{_process_name(owner_of(paths.slab)[0])} works on the slab of node {node_id} in "
                f"cluster {cluster} and holds {paths.lock}: end it first"
            )
        try:
            opening = Opening(cluster, node_id, geometry, paths.slab)
            file = opening.adopt_own()
            if live_node_ids is not None:
                living = {*live_node_ids, node_id}
                file = file or opening.adopt_orphan(living, runtime=runtime, shm=shm)
                sweep(cluster, living, runtime=runtime, shm=shm)
            file = file or opening.create(shm, memory_usage_threshold, on_progress)
            return cls._take(file, paths, lock, lock_mode)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _take(cls, file: SlabFile, paths: SlabPaths, lock: SlabLock, mode: LockMode) -> "SlabOwner":
        """From here on the file is ours, and its header page says so."""
        try:
            address = np.frombuffer(file.mapping, dtype=np.uint8).ctypes.data
            locked = lock_pages(address, file.geometry.slab_bytes, mode)
            slab = cls(file=file, paths=paths, lock=lock, locked=locked)
            slab._write_owner(os.getpid())
        except BaseException:
            file.discard()
            raise
        if not file.adopted:
            # The last store of a new file: one that was interrupted before is no slab.
            slab._page["magic"][0] = np.void(MAGIC)
        logger.info("%s: %s", paths.slab, file.reason)
        return slab

    def _write_owner(self, pid: int) -> None:
        started = start_ticks(pid) if pid else 0
        if started is None:
            raise SlabError("/proc does not tell this process's own start time: is /proc mounted?")
        write_number(self._page, "owner_pid", 0)
        write_number(self._page, "owner_start_ticks", started)
        write_number(self._page, "owner_pid", pid)

    # -- what a restart finds ------------------------------------------------------------------

    @property
    def headers(self) -> npt.NDArray[np.void]:
        """SLOT_HEADER_DTYPE, one per possible slot; a read-only view, alive: what apply() writes
        shows in it. For StoreCore.adopt, and for reading by slot.
        """
        view = self._headers.view()
        view.flags.writeable = False
        return view

    @property
    def extents(self) -> npt.NDArray[np.void]:
        """EXTENT_DTYPE, one per extent; as headers."""
        view = self._extents.view()
        view.flags.writeable = False
        return view

    @property
    def generation_mark(self) -> int:
        """Generations below it may have been used."""
        return self._mark

    @property
    def epoch(self) -> Epoch:
        """The last epoch that any NodeStore took for this slab, 0 for a new one."""
        return Epoch(self._epoch)

    def clients(self) -> list[ClientRow]:
        """The rows that are in use: after an adoption, those of the clients before it."""
        return [row for row in rows_in_use(self._page) if row is not None]

    # -- epochs ----------------------------------------------------------------------------------

    def next_epoch(self, *, wall_clock_ms: int, directory_hint: int = 0) -> Epoch:
        """A new epoch, greater than any before it, and written down before it is returned.

        directory_hint: the highest epoch of this node that the directory has seen, 0 if unknown.
        """
        return self.take_epoch(max(self.epoch + 1, directory_hint + 1, wall_clock_ms))

    def take_epoch(self, epoch: int) -> Epoch:
        """Write down an epoch: the one of next_epoch, or a greater one."""
        assert epoch >= self.epoch, f"epoch {epoch} after {self.epoch}"
        write_number(self._page, "epoch", epoch)
        self._epoch = epoch
        return Epoch(epoch)

    # -- what the core wants written -------------------------------------------------------------

    def apply(self, effect: Effect) -> None:
        self.apply_all((effect,))

    def apply_all(self, effects: Iterable[Effect]) -> None:
        """Write them down in order. When it returns they are in the slab, whatever happens to
        this process; an answer that depends on them may leave. About 1 us for a header.
        """
        words = self._words
        for effect in effects:
            if type(effect) is WriteHeader:
                word = effect.slot * _WORDS
                state = effect.state
                state_word = state | effect.origin << 32 | effect.writer << 48
                if state != _READY:
                    words[word + 5] = state_word
                    memory_barrier()
                words[word] = effect.generation
                words[word + 1], words[word + 2] = _TWO_WORDS.unpack(effect.key)
                words[word + 3] = effect.offset
                words[word + 4] = effect.bytes
                words[word + 6] = effect.extent_generation
                words[word + 7] = effect.maker
                if state == _READY:
                    memory_barrier()
                    words[word + 5] = state_word
            elif type(effect) is WriteExtent:
                row = self._extents[effect.extent]
                row["extent_generation"] = effect.extent_generation
                row["slot_bytes"] = effect.slot_bytes
            else:
                assert type(effect) is MarkGeneration, effect
                assert effect.high_water >= self.generation_mark, "generations do not go back"
                write_number(self._page, "generation_mark", effect.high_water)
                self._mark = effect.high_water
        memory_barrier()

    def write_client(
        self, row: int, client: ClientId | None, *, role: Role = Role.ENGINE, engine_nonce: int = 0
    ) -> None:
        """Note who is behind a `writer` of the headers, before it is given a slot; None clears
        the row, once none of its slots is being written.
        """
        assert 0 <= row < MAX_CLIENTS
        write_client(self._page, row, client, role, engine_nonce)

    def zero(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Overwrite (offset, bytes) of the payload, where no block lies; how many bytes."""
        done_bytes = 0
        for offset, length_bytes in ranges:
            assert self.geometry.payload_offset <= offset <= len(self.memory) - length_bytes
            ctypes.memset(self.address + offset, 0, length_bytes)
            done_bytes += length_bytes
        return done_bytes

    # -- the end ---------------------------------------------------------------------------------

    def close(self, *, unlink: bool) -> None:
        """Let go of the slab; unlink: wipe it, too, and take its name away. May be repeated.

        Nothing may use its address any more. Where an array or memoryview of it is still alive,
        the mapping lasts as long as that.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return
        self._write_owner(0)
        if unlink:
            remove_slab(self.paths.slab)
        self._words.release()
        self._words = memoryview(b"").cast("Q")
        self.memory = memoryview(b"")
        self._page, self._extents, self._headers = (
            np.empty(0, dtype=dtype)
            for dtype in (HEADER_PAGE_DTYPE, EXTENT_DTYPE, SLOT_HEADER_DTYPE)
        )
        with suppress(BufferError):
            self._mapping.close()
        os.close(self.fd)
        self.fd = -1
        lock.release()

    def snapshot(self) -> dict[str, str | int | bool]:
        """For status and doctor."""
        return {
            "path": str(self.paths.slab),
            "slab_id": self.slab_id.hex(),
            "slab_bytes": self.geometry.slab_bytes,
            "extent_bytes": self.geometry.extent_bytes,
            "epoch": self.epoch,
            "generation_mark": self.generation_mark,
            "clients": len(self.clients()),
            "adopted": self.adopted,
            "reason": self.reason,
            "locked_in_memory": self.is_locked_in_memory,
        }

    def check(self) -> None:
        """The file says what this object says, and no generation lies beyond the mark."""
        page = self._page[0]
        assert page["magic"].tobytes() == MAGIC
        assert page["slab_id"].tobytes() == self.slab_id
        assert page["boot_id"].tobytes() == boot_id()
        assert read_number(self._page, "owner_pid") == os.getpid()
        assert (int(page["slab_bytes"]), int(page["extent_bytes"])) == (
            self.geometry.slab_bytes,
            self.geometry.extent_bytes,
        )
        assert os.fstat(self.fd).st_size == self.geometry.slab_bytes
        assert (self._headers["generation"] < max(1, self.generation_mark)).all()
        assert (self._headers["state"] <= SlotState.QUARANTINE).all()


def _process_name(pid: int) -> str:
    return f"process {pid}" if pid else "another process"
