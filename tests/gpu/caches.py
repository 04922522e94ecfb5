"""Paged KV caches with the shapes, strides and padding of vLLM's, and what its connector would hand
over of them. Nothing of vLLM is imported; what is imitated was read in vLLM 0.32
(offloading/worker.py, register_kv_caches).
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

TYPE_BYTES = {"bf16": 2, "fp8": 1}
TORCH_TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class CacheShape:
    """heads, head_elements: of one token of one layer on one rank, keys and values together.
    groups: cache groups, which share their memory (vLLM hands blocks of one pool to all of them).
    is_block_major: all layers of a block side by side. padding_elements: behind each page.
    """

    name: str
    layers: int
    heads: int
    head_elements: int
    tokens_per_block: int
    blocks_per_chunk: int
    groups: int = 1
    is_block_major: bool = False
    padding_elements: int = 0

    @property
    def page_elements(self) -> int:
        return self.heads * self.tokens_per_block * self.head_elements


LLAMA_8B = CacheShape("Llama-8B", 32, 8, 256, tokens_per_block=16, blocks_per_chunk=8)
LLAMA_8B_256 = CacheShape("Llama-8B, 256-token blocks", 32, 8, 256, 256, blocks_per_chunk=1)
SHAPES = (
    LLAMA_8B,
    CacheShape("Llama-8B, a chunk is a block", 32, 8, 256, 32, blocks_per_chunk=1),
    CacheShape("Llama-8B, block-major", 32, 8, 256, 16, blocks_per_chunk=4, is_block_major=True),
    CacheShape("hybrid", 6, 4, 512, 16, blocks_per_chunk=1, groups=2),
    CacheShape("padded", 6, 4, 512, 16, blocks_per_chunk=1, groups=3, padding_elements=1_024),
    CacheShape("MLA", 61, 1, 576, 64, blocks_per_chunk=2),
    CacheShape("MLA, odd pages", 27, 1, 656, 1, blocks_per_chunk=16),
)


class Caches:
    """One rank's. storage: all of its bytes, on the device."""

    def __init__(self, shape: CacheShape, dtype: str, block_count: int, device: str) -> None:
        self.shape = shape
        self.block_count = block_count
        size = TYPE_BYTES[dtype]
        self.page_bytes = shape.page_elements * size
        stride = (shape.page_elements + shape.padding_elements) * size
        layer_bytes = stride * block_count
        if shape.is_block_major:
            stride, layer_bytes = stride * shape.layers, stride
        self.storage = torch.zeros(
            shape.layers * block_count * (self.page_bytes + shape.padding_elements * size),
            dtype=torch.uint8,
            device=device,
        )
        self._dtype = TORCH_TYPES[dtype]
        self._stride, self._layer_bytes = stride, layer_bytes

    def layer(self, index: int) -> torch.Tensor:
        """(blocks, heads, tokens, elements): what a model gets."""
        shape = self.shape
        typed = self.storage.view(self._dtype)
        size = typed.element_size()
        sizes = self.block_count, shape.heads, shape.tokens_per_block, shape.head_elements
        strides = (
            self._stride // size,
            shape.tokens_per_block * shape.head_elements,
            shape.head_elements,
            1,
        )
        return typed.as_strided(sizes, strides, index * self._layer_bytes // size)

    def pages(self, index: int) -> torch.Tensor:
        """(blocks, bytes) of a layer, without padding."""
        return self.storage.as_strided(
            (self.block_count, self.page_bytes), (self._stride, 1), index * self._layer_bytes
        )

    def canonical(self) -> Any:
        """As vLLM's CanonicalKVCaches."""
        shape = self.shape
        if shape.is_block_major:
            whole = self.storage.view(torch.int8).view(self.block_count, -1)
            refs = [SimpleNamespace(tensor_idx=0, page_size_bytes=whole.shape[1])]
            tensors = [SimpleNamespace(tensor=whole, page_size_bytes=whole.shape[1])]
        else:
            tensors = [
                SimpleNamespace(
                    tensor=self.layer(i)
                    .view(torch.int8)
                    .as_strided(
                        (self.block_count, self._stride), (self._stride, 1), i * self._layer_bytes
                    ),
                    page_size_bytes=self._stride,
                )
                for i in range(shape.layers)
            ]
            refs = [
                SimpleNamespace(tensor_idx=i, page_size_bytes=self.page_bytes)
                for i in range(shape.layers)
            ]
        return SimpleNamespace(tensors=tensors, group_data_refs=[refs] * shape.groups)

    def randomize(self, generator: torch.Generator) -> None:
        """Fresh bytes everywhere, padding too."""
        self.storage.view(torch.int64).random_(generator=generator)
