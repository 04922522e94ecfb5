"""Extents change their slot size while a peer reads from them: what it takes for a hit is right.

Method: a client on node A stores blocks of ever new sizes, so that A's small slab is cut anew
again and again; a client on node B asks for them meanwhile and compares every byte of each hit.
"""

import ctypes
import hashlib
from collections.abc import Iterator

import pytest

from kvray.core.ids import BlockKey
from kvray.core.messages import Grant, KeyState
from tests.block_client import Client
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy]

SLAB_BYTES = 8 << 20
EXTENT_BYTES = 1 << 20
SIZES = [40_000 + 20_000 * step for step in range(12)]
BLOCKS_A_SIZE = 24
DEADLINE_MS = 5_000


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2, slab_bytes=SLAB_BYTES, extent_bytes=EXTENT_BYTES) as running:
        yield running


def payload_of(key: BlockKey, size: int) -> bytes:
    return hashlib.shake_128(key).digest(size)


def store(client: Client, keys: list[BlockKey], size: int) -> None:
    """Those of the blocks for which there is room."""
    client.client.begin_step()
    reserved = client.client.reserve(keys, run_lengths=[len(keys)], run_slot_bytes=[size])
    assert reserved is not None
    for index, place in reserved.places.items():
        assert reserved.grants[index] == Grant.GRANTED
        ctypes.memmove(client.slab().address + place[2], payload_of(keys[index], size), size)
    client.client.commit(reserved.slab_id, list(reserved.places.values()))


def right_hits(client: Client, keys: list[BlockKey], size: int) -> int:
    client.client.begin_step()
    ticket = client.client.lookup(
        keys,
        run_lengths=[len(keys)],
        run_is_prefix=[False],
        run_slot_bytes=[size],
        deadline_ms=DEADLINE_MS,
    )
    assert ticket is not None
    wait_until(lambda: ticket.settled, what="the answer")
    hits = 0
    for index, key in enumerate(keys):
        place = ticket.place(index)
        if ticket.states[index] == KeyState.HIT:
            assert place is not None
            assert ctypes.string_at(client.slab().address + place[2], size) == payload_of(key, size)
            hits += 1
    client.client.unpin(ticket)
    return hits


def test_a_peer_never_takes_a_block_out_of_an_extent_that_was_cut_anew(nodes: Nodes) -> None:
    a, b = (Client(nodes.cluster, node_id) for node_id in nodes.node_ids)
    try:
        hits = 0
        asked: list[tuple[list[BlockKey], int]] = []
        for size in SIZES:
            keys = a.keys(*(f"{size} {number}" for number in range(BLOCKS_A_SIZE)))
            store(a, keys, size)
            asked.append((keys, size))
            # Not waited for: some are listed, some of the older ones are gone, some are going now.
            hits += sum(right_hits(b, *question) for question in asked[-3:])
        assert hits > BLOCKS_A_SIZE
        assert nodes.status(0)["store"]["recut"] > 0
    finally:
        a.close()
        b.close()
