"""The slab as an engine's process sees it: mapped from a file descriptor, headers read only.

    address ─▶ header page │ extents │ slot headers │ payload
                              never written here    │ a worker writes its parts of slots that it
                                                    │ has reserved, and reads slots that are pinned

Only the NodeStore writes headers (node.slab). A worker compares them after each copy out of the
slab (rule 2): whatever a stale or restarted NodeStore believes, what the header says then decides.
Imports numpy, core and errors only: this is loaded into every vLLM worker.
"""

import ctypes
import errno
import mmap
import os
import platform
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvray.core.header_page import HEADER_PAGE_DTYPE
from kvray.core.ids import KEY_BYTES, SLAB_ID_BYTES, SlabId, SlotState
from kvray.core.layout import (
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    PAGE_BYTES,
    SLOT_HEADER_DTYPE,
    Geometry,
)
from kvray.errors import ConfigError, RemoteProtocolError, SlabError, VersionMismatchError
from kvray.ownership import check_own_file

POPULATE_STEP_BYTES = 64 * 1024**2  # about 15 ms of page tables, between two looks at the clock
_MADV_POPULATE_WRITE = 23  # Linux 5.14

# The columns of a header seen as eight 64-bit words, see SLOT_HEADER_DTYPE.
_WORDS = HEADER_BYTES // 8
_GENERATION_WORD, _KEY_WORDS, _OFFSET_WORD, _BYTES_WORD, _STATE_WORD = 0, slice(1, 3), 3, 4, 5
_LOW_HALF = np.uint64(0xFFFF_FFFF)  # the state of a word with origin and writer, bytes of another

_libc = ctypes.CDLL(None, use_errno=True)


class MappedSlab:
    """One mapping of a slab. It lasts as long as this object: whoever copies by raw addresses
    holds a reference to it until the copy has ended. There is no close() that could pull the
    memory from under a copy.

    Safe to use from several threads: nothing in it changes.
    """

    def __init__(self, mapping: mmap.mmap, geometry: Geometry, slab_id: SlabId) -> None:
        self.slab_id = slab_id
        self.geometry = geometry
        whole = np.frombuffer(mapping, dtype=np.uint8)
        table = whole[geometry.slot_table_offset :][: geometry.slot_count * HEADER_BYTES]
        table.flags.writeable = False
        self.headers = table.view(SLOT_HEADER_DTYPE)
        self._words = table.view(np.uint64).reshape(-1, _WORDS)
        self._whole = whole
        self.address: int = whole.ctypes.data

    @classmethod
    def from_fd(cls, fd: int, slab_bytes: int, extent_bytes: int, slab_id: SlabId) -> "MappedSlab":
        """Map the slab that a NodeStore has handed over, after checking that it is what it says.

        The mapping does not need fd any more afterwards; the caller closes it. Raises
        RemoteProtocolError (VersionMismatchError) for another file than the one announced,
        UntrustedError for one that is not this user's own, SlabError if there is no address space
        for it.
        """
        try:
            geometry = Geometry(slab_bytes=slab_bytes, extent_bytes=extent_bytes)
        except ConfigError as exc:
            raise RemoteProtocolError(f"the NodeStore announced an impossible slab: {exc}") from exc
        _check(fd, geometry, slab_id)
        try:
            mapping = mmap.mmap(fd, slab_bytes)
        except OSError as exc:
            raise SlabError(f"can not map the slab of {slab_bytes} bytes: {exc}") from exc
        keep_private(mapping)
        return cls(mapping, geometry, slab_id)

    @property
    def slab_bytes(self) -> int:
        return self.geometry.slab_bytes

    def headers_match(
        self,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        slot_bytes: npt.NDArray[np.uint64],
        keys: bytes,
    ) -> npt.NDArray[np.bool_]:
        """For each slot, whether its header still is READY with this content; all of shape (n,),
        keys n times KEY_BYTES. A slot that does not exist does not match.

        To be called after the payload has been read; no look at a header here happens before
        loads that the caller has done.
        """
        memory_barrier()
        fits, states = self._compare(slots, generations, offsets, slot_bytes, keys)
        matches: npt.NDArray[np.bool_] = fits & (states == SlotState.READY)
        return matches

    def leading_ready(
        self,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        slot_bytes: npt.NDArray[np.uint64],
        keys: bytes,
    ) -> int | None:
        """How many of these, up to the first that is not, are READY with this content. None if one
        of them never will be: its header does not say that this content is being written.

        To be called before the payload is read; no load that the caller does afterwards happens
        before these looks at the headers.
        """
        fits, states = self._compare(slots, generations, offsets, slot_bytes, keys)
        memory_barrier()
        ready = fits & (states == SlotState.READY)
        if not (ready | (fits & (states == SlotState.WRITING))).all():
            return None
        return len(ready) if ready.all() else int(ready.argmin())

    def _compare(
        self,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        slot_bytes: npt.NDArray[np.uint64],
        keys: bytes,
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """For each slot, whether its header names this content; and its state."""
        count = len(slots)
        if not (
            count == len(generations) == len(offsets) == len(slot_bytes)
            and len(keys) == count * KEY_BYTES
        ):
            raise RemoteProtocolError(
                f"{count} slots come with {len(generations)} generations, {len(offsets)} offsets, "
                f"{len(slot_bytes)} sizes and {len(keys)} bytes of keys"
            )
        exists = np.asarray(slots) < self.geometry.slot_count
        rows = self._words[np.where(exists, slots, 0)]
        wanted_keys = np.frombuffer(keys, dtype=np.uint64).reshape(count, 2)
        fits: npt.NDArray[np.bool_] = (
            exists
            & (rows[:, _GENERATION_WORD] == generations)
            & (rows[:, _KEY_WORDS] == wanted_keys).all(axis=1)
            & (rows[:, _OFFSET_WORD] == offsets)
            & (rows[:, _BYTES_WORD] & _LOW_HALF == slot_bytes)
        )
        return fits, rows[:, _STATE_WORD] & _LOW_HALF

    def all_match(
        self,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        slot_bytes: npt.NDArray[np.uint64],
        keys: bytes,
    ) -> bool:
        return bool(self.headers_match(slots, generations, offsets, slot_bytes, keys).all())

    def contains(self, offsets: npt.NDArray[np.uint64], slot_bytes: npt.NDArray[np.uint64]) -> bool:
        """Whether all of these payloads lie inside the extents: before an address is made of what
        another process has said.
        """
        begin, end = np.uint64(self.geometry.payload_offset), np.uint64(self.geometry.used_bytes)
        # Written so that no sum can run over 64 bits.
        inside = (
            (offsets >= begin) & (offsets <= end) & (slot_bytes <= end - np.minimum(offsets, end))
        )
        return bool(inside.all())

    def populate(self, *, offset: int = 0, length_bytes: int | None = None) -> bool:
        """Fill this process's page tables for a part of the slab, so that the first copies do not
        take a fault per page (about half of their time). Content is not touched.

        Returns False where the kernel can not do it; nothing is lost but that time. The GIL is
        free meanwhile: call it from a thread of its own, a step at a time.
        """
        length = self.slab_bytes - offset if length_bytes is None else length_bytes
        begin = offset - offset % PAGE_BYTES
        end = min(self.slab_bytes, offset + length)
        for step in range(begin, end, POPULATE_STEP_BYTES):
            step_bytes = min(POPULATE_STEP_BYTES, end - step)
            if not populate_pages(self.address + step, step_bytes):
                return False
        return True


def keep_private(mapping: mmap.mmap) -> None:
    """Other people's prompts are in it: no core dump has it, and no forked child.

    A mapped file of /dev/shm is not dumped while it has a name, and is dumped whole when it has
    none any more: after `kvray stop`, in each engine.
    """
    mapping.madvise(mmap.MADV_DONTDUMP)
    mapping.madvise(mmap.MADV_DONTFORK)


def populate_pages(address: int, length_bytes: int) -> bool:
    """MADV_POPULATE_WRITE: allocate and map these pages as a write would, without writing.

    False if the kernel does not know it (before 5.14). Raises SlabError if there is no memory.
    """
    while _libc.madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(length_bytes), _MADV_POPULATE_WRITE
    ):
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            return False
        if number not in (errno.EINTR, errno.EAGAIN):
            raise SlabError(f"can not populate {length_bytes} bytes: {os.strerror(number)}")
    return True


