"""Two blocks side by side: what core.trust asks, in a thread of its own.

    CompareBlocks ─▶ of each pair: the bytes; if they differ, piece by piece; then both headers
                        └─ Compared into the inbox ◀─┘

Nothing here holds up the loop, and numpy gives the GIL back while it works. The blocks are pinned,
but a pin is a promise of those who decide, and the proof is the header's, as after each copy out of
the slab (rule 2): the state before the generation, so that READY in this generation was true after
the last byte was read.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvray.actors import ending_on_bug
from kvray.core.commands import CompareBlocks, Verdict
from kvray.core.effects import Place
from kvray.core.ids import SlotState
from kvray.core.messages import ChunkShape
from kvray.core.tolerance import Tolerance
from kvray.node.mapped import memory_barrier

# At a time: the float64 of one step fit the CPU's cache, and the GIL is free between two of them.
STEP_NUMBERS: Final = 256 * 1024
MAX_PIECES_NAMED: Final = 64  # of those that differ; for people

Bytes = npt.NDArray[np.uint8]
Headers = npt.NDArray[Any]  # SLOT_HEADER_DTYPE
Errors = npt.NDArray[np.float64]

_NUMBERS: Final[dict[str, tuple[type[np.generic], Callable[[Any], Any]]]] = {
    "bfloat16": (np.uint16, lambda raw: (raw.astype(np.uint32) << 16).view(np.float32)),
    "float16": (np.float16, lambda raw: raw.astype(np.float32)),
    "float32": (np.float32, lambda raw: raw),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """The end of a CompareBlocks; see NodeCore.on_compared."""

    comparison_id: int
    verdicts: tuple[Verdict, ...]
    pieces: tuple[int, ...]


class Comparing:
    """The thread. on_compared is called on it, once for each that was submitted."""

    def __init__(
        self, slab: Bytes, headers: Headers, on_compared: Callable[[Compared], None]
    ) -> None:
        """slab: the whole of it; headers: its table. Both stay until close has returned."""
        self._slab = slab
        self._headers = headers
        self._on_compared = on_compared
        self._asked: queue.SimpleQueue[CompareBlocks | None] = queue.SimpleQueue()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvray-compare", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, asked: CompareBlocks) -> None:
        """Returns at once. How many there may be is core.trust's limit."""
        self._asked.put(asked)

    def close(self) -> None:
        """What has not been compared is not. Waits for a step of what is being compared."""
        self._is_closing.set()
        self._asked.put(None)
        if self._thread.ident is not None:
            self._thread.join()
        self._slab, self._headers = self._slab[:0].copy(), self._headers[:0].copy()

    def _run(self) -> None:
        is_closing = self._is_closing.is_set
        with ending_on_bug("the comparison of two blocks"):
            while (asked := self._asked.get()) is not None and not is_closing():
                done = compare(self._slab, self._headers, asked, is_closing=is_closing)
                self._on_compared(done)


def compare(
    slab: Bytes,
    headers: Headers,
    asked: CompareBlocks,
    *,
    is_closing: Callable[[], bool] = lambda: False,
) -> Compared:
    """See Comparing. is_closing: asked between steps; then there is no verdict."""
    verdicts: list[Verdict] = []
    pieces: set[int] = set()
    for pair in asked.pairs:
        mine, other = _payload(slab, pair.mine), _payload(slab, pair.other)
        errors = None
        if len(mine) == len(other) == pair.shape.slot_bytes:
            errors = piece_errors(mine, other, pair.shape, asked.tolerance, is_closing)
        memory_barrier()
        if errors is None or not (_is_true(headers, pair.mine) and _is_true(headers, pair.other)):
            verdicts.append(Verdict.NONE)
            continue
        found = asked.tolerance.exceeded(errors)
        pieces.update(found[:MAX_PIECES_NAMED])
        verdicts.append(Verdict.DIFFERENT if found else Verdict.EQUAL)
    return Compared(asked.comparison_id, tuple(verdicts), tuple(sorted(pieces)[:MAX_PIECES_NAMED]))


def piece_errors(
    mine: Bytes,
    other: Bytes,
    shape: ChunkShape,
    tolerance: Tolerance,
    is_closing: Callable[[], bool] = lambda: False,
) -> Errors | None:
    """Of each piece the norm of the difference over the norm of mine; where only the bytes count, 1
    for a piece that is not the same. None: closing.
    """
    count = shape.slot_bytes // shape.piece_bytes
    errors: Errors = np.zeros(count)
    kind = None if tolerance.is_exact else _NUMBERS.get(shape.dtype)
    for piece in range(count):
        if is_closing():
            return None
        start = piece * shape.piece_bytes
        one, two = (side[start : start + shape.piece_bytes] for side in (mine, other))
        if not np.array_equal(one, two):
            errors[piece] = 1.0 if kind is None else _relative_error(one, two, *kind)
    return errors


def _payload(slab: Bytes, place: Place) -> Bytes:
    return slab[place.offset : place.offset + place.bytes]


def _relative_error(
    one: Bytes, two: Bytes, raw: type[np.generic], numbers_of: Callable[[Any], Any]
) -> float:
    """inf for what is no number, and for a piece that does not consist of such numbers."""
    if len(one) % np.dtype(raw).itemsize:
        return float("inf")
    # The offset of a payload is a multiple of 4 KiB, but a piece's need not be one of its numbers'.
    a, b = (np.frombuffer(side.tobytes(), raw) for side in (one, two))
    difference = norm = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, len(a), STEP_NUMBERS):
            x, y = (numbers_of(side[start : start + STEP_NUMBERS]) for side in (a, b))
            x, y = x.astype(np.float64), y.astype(np.float64)
            norm += float(np.dot(x, x))
            difference += float(np.dot(x - y, x - y))
        error = np.sqrt(difference) / np.sqrt(norm) if norm else float("inf")
    return float(error) if np.isfinite(error) else float("inf")


def _is_true(headers: Headers, place: Place) -> bool:
    """Whether the slot holds this block, now and since before it was read."""
    row = headers[place.slot : place.slot + 1]
    if int(row["state"][0]) != SlotState.READY:
        return False
    memory_barrier()
    return (
        int(row["generation"][0]) == place.generation
        and row["key"][0].tobytes() == place.key
        and int(row["maker"][0]) == place.maker
        and int(row["offset"][0]) == place.offset
        and int(row["bytes"][0]) == place.bytes
    )
