"""Reads that are only timed. Part of LinkLoop, so without thread and clock.

    start ──▶ under way ──end──▶ ended ──take_ended──▶ MeasureEnded
                  └──limit──▶ MeasureEnded(LATE); abandoned ──end, however late──▶ rows given back

What comes goes to scratch rows that belong to the read until it has ended (rule 3), and nobody
looks at it. Nothing is read that a peer's block reads would not read as well: its registered slab.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvray.core.ids import Epoch, NodeId, ReadId
from kvray.core.layout import HEADER_BYTES
from kvray.core.messages import NodeInfo
from kvray.core.way import Outcome
from kvray.errors import LinkError
from kvray.link.base import Link, ReadEnd, ReadOutcome, Segments
from kvray.node.scratch import HeaderScratch, Span

PIECE_BYTES = 1 << 20  # of a larger read: a block of a small model
# Where pieces go, one after another and from the start again. So a read holds an eighth of the
# scratch rows at most, and what is copied is more than a core's nearest caches hold.
TARGET_BYTES = 2 << 20
# Under way or late: a quarter of the scratch rows. The rest is for headers.
MAX_MEASURES = 2


@dataclass(frozen=True, slots=True)
class MeasureRead:
    """Read so many bytes from anywhere in a peer's slab, and say how long that took. Ends in
    exactly one MeasureEnded, at the latest after limit_us.
    """

    measure_id: int
    node_id: NodeId
    epoch: Epoch
    bytes: int
    limit_us: int


@dataclass(frozen=True, slots=True)
class MeasureEnded:
    """took_us: from the post until the link thread has seen its end, as for any read."""

    measure_id: int
    outcome: Outcome
    took_us: int = 0
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Measure:
    command: MeasureRead
    link: Link
    span: Span
    posted_us: int
    is_late: bool = False  # and has been told


class LinkMeasures:
    """Those of one LinkLoop. scratch: shared with its reads of headers."""

    def __init__(self, scratch: HeaderScratch) -> None:
        self._scratch = scratch
        self._measures: dict[ReadId, _Measure] = {}
        self._ended: list[tuple[_Measure, ReadEnd]] = []  # during this poll

    def __len__(self) -> int:
        """Reads that have not ended."""
        return len(self._measures)

    @property
    def awaited(self) -> int:
        """Those that are not late yet."""
        return sum(not measure.is_late for measure in self._measures.values())

    def start(
        self, command: MeasureRead, read_id: ReadId, link: Link, info: NodeInfo, now_us: int
    ) -> MeasureEnded | None:
        """None if it is under way. read_id: new to the link, which knows this peer."""
        if len(self._measures) >= MAX_MEASURES:
            reason = f"{len(self._measures)} earlier measurements have not ended"
            return MeasureEnded(command.measure_id, Outcome.SKIPPED, reason=reason)
        piece_bytes = min(command.bytes, PIECE_BYTES, info.slab_bytes)
        target_bytes = min(command.bytes, TARGET_BYTES)
        span = self._scratch.take(-(-target_bytes // HEADER_BYTES))
        if span is None:
            reason = "the scratch memory is in use; ask again"
            return MeasureEnded(command.measure_id, Outcome.SKIPPED, reason=reason)
        address = self._scratch.address_of(span)
        segments = _segments(command.bytes, piece_bytes, (address, target_bytes), info)
        try:
            link.post_read(read_id, info.link_name, segments)
        except LinkError as exc:
            self._scratch.give_back(span)
            return MeasureEnded(command.measure_id, Outcome.FAILED, reason=str(exc))
        self._measures[read_id] = _Measure(command, link, span, now_us)
        return None

    def end(self, end: ReadEnd) -> bool:
        """Whether this read is one of these. take_ended says what there is to tell of it."""
        measure = self._measures.pop(end.read_id, None)
        if measure is None:
            return False
        self._scratch.give_back(measure.span)
        if not measure.is_late:
            self._ended.append((measure, end))
        return True

    def take_ended(self, now_us: int) -> list[MeasureEnded]:
        """now_us: after the poll that has seen the end, which may have brought most of the read."""
        taken = []
        for measure, end in self._ended:
            is_done = end.outcome is ReadOutcome.DONE
            outcome = Outcome.MEASURED if is_done else Outcome.FAILED
            took_us = now_us - measure.posted_us
            taken.append(MeasureEnded(measure.command.measure_id, outcome, took_us, end.reason))
        self._ended.clear()
        for read_id, measure in self._measures.items():
            took_us = now_us - measure.posted_us
            if not measure.is_late and took_us > measure.command.limit_us:
                measure.is_late = True
                measure.link.abandon(read_id)
                reason = f"no answer in {took_us // 1_000} ms"
                taken.append(
                    MeasureEnded(measure.command.measure_id, Outcome.LATE, took_us, reason)
                )
        return taken

    def links(self) -> Iterator[Link]:
        """Of each read that has not ended."""
        return (measure.link for measure in self._measures.values())

    def spans(self) -> Iterator[Span]:
        return (measure.span for measure in self._measures.values())


def _segments(
    count_bytes: int, piece_bytes: int, target: tuple[int, int], info: NodeInfo
) -> Segments:
    """target: address and bytes. Other pieces of the slab one after another, as far as it goes."""
    address, target_bytes = target
    starts = np.arange(0, count_bytes, piece_bytes, dtype=np.uint64)
    sizes = np.minimum(np.uint64(piece_bytes), np.uint64(count_bytes) - starts)
    places = max(1, target_bytes // piece_bytes) * piece_bytes
    pieces_of_slab = info.slab_bytes // piece_bytes * piece_bytes
    return Segments(
        local=np.uint64(address) + starts % np.uint64(places),
        remote=np.uint64(info.slab_address) + starts % np.uint64(pieces_of_slab),
        bytes=sizes,
    )