def _nothing() -> None:
    """x86-64: stores become visible, and loads happen, in program order anyway (TSO)."""


_barrier_lock = threading.Lock()


def _release_and_acquire() -> None:
    # No load or store before the release passes the acquire after it, nor the other way round.
    with _barrier_lock:
        pass
    with _barrier_lock:
        pass


# Between two accesses to the slab whose order other processes, or this thread, rely on.
memory_barrier: Callable[[], None] = (
    _nothing if platform.machine() in ("x86_64", "AMD64") else _release_and_acquire
)


def _check(fd: int, geometry: Geometry, slab_id: SlabId) -> None:
    check_own_file(fd, "the file that was handed over as the slab")
    size_bytes = os.fstat(fd).st_size
    if size_bytes != geometry.slab_bytes:
        raise RemoteProtocolError(
            f"the slab was announced with {geometry.slab_bytes} bytes, the file has {size_bytes}"
        )
    page = np.frombuffer(os.pread(fd, PAGE_BYTES, 0), dtype=HEADER_PAGE_DTYPE)[0]
    if page["magic"].tobytes() != MAGIC:
        raise RemoteProtocolError("the file that was handed over is no slab of kvray")
    if page["format"] != FORMAT_VERSION:
        raise VersionMismatchError(
            f"the slab has format {page['format']}, this engine's kvray reads {FORMAT_VERSION}: "
            "run the same version of kvray in the engine and on the node"
        )
    found_id = page["slab_id"].tobytes()
    if len(slab_id) != SLAB_ID_BYTES or found_id != slab_id:
        raise RemoteProtocolError(
            f"slab {slab_id.hex()} was announced, the file is {found_id.hex()}"
        )
    if (page["slab_bytes"], page["extent_bytes"]) != (geometry.slab_bytes, geometry.extent_bytes):
        raise RemoteProtocolError(
            f"the slab was announced with extents of {geometry.extent_bytes} bytes, "
            f"its header page says {page['extent_bytes']}"
        )
