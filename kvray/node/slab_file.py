"""Where the files of a node's slab are, and who may touch them.

    /dev/shm/kvray-<cluster>-<node>.slab      the slab; memory of the host
    <runtime>/<cluster>-<node>.lock           held by the one NodeStore that works on it
    <runtime>/<cluster>-<node>.sock           where engines find that NodeStore

<node> is the beginning of the node id, <runtime> a folder of this user only. The lock is a file of
its own, never unlinked and never passed on: a lock on the slab itself would live on in every
engine that maps it, and an unlinked one can be held twice.
"""

import fcntl
import logging
import os
import re
import stat
import weakref
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvray.config import (
    MAX_SOCKET_PATH_BYTES,
    NODE_NAME_CHARS,
    SHM_FOLDER,
    default_runtime_dir,
    socket_path,
)
from kvray.core.header_page import (
    HEADER_PAGE_DTYPE,
    MAX_CLUSTER_BYTES,
    MAX_NODE_ID_BYTES,
    read_number,
)
from kvray.core.ids import NodeId
from kvray.core.layout import MAGIC, PAGE_BYTES
from kvray.errors import ConfigError, SlabError
from kvray.node.memory import punch
from kvray.node.process import is_alive
from kvray.ownership import check_private_folder

logger = logging.getLogger("kvray.node")

SHM_DIRECTORY = Path(SHM_FOLDER)
LOCK_ATTEMPTS = 8  # each is lost only if somebody replaces the lock file in that very moment

_CLUSTER = re.compile(rf"[a-z0-9-]{{1,{MAX_CLUSTER_BYTES}}}")
_NODE_ID = re.compile(rf"[0-9a-f]{{1,{MAX_NODE_ID_BYTES}}}")
# A node's name has no "-", so the last one ends the cluster's.
_SLAB_NAME = re.compile(rf"kvray-({_CLUSTER.pattern})-([0-9a-f]{{1,{NODE_NAME_CHARS}}})\.slab")

HeaderPage = np.ndarray  # of HEADER_PAGE_DTYPE, shape (1,)


@dataclass(frozen=True, slots=True)
class SlabPaths:
    slab: Path
    lock: Path
    socket: Path


def slab_paths(
    cluster: str,
    node_id: NodeId | str,
    *,
    runtime: Path,
    shm: Path = SHM_DIRECTORY,
) -> SlabPaths:
    """Raises ConfigError for a name that is no file name, or a socket path that is too long."""
    if not _CLUSTER.fullmatch(cluster):
        raise ConfigError(
            f"cluster is {cluster!r}; a cluster's name has 1 to {MAX_CLUSTER_BYTES} "
            "of the characters a-z, 0-9 and -"
        )
    if not _NODE_ID.fullmatch(node_id):
        raise ConfigError(f"node id {node_id!r}: 1 to {MAX_NODE_ID_BYTES} hex digits expected")
    name = f"{cluster}-{node_id[:NODE_NAME_CHARS]}"
    socket = Path(socket_path(str(runtime), cluster, node_id))
    length = len(os.fsencode(socket))
    if length > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket's path {socket} has {length} bytes, and unix allows "
            f"{MAX_SOCKET_PATH_BYTES}: set KVRAY_RUNTIME_DIR to a shorter folder"
        )
    return SlabPaths(slab=shm / f"kvray-{name}.slab", lock=runtime / f"{name}.lock", socket=socket)


def runtime_directory(folder: Path | str | None = None) -> Path:
    """The folder for locks and sockets, by default config.default_runtime_dir(). Made if it is
    missing, mode 0700.

    Every process of a cluster on this host must come to the same answer. Raises UntrustedError if
    another user could put something there, ConfigError if it cannot be made.
    """
    folder = Path(folder or default_runtime_dir()).absolute()
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)  # whatever the umask took away
        check_private_folder(str(folder))
    except OSError as exc:
        raise ConfigError(
            f"can not make the runtime folder {folder}: {exc.strerror}. "
            "Set KVRAY_RUNTIME_DIR to a folder that this user may make"
        ) from exc
    return folder


