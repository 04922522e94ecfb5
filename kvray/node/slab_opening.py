"""How a NodeStore comes to its slab file: keeps the one that is there, or makes another.

Used by node.slab only, with the slab's lock held. A file is adopted if this boot of the host, this
format of kvray and this geometry have written it to the end; anything else is given up: unlinked,
never truncated, since engines may still map it and copy.
"""

import mmap
import os
import secrets
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvray.core.header_page import (
    HEADER_PAGE_DTYPE,
    damage,
    fixed_sum,
    read_number,
    write_number,
)
from kvray.core.ids import SLAB_ID_BYTES, NodeId
from kvray.core.layout import FORMAT_VERSION, PAGE_BYTES, Geometry, aligned
from kvray.errors import SlabBusyError, SlabError
from kvray.node.mapped import keep_private
from kvray.node.memory import Progress, allocate, check_size, prefault, read_host_memory
from kvray.node.process import boot_id, has_ended, open_pidfd
from kvray.node.slab_file import (
    HeaderPage,
    named_owner,
    open_slab_file,
    orphans,
    read_header_page,
)

# A killed owner loses its lock and then, microseconds later, its pid: nothing legal takes longer.
OWNER_EXIT_MS = 2_000
STAT_BLOCK_BYTES = 512  # what st_blocks counts in, see stat(2)


@dataclass(slots=True)
class SlabFile:
    """An open and mapped slab file that is not ours yet."""

    descriptor: int
    mapping: mmap.mmap
    geometry: Geometry
    path: Path
    adopted: bool
    reason: str
    previous_owner: tuple[int, int] | None

    def discard(self) -> None:
        """An opening that failed leaves an old slab as it was, and no new one."""
        if not self.adopted:
            with suppress(FileNotFoundError):
                self.path.unlink()
        with suppress(BufferError):
            self.mapping.close()
        os.close(self.descriptor)


