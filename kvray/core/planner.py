"""From whom to read what. Pure: sizes, sources and loads in, batches out.

A block may lie on several nodes. A reader wants few large reads, and equal nodes to share the work:

    key       0  1  2  3  4  5  6  7
    held by   A  A  A  A  AB AB B  B        ─▶  A: 0-5, B: 6-7 (the longest run at each step)
    held by   AB AB AB AB AB AB AB AB       ─▶  one batch each in turn (whoever is done first)

It does not know who is alive, avoided or connected: the caller leaves out whoever is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvray.core.ids import NodeId

# One read: large enough to keep a fast link busy while the headers of the read before are proven
# (32 MiB are 3 ms at 10 GB/s), small enough that what fails or is abandoned costs little.
FETCH_BATCH_BYTES = 32 * 1024**2
MAX_BATCH_BLOCKS = 256  # deciding about so many takes 1 ms of the thread that answers engines


@dataclass(frozen=True, slots=True)
class Batch:
    """One read: the blocks at these indices of the plan's wants, ascending, from one node."""

    node_id: NodeId
    indices: tuple[int, ...]
    bytes: int


def plan(
    sizes_bytes: Sequence[int],
    holders: Sequence[Sequence[NodeId]],
    outstanding_bytes: Mapping[NodeId, int],
    *,
    slowness: Mapping[NodeId, float] | None = None,
    batch_bytes: int = FETCH_BATCH_BYTES,
    batch_blocks: int = MAX_BATCH_BLOCKS,
) -> list[Batch]:
    """Give each block that somebody holds to one of its holders, in batches of a bounded size.

    sizes_bytes: of each block. holders: for each block who has it, the preferred ones first; a
    block without holders is in no batch. outstanding_bytes: what is read from a node already; a
    node that is not in it has nothing outstanding. slowness: time per byte, in any unit, of every
    node, so that one twice as fast is given twice as much; None if they are all alike. A block
    larger than batch_bytes is a batch of its own. In the outcome, batches are in the order of their
    first block.
    """
    assert len(sizes_bytes) == len(holders)
    pace = slowness or {}
    loads = {
        node_id: load_bytes * pace.get(node_id, 1.0)
        for node_id, load_bytes in outstanding_bytes.items()
    }
    opened: list[_Open] = []
    current: dict[NodeId, _Open] = {}
    index = 0
    while index < len(sizes_bytes):
        if not holders[index]:
            index += 1
            continue
        limit = min(len(sizes_bytes), index + batch_blocks)
        node_id, stop, run_bytes = _choose(
            index, sizes_bytes, holders, loads, pace, limit=limit, batch_bytes=batch_bytes
        )
        loads[node_id] = loads.get(node_id, 0.0) + run_bytes * pace.get(node_id, 1.0)
        for i in range(index, stop):
            batch = current.get(node_id)
            if batch is None or not batch.has_room(sizes_bytes[i], batch_bytes, batch_blocks):
                batch = current[node_id] = _Open(node_id)
                opened.append(batch)
            batch.indices.append(i)
            batch.bytes += sizes_bytes[i]
        index = stop
    return [Batch(batch.node_id, tuple(batch.indices), batch.bytes) for batch in opened]


class _Open:
    """A batch that may still grow."""

    __slots__ = ("bytes", "indices", "node_id")

    def __init__(self, node_id: NodeId) -> None:
        self.node_id = node_id
        self.indices: list[int] = []
        self.bytes = 0

    def has_room(self, block_bytes: int, batch_bytes: int, batch_blocks: int) -> bool:
        return (self.bytes + block_bytes <= batch_bytes or not self.indices) and len(
            self.indices
        ) < batch_blocks


def _choose(
    start: int,
    sizes_bytes: Sequence[int],
    holders: Sequence[Sequence[NodeId]],
    loads: Mapping[NodeId, float],
    pace: Mapping[NodeId, float],
    *,
    limit: int,
    batch_bytes: int,
) -> tuple[NodeId, int, int]:
    """Of the holders of block `start`, the one with the longest run from there on, within one
    batch and below `limit`; of equal ones the one that is done with it first, then the first.

    Returns it with the end of the run and the bytes of the run.
    """
    best: tuple[NodeId, int, int] | None = None
    best_done = 0.0
    for node_id in holders[start]:
        stop, run_bytes = start + 1, sizes_bytes[start]
        while (
            stop < limit
            and run_bytes + sizes_bytes[stop] <= batch_bytes
            and node_id in holders[stop]
        ):
            run_bytes += sizes_bytes[stop]
            stop += 1
        done = loads.get(node_id, 0.0) + run_bytes * pace.get(node_id, 1.0)
        if best is None or stop > best[1] or (stop == best[1] and done < best_done):
            best, best_done = (node_id, stop, run_bytes), done
    assert best is not None, "a block that nobody holds"
    return best
