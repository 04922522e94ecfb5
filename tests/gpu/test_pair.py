"""Goal: blocks come from a peer's slab into this one and on to the device while later ones are
still coming, byte for byte; and a process that has a slab and NIXL, as a NodeStore does, has no
CUDA context. Method: two processes, two slabs, real NIXL.
"""

import importlib.util

import numpy as np
import pytest
import torch

from tests.gpu.caches import LLAMA_8B_256, CacheShape
from tests.gpu.rig import Blocks, Rig, Where, geometry_for, open_rig
from tests.gpu.test_round_trip import WHERES

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed"),
]

BLOCKS = 6
SHAPE = CacheShape("Llama-8B, 64-token blocks", 32, 8, 256, 64, blocks_per_chunk=1)


@pytest.mark.parametrize("where", WHERES[:2], ids=str)
def test_blocks_of_a_peer_reach_the_device(where: Where) -> None:
    from tests.gpu.pair import Reader, block_bytes, fetch_and_load, running_peer

    with open_rig(where, SHAPE, "bf16", blocks=BLOCKS + 2) as rig:
        (size,) = {*rig.slot_bytes(all_blocks())}
        with running_peer(geometry_for(size, BLOCKS), size, BLOCKS, seed=5) as peer:
            assert not peer.has_context, "slab and NIXL have made a CUDA context"
            reader = Reader(rig, peer)
            places = rig.slab.reserve([size] * BLOCKS)
            fetch_and_load(rig, reader, all_blocks(), places)
            reader.close()
        for index, block in enumerate(all_blocks().ids[0].tolist()):
            wanted = np.frombuffer(block_bytes(5, index, size), np.uint8).copy()
            assert torch.equal(block_of(rig, block), torch.from_numpy(wanted))


def all_blocks() -> Blocks:
    return Blocks((np.arange(BLOCKS, dtype=np.int32)[::-1].copy() + 2,), (0,))


def block_of(rig: Rig, block: int) -> torch.Tensor:
    """Its pages, layer after layer, as they lie in a slot."""
    (cache,) = rig.caches
    pages = [cache.pages(layer)[block].cpu() for layer in range(cache.shape.layers)]
    return torch.cat(pages)


def test_the_shape_of_the_benchmark_is_the_one_that_it_says() -> None:
    """Llama-8B: 128 KiB a token over all layers, in bf16."""
    assert LLAMA_8B_256.page_elements * 2 * 32 == 256 * 128 * 1024