class Opening:
    """The steps of SlabOwner.open, with the lock held."""

    def __init__(self, cluster: str, node_id: NodeId, geometry: Geometry, path: Path) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._geometry = geometry
        self._path = path
        self._refusal = ""
        self._freed_bytes = 0
        self._last_epoch = 0

    def adopt_own(self) -> SlabFile | None:
        """The slab under our own name, if it is as we want it; otherwise notes why not."""
        descriptor = open_slab_file(self._path)
        if descriptor is None:
            return None
        page = read_header_page(descriptor)
        try:
            _expect_no_owner(page, self._path)
            self._refusal = self._difference(descriptor, page)
            if not self._refusal:
                assert page is not None
                return self._adopted(descriptor, page, "kept what was there")
        except BaseException:
            os.close(descriptor)
            raise
        self._freed_bytes = os.fstat(descriptor).st_blocks * STAT_BLOCK_BYTES
        if page is not None and not unreadable(page):
            self._last_epoch = read_number(page, "epoch") or 0
        os.close(descriptor)
        return None

    def adopt_orphan(
        self, living: Collection[NodeId], *, runtime: Path, shm: Path
    ) -> SlabFile | None:
        """The slab of a node of this host that is gone, under our name from now on."""
        for orphan in orphans(self._cluster, living, runtime=runtime, shm=shm):
            try:
                file = self._adopt_orphan(orphan.path)
            finally:
                orphan.lock.release()
            if file is not None:
                return file
        return None

    def _adopt_orphan(self, path: Path) -> SlabFile | None:
        descriptor = open_slab_file(path)
        if descriptor is None:
            return None
        adopted = False
        try:
            page = read_header_page(descriptor)
            if page is None or self._difference(descriptor, page, of_this_node=False):
                return None
            former = page["node_id"][0].decode()
            file = self._adopted(descriptor, page, f"took over the slab of node {former}")
            renamed = np.frombuffer(file.mapping, dtype=HEADER_PAGE_DTYPE, count=1)
            renamed["node_id"][0] = self._node_id.encode()
            renamed["sum"][0] = fixed_sum(renamed)
            path.rename(self._path)
            adopted = True
            return file
        finally:
            if not adopted:
                os.close(descriptor)

    def _difference(
        self, descriptor: int, page: HeaderPage | None, *, of_this_node: bool = True
    ) -> str:
        """Why this file can not be adopted; empty if it can."""
        found = os.fstat(descriptor)
        wanted = self._geometry
        if page is None:
            return "it was never completed"
        if reason := unreadable(page):
            return reason
        if page["boot_id"][0].tobytes() != boot_id():
            return "it is of another boot of the host"
        cut = (int(page["slab_bytes"][0]), int(page["extent_bytes"][0]))
        if cut != (wanted.slab_bytes, wanted.extent_bytes) or found.st_size != wanted.slab_bytes:
            return (
                f"it has {cut[0]} bytes in extents of {cut[1]}, "
                f"wanted are {wanted.slab_bytes} in extents of {wanted.extent_bytes}"
            )
        if found.st_blocks * STAT_BLOCK_BYTES < aligned(wanted.slab_bytes, PAGE_BYTES):
            return f"only {found.st_blocks * STAT_BLOCK_BYTES} of its bytes are allocated"
        if page["cluster"][0] != self._cluster.encode():
            return f"it is of cluster {page['cluster'][0].decode(errors='replace')}"
        if of_this_node and page["node_id"][0] != self._node_id.encode():
            return f"it is of node {page['node_id'][0].decode(errors='replace')}"
        return ""

    def _adopted(self, descriptor: int, page: HeaderPage, how: str) -> SlabFile:
        owner = named_owner(page)
        return SlabFile(
            descriptor=descriptor,
            mapping=_map(descriptor, self._geometry),
            geometry=self._geometry,
            path=self._path,
            adopted=True,
            reason=f"adopted: {how}",
            previous_owner=owner if owner[0] else None,
        )

    def create(self, shm: Path, threshold: float, on_progress: Progress | None) -> SlabFile:
        slab_bytes = self._geometry.slab_bytes
        check_size(
            slab_bytes,
            memory=read_host_memory(shm),
            freed_bytes=self._freed_bytes,
            memory_usage_threshold=threshold,
        )
        with suppress(FileNotFoundError):
            self._path.unlink()
        try:
            descriptor = os.open(
                self._path,
                os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
        except OSError as exc:
            raise SlabError(f"can not make {self._path}: {exc.strerror}") from exc
        try:
            allocate(descriptor, slab_bytes)
            mapping = _map(descriptor, self._geometry)
            file = SlabFile(
                descriptor=descriptor,
                mapping=mapping,
                geometry=self._geometry,
                path=self._path,
                adopted=False,
                reason=self._reason_of_a_new_one(),
                previous_owner=None,
            )
            address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
            prefault(address, slab_bytes, on_progress=on_progress)
        except BaseException:
            with suppress(FileNotFoundError):
                self._path.unlink()
            os.close(descriptor)
            raise
        self._write_page(mapping)
        return file

    def _reason_of_a_new_one(self) -> str:
        if not self._refusal:
            return "new and empty: no slab of this node was there"
        return f"new and empty; the old slab was given up, {self._refusal}"

    def _write_page(self, mapping: mmap.mmap) -> None:
        """All but the magic, which makes it a slab."""
        page = np.frombuffer(mapping, dtype=HEADER_PAGE_DTYPE, count=1)
        page["format"] = FORMAT_VERSION
        page["slab_id"] = np.void(secrets.token_bytes(SLAB_ID_BYTES))
        page["boot_id"] = np.void(boot_id())
        page["slab_bytes"] = self._geometry.slab_bytes
        page["extent_bytes"] = self._geometry.extent_bytes
        page["cluster"] = self._cluster.encode()
        page["node_id"] = self._node_id.encode()
        page["sum"] = fixed_sum(page)
        write_number(page, "epoch", self._last_epoch)
        write_number(page, "generation_mark", 0)
        write_number(page, "owner_pid", 0)
        write_number(page, "owner_start_ticks", 0)


def _map(descriptor: int, geometry: Geometry) -> mmap.mmap:
    try:
        mapping = mmap.mmap(descriptor, geometry.slab_bytes)
    except OSError as exc:
        raise SlabError(f"can not map {geometry.slab_bytes} bytes: {exc.strerror}") from exc
    keep_private(mapping)
    return mapping


def unreadable(page: HeaderPage) -> str:
    """Why nothing in this page can be used; empty if it can."""
    if page["format"][0] != FORMAT_VERSION:
        return f"it has format {page['format'][0]}, this kvray writes {FORMAT_VERSION}"
    return damage(page, wall_clock_ms=time.time_ns() // 1_000_000)


def _expect_no_owner(page: HeaderPage | None, path: Path) -> None:
    """The lock says that nobody works on the slab. If the header page names a process that is
    alive all the same, its lock was another file (another runtime folder): hands off.
    """
    pid, started = (0, 0) if page is None else named_owner(page)
    pidfd = open_pidfd(pid, started)
    if pidfd is None:
        return
    try:
        ended = has_ended(pidfd, wait_ms=0 if pid == os.getpid() else OWNER_EXIT_MS)
    finally:
        os.close(pidfd)
    if not ended:
        raise SlabBusyError(
            f"process {pid} works on {path} without holding its lock in this runtime folder: "
            "end it, or give both the same KVRAY_RUNTIME_DIR"
        )