class SlabLock:
    """The right to work on one slab. Ends with release() or with the process, and only so: the
    descriptor is closed in forked children and at exec, and is never sent to anybody.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _locks_of_this_process.add(self)

    @classmethod
    def acquire(cls, path: Path) -> "SlabLock | None":
        """None if another process, or another object of this one, holds it. Does not wait."""
        for _ in range(LOCK_ATTEMPTS):
            try:
                descriptor = os.open(
                    path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                )
            except OSError as exc:
                raise SlabError(f"can not open the lock {path}: {exc.strerror}") from exc
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if _is_same_file(descriptor, path):
                return cls(descriptor)
            os.close(descriptor)  # somebody cleaned the folder up meanwhile: this lock is nobody's
        raise SlabError(f"the lock {path} is replaced all the time: who cleans up its folder?")

    def release(self) -> None:
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        _locks_of_this_process.discard(self)


_locks_of_this_process: weakref.WeakSet[SlabLock] = weakref.WeakSet()


def _close_locks_in_child() -> None:
    # The lock belongs to the open file, which a fork shares: closing it here does not release it,
    # and a child that outlives its parent does not keep it.
    for lock in list(_locks_of_this_process):
        lock._forget()  # noqa: SLF001 (of this module)


os.register_at_fork(after_in_child=_close_locks_in_child)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def open_slab_file(path: Path) -> int | None:
    """A descriptor of a slab of this user, or None if there is none. Raises SlabError for
    something else under that name, which can neither be adopted nor removed.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SlabError(
            f"{path} is not a slab of this user ({exc.strerror}): remove it, "
            "or start kvray with another cluster name"
        ) from exc
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)  # another mode is somebody's mistake
        return descriptor
    os.close(descriptor)
    raise SlabError(
        f"{path} belongs to user {found.st_uid} or is no plain file: remove it, "
        "or start kvray with another cluster name"
    )


def read_header_page(descriptor: int) -> HeaderPage | None:
    """A copy of the first page, or None if no slab has been completed in this file."""
    content = os.pread(descriptor, PAGE_BYTES, 0)
    if len(content) < PAGE_BYTES:
        return None
    page = np.frombuffer(content, dtype=HEADER_PAGE_DTYPE)
    return page if page["magic"][0].tobytes() == MAGIC else None


def named_owner(page: HeaderPage) -> tuple[int, int]:
    """(pid, start ticks) of the process that it says works on the slab; zeros for none, or if it is
    damaged there.
    """
    pid, ticks = read_number(page, "owner_pid"), read_number(page, "owner_start_ticks")
    return (0, 0) if not pid or ticks is None else (pid, ticks)


def owner_of(path: Path) -> tuple[int, int]:
    """(pid, start ticks) of the process that the slab's header page names; zeros for none."""
    with suppress(SlabError):
        descriptor = open_slab_file(path)
        if descriptor is not None:
            try:
                page = read_header_page(descriptor)
            finally:
                os.close(descriptor)
            if page is not None:
                return named_owner(page)
    return 0, 0


def remove_slab(path: Path) -> None:
    """Unlink a slab that nobody works on any more, and wipe it: engines that still map it would
    keep the prompts in it as long as they live. Where it cannot be wiped, at least its name goes.
    """
    try:
        descriptor = open_slab_file(path)
        if descriptor is not None:
            try:
                punch(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
    except SlabError as exc:
        logger.warning("%s is removed and was not wiped: %s", path, exc)
    with suppress(FileNotFoundError):
        path.unlink()


@dataclass(frozen=True, slots=True)
class Orphan:
    """A slab whose node is gone, with its lock held by us."""

    path: Path
    lock: SlabLock


def orphans(
    cluster: str,
    live_node_ids: Collection[NodeId],
    *,
    runtime: Path,
    shm: Path = SHM_DIRECTORY,
) -> Iterator[Orphan]:
    """The slabs of the cluster on this host that nobody works on and whose node is not among the
    live ones. The caller releases each lock. An actor that has outlived its node still holds its
    lock, and so keeps its slab.
    """
    live_names = {node_id[:NODE_NAME_CHARS] for node_id in live_node_ids}
    for path in sorted(shm.glob(f"kvray-{cluster}-*.slab")):
        name = _SLAB_NAME.fullmatch(path.name)
        if name is None or name[1] != cluster or name[2] in live_names:
            continue
        with suppress(FileNotFoundError):
            if path.lstat().st_uid != os.geteuid():
                continue
        lock = SlabLock.acquire(slab_paths(cluster, name[2], runtime=runtime, shm=shm).lock)
        if lock is None:
            continue
        if is_alive(*owner_of(path)):  # its lock is in another runtime folder
            lock.release()
            continue
        yield Orphan(path, lock)


def sweep(
    cluster: str,
    live_node_ids: Collection[NodeId],
    *,
    runtime: Path | None = None,
    shm: Path = SHM_DIRECTORY,
) -> list[Path]:
    """Give the memory of dead nodes back to the host; returns what was removed. Engines that
    still map such a slab find it empty.
    """
    removed = []
    runtime = runtime_directory(runtime)
    for orphan in orphans(cluster, live_node_ids, runtime=runtime, shm=shm):
        try:
            remove_slab(orphan.path)
            removed.append(orphan.path)
            logger.info("removed %s: its node is gone", orphan.path)
        finally:
            orphan.lock.release()
    return removed
