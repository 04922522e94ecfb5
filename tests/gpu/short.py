"""`python -m tests.gpu.short`: a round trip by each way on a GPU, for compute-sanitizer."""

import torch

from tests.gpu.caches import LLAMA_8B
from tests.gpu.rig import ON_A_GPU, open_rig
from tests.gpu.test_round_trip import BLOCK_COUNT, assert_round_trip, some_blocks


def main() -> None:
    random = torch.Generator(device="cuda")
    for where in ON_A_GPU:
        with open_rig(where, LLAMA_8B, "bf16", blocks=BLOCK_COUNT) as rig:
            assert_round_trip(rig, random, some_blocks(LLAMA_8B, 1), some_blocks(LLAMA_8B, 2))


if __name__ == "__main__":
    main()
