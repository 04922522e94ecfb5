"""Where the time of a fetch goes beside the copy, for transfer.py.

    reader's thread   ──▶ hand over ──▶ link thread
    link thread           post: checks, NIXL's lists, the request; payload; turn: what lies between
                          it and the headers' being posted; headers: lists and read
    reader's thread   ◀── hand back ◀──
                          proof: of each block, by its header

A real link that notes the time. Only fetches of one read are taken apart: in those that have
several, one read's payload comes while the blocks of the one before are proven.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from kvray.core.ids import ReadId
from kvray.link.base import Segments
from kvray.link.nixl import NixlLink

READS = 2  # of one fetch: its payload, its headers
STAGES = ("hand_over", "post", "payload", "turn", "headers", "hand_back", "proof")


class TimedLink(NixlLink):
    """marks: when what happened, since they were cleared."""

    def __init__(self, name: str, *, transports: str = "") -> None:
        super().__init__(name, transports=transports)
        self.marks: list[tuple[str, float]] = []
        self._transfers = _Timed(self._transfers, self.marks)

    def mark(self, what: str) -> None:
        self.marks.append((what, time.perf_counter()))

    def post_read(self, read_id: ReadId, peer_name: str, segments: Segments) -> None:
        self.mark("post")
        super().post_read(read_id, peer_name, segments)
        self.mark("post_end")


class _Timed:
    """NIXL's agent, whose posts are noted."""

    def __init__(self, agent: Any, marks: list[tuple[str, float]]) -> None:
        self._agent = agent
        self._marks = marks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def postXferReq(self, handle: int, notification: bytes) -> Any:  # noqa: N802 (NIXL's name)
        self._marks.append(("copy", time.perf_counter()))
        state = self._agent.postXferReq(handle, notification)
        self._marks.append(("copy_end", time.perf_counter()))
        return state


def stages_of(marks: Sequence[tuple[str, float]]) -> dict[str, float] | None:
    """Seconds of each of STAGES. None unless it was one read, whose payload ended in its post."""
    at: dict[str, list[float]] = {}
    for what, when in marks:
        at.setdefault(what, []).append(when)
    is_one_read = len(at.get("posted", ())) == 1
    posts, ends = at.get("post", []), at.get("post_end", [])
    if not is_one_read or not len(posts) == len(ends) == READS:
        return None
    first_post_end, headers_end = ends
    moments = (
        at["posted"][0],
        at["post"][0],
        at["copy"][0],
        max(when for when in at["copy_end"] if when < first_post_end),
        at["post"][1],
        headers_end,
        at["got"][-1],
        at["proven"][-1],
    )
    return {
        stage: end - begin
        for stage, begin, end in zip(STAGES, moments[:-1], moments[1:], strict=True)
    }


def medians_us(fetches: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """Of each stage. None if any fetch could not be taken apart."""
    taken_apart = [stages for stages in fetches if stages is not None]
    if len(taken_apart) < len(fetches) or not taken_apart:
        return None
    return {
        f"{stage}_us": round(statistics.median(stages[stage] for stages in taken_apart) * 1e6)
        for stage in STAGES
    }
