"""Whether the host has the memory for a slab, and how a slab gets it.

Everything is asked before anything is allocated: a tmpfs that runs full kills by SIGBUS, and a
host above the threshold of Ray's memory monitor loses workers one by one.
"""

import ctypes
import errno
import logging
import mmap
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvray.config import LockMode
from kvray.core.layout import PAGE_BYTES
from kvray.errors import ConfigError, SlabError
from kvray.node.mapped import POPULATE_STEP_BYTES, populate_pages

logger = logging.getLogger("kvray.node")

RAY_MEMORY_USAGE_THRESHOLD = 0.95  # RAY_memory_usage_threshold, where Ray starts to kill workers

PUNCH_STEP_BYTES = 1 << 30  # one call after the other, so that what lies in front goes first

_CGROUP_DIRECTORY = Path("/sys/fs/cgroup")
_MLOCK_ONFAULT = 1
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE of linux/falloc.h
_MAP_NORESERVE = 0x4000  # asm-generic; the module mmap does not name it everywhere

_libc = ctypes.CDLL(None, use_errno=True)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What there is, in bytes. total and used are the host's, or the container's where that has a
    limit: the same numbers that Ray's memory monitor looks at.
    """

    shm_free: int
    shm_total: int
    available: int
    total: int
    used: int


def read_host_memory(shm: Path, *, cgroup: Path = _CGROUP_DIRECTORY) -> HostMemory:
    found = os.statvfs(shm)
    meminfo = {
        line[0].rstrip(":"): int(line[1]) * 1024
        for line in (row.split() for row in Path("/proc/meminfo").read_text().splitlines())
    }
    total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    used = total - available
    limit = _cgroup_memory(cgroup)
    if limit is not None and limit[0] < total:
        total, used = limit
        available = min(available, total - used)
    return HostMemory(
        shm_free=found.f_bavail * found.f_frsize,
        shm_total=found.f_blocks * found.f_frsize,
        available=available,
        total=total,
        used=used,
    )


def _cgroup_memory(cgroup: Path) -> tuple[int, int] | None:
    """(limit, used without the page cache) of the container, as Ray reads it; None without one."""
    for limit_path, usage_path, stat_path, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_",
        ),
    ):
        try:
            limit = (cgroup / limit_path).read_text().strip()
            usage = int((cgroup / usage_path).read_text())
            rows = (cgroup / stat_path).read_text().splitlines()
        except OSError:
            continue
        if limit == "max":
            return None
        counted = dict(row.split() for row in rows)
        cache = sum(int(counted.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return int(limit), max(0, usage - cache)
    return None


def check_size(
    slab_bytes: int,
    *,
    memory: HostMemory,
    freed_bytes: int,
    memory_usage_threshold: float,
) -> None:
    """Raises ConfigError, with the numbers, if a slab of this size does not fit the host.

    freed_bytes: what comes free when the slab that is there now is given up.
    """
    old = f", and {freed_bytes} more when the old slab is given up" if freed_bytes else ""
    if slab_bytes > memory.shm_free + freed_bytes:
        raise ConfigError(
            f"slab_bytes is {slab_bytes}; /dev/shm has {memory.shm_free} bytes free of "
            f"{memory.shm_total}{old}. Make slab_bytes smaller, or /dev/shm larger "
            "(`mount -o remount,size=...`, `docker run --shm-size=...`)"
        )
    if slab_bytes > memory.available + freed_bytes:
        raise ConfigError(
            f"slab_bytes is {slab_bytes}; {memory.available} bytes of memory are available of "
            f"{memory.total}{old}. Make slab_bytes smaller"
        )
    allowed = int(memory.total * memory_usage_threshold)
    after = memory.used - freed_bytes + slab_bytes
    if memory_usage_threshold < 1 and after > allowed:
        raise ConfigError(
            f"slab_bytes is {slab_bytes}; with it {after} of {memory.total} bytes of memory would "
            f"be in use, and Ray kills workers above {allowed} "
            f"(RAY_memory_usage_threshold={memory_usage_threshold}). Make slab_bytes smaller"
        )


def lock_refusal(length_bytes: int) -> str | None:
    """Why this process may not lock so much memory, or None if it may. Allocates nothing: asks
    the kernel with an empty mapping of that size, since the limit alone does not tell (a
    privileged process has none, but not in every container).
    """
    mlock2 = getattr(_libc, "mlock2", None)
    if mlock2 is None:
        return None
    try:
        probe = mmap.mmap(
            -1,
            length_bytes,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            prot=mmap.PROT_READ,
        )
    except OSError as exc:
        return f"no address space for {length_bytes} bytes ({exc.strerror})"
    view = np.frombuffer(probe, dtype=np.uint8)
    address = ctypes.c_void_p(view.ctypes.data)
    refused = mlock2(address, ctypes.c_size_t(length_bytes), _MLOCK_ONFAULT) != 0
    number = ctypes.get_errno()
    del view
    probe.close()  # which ends the lock
    if not refused or number == errno.ENOSYS:
        return None
    return _refusal(length_bytes, number)


def lock_pages(address: int, length_bytes: int, mode: LockMode) -> bool:
    """Lock the slab in memory; returns whether it is locked. mode: required raises SlabError if
    the host refuses, auto warns and goes on, off does not try.
    """
    if mode == "off":
        return False
    if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length_bytes)) == 0:
        return True
    refusal = _refusal(length_bytes, ctypes.get_errno())
    if mode == "required":
        raise SlabError(f"lock=required: {refusal}")
    logger.warning("the slab is not locked in memory and may be swapped out: %s", refusal)
    return False


def _refusal(length_bytes: int, number: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limits = " and ".join(
        "no limit" if n == resource.RLIM_INFINITY else str(n) for n in (soft, hard)
    )
    return (
        f"the slab has {length_bytes} bytes, this process may lock {limits} (soft and hard "
        f"RLIMIT_MEMLOCK), and has locked {_locked_bytes()} ({os.strerror(number)}). Raise it "
        "(`ulimit -l`, LimitMEMLOCK= of systemd, `docker run --ulimit memlock=-1`), make "
        "slab_bytes smaller, or set lock=auto or lock=off"
    )


def _locked_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0


def allocate(fd: int, slab_bytes: int) -> None:
    """Take the pages of a new slab from the host, all or none."""
    try:
        os.posix_fallocate(fd, 0, slab_bytes)
    except OSError as exc:
        found = os.fstatvfs(fd)
        raise SlabError(
            f"the slab needs {slab_bytes} bytes of /dev/shm, which has "
            f"{found.f_bavail * found.f_frsize} free now ({exc.strerror}). Make slab_bytes "
            "smaller; engines that still map an older slab keep its memory until they let go"
        ) from exc


def punch(fd: int, length_bytes: int) -> None:
    """Give the pages of a slab that is at its end back to the host. Whoever still maps it finds
    zeros from here on: the headers first, since they lie in front, so no payload of zeros has a
    header that says READY.
    """
    for begin in range(0, length_bytes, PUNCH_STEP_BYTES):
        step_bytes = min(PUNCH_STEP_BYTES, length_bytes - begin)
        if _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_long(begin), ctypes.c_long(step_bytes)):
            number = ctypes.get_errno()
            raise SlabError(f"the slab's pages cannot be given back: {os.strerror(number)}")


def prefault(address: int, length_bytes: int, *, on_progress: Progress | None = None) -> None:
    """Clear and map every page of a new slab. Without it the first touch of each page would be
    paid inside somebody's copy (1 GiB/s instead of ten). About 0.25 s/GiB after allocate().

    The pages must not be in anybody's use: the fallback for kernels before 5.14 writes to them.
    """
    for done in range(0, length_bytes, POPULATE_STEP_BYTES):
        step_bytes = min(POPULATE_STEP_BYTES, length_bytes - done)
        if not populate_pages(address + done, step_bytes):
            _touch(address + done, step_bytes)
        if on_progress is not None:
            on_progress(done + step_bytes, length_bytes)


def _touch(address: int, length_bytes: int) -> None:
    pages = (ctypes.c_uint8 * length_bytes).from_address(address)
    np.frombuffer(memoryview(pages), dtype=np.uint8)[::PAGE_BYTES] = 0
