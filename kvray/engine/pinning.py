"""Locks the slab for the device, so that it reads and writes it at the speed of the link.

    begin(slab) ──▶ PINNING ──every piece──▶ PINNED ──close(), or the slab is gone──▶ unregistered
                        └──one is refused──▶ what there is stays; one warning says what to do

A slab of a host is large: registering takes about as long as reading it once. So it is done on a
thread of its own, piece by piece, and a copy asks whether its own bytes are covered. One that is
not takes the slower way (copy_ways.SINGLE), with the same result.

A piece is some whole extents, so that no slot lies across two registrations: the driver takes a
copy that does for one of memory it does not know. Headers are read by the CPU only.
"""

import logging
import resource
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvray.engine.cuda_driver import CudaError
from kvray.node.mapped import MappedSlab

logger = logging.getLogger("kvray.engine")

PIECE_BYTES = 1024**3  # about 0.1 s each; the driver holds up other calls meanwhile
CLOSE_LIMIT_S = 10.0  # for a piece that is being registered


class Registrar(Protocol):
    """Whose device it is. Both raise CudaError."""

    def register(self, address: int, length_bytes: int) -> None: ...
    def unregister(self, address: int) -> None: ...


class Pins:
    """All that one device has locked. begin() and covers() from any thread."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        # Again by the same thread: a slab may go while something is looked up here.
        self._lock = threading.RLock()
        self._covered: dict[int, tuple[int, int]] = {}  # by its slab's address
        self._slabs: dict[int, weakref.finalize[..., MappedSlab]] = {}  # by its address
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    def begin(self, slab: MappedSlab) -> None:
        """Lock it, on a thread of its own. A slab that is known is locked already."""
        with self._lock:
            known = self._slabs.get(slab.address)
            if self._closing.is_set() or (known is not None and known.alive):
                return
            pieces: list[int] = []
            # Not a method of this object, which may be gone by then. At exit, too.
            self._slabs[slab.address] = weakref.finalize(
                slab, _unregister_all, self._registrar, pieces, self._forget, slab.address
            )
            # The thread holds no reference to the slab for longer than a piece.
            begin = slab.address + slab.geometry.payload_offset
            end = slab.address + slab.geometry.used_bytes
            step = max(1, PIECE_BYTES // slab.geometry.extent_bytes) * slab.geometry.extent_bytes
            thread = threading.Thread(
                target=self._register_all,
                args=(weakref.ref(slab), begin, end, step, pieces),
                name="kvray-pin",
                daemon=True,
            )
            self._threads = [*(t for t in self._threads if t.is_alive()), thread]
        thread.start()

    def covers(self, begin: int, end: int) -> bool:
        """Whether the device may use all of these addresses at full speed."""
        with self._lock:
            covered = tuple(self._covered.values())
        return any(first <= begin and end <= last for first, last in covered)

    def wait(self, limit_s: float) -> bool:
        """Whether all that was begun has ended by then. For tests and benchmarks."""
        end_s = time.monotonic() + limit_s
        for thread in list(self._threads):
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Unregister everything. No copy may be under way any more."""
        self._closing.set()
        if not self.wait(CLOSE_LIMIT_S):
            logger.warning("a piece of the slab was still being locked %.0f s on", CLOSE_LIMIT_S)
        for unregister in list(self._slabs.values()):
            unregister()
        self._slabs.clear()

    def _register_all(
        self,
        slab: "weakref.ref[MappedSlab]",
        begin: int,
        end: int,
        step: int,
        pieces: list[int],
    ) -> None:
        begun_s = time.monotonic()
        for address in range(begin, end, step):
            piece_bytes = min(step, end - address)
            held = slab()  # else the mapping could go while the driver walks over it
            if held is None or self._closing.is_set():
                return
            try:
                self._registrar.register(address, piece_bytes)
            except CudaError as exc:
                logger.warning("%s", _refusal(exc, address - begin, piece_bytes, end - begin))
                return
            with self._lock:
                pieces.append(address)
                self._covered[held.address] = (begin, address + piece_bytes)
            del held
        seconds = time.monotonic() - begun_s
        logger.info(
            "locked %d bytes of the slab for the device in %d pieces, in %.2f s (%.1f GB/s)",
            end - begin,
            len(pieces),
            seconds,
            (end - begin) / 1e9 / max(seconds, 1e-9),
        )

    def _forget(self, address: int) -> None:
        with self._lock:
            self._covered.pop(address, None)
            self._slabs.pop(address, None)


def _unregister_all(
    registrar: Registrar, pieces: list[int], forget: Callable[[int], None], address: int
) -> None:
    forget(address)
    while pieces:
        piece = pieces.pop()
        try:
            registrar.unregister(piece)
        except CudaError as exc:  # the process ends, or the device is lost: its end unlocks too
            logger.warning("a piece of the slab was not unlocked: %s", exc)
            return


def _refusal(exc: CudaError, done_bytes: int, piece_bytes: int, slab_bytes: int) -> str:
    """What was expected, what was found, what to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limits = " and ".join(
        "no limit" if n == resource.RLIM_INFINITY else str(n) for n in (soft, hard)
    )
    return (
        f"the slab is not locked for the GPU, so copies of it are slower (and correct): expected "
        f"to lock {slab_bytes} bytes, {done_bytes} are; the driver refused the next {piece_bytes} "
        f"({exc}). This process may lock {limits} (soft and hard RLIMIT_MEMLOCK), and has locked "
        f"{_locked_bytes()}. Raise it for the engine (`ulimit -l unlimited`, LimitMEMLOCK= of "
        "systemd, `docker run --ulimit memlock=-1`), give the container more memory, or make "
        "slab_bytes smaller"
    )


def _locked_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0
