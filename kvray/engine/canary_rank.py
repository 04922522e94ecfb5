"""A rank's half of the canary: what it has computed for the fixed prompt (see canary).

    device blocks ──take──▶ a copy in host memory ──▶ digest; how far it is from the copy before it
                                   └──write──▶ this rank's part of slots of the slab

Called through EngineCore's collective_rpc, so on the worker's own thread and between two steps:
what the step before it has computed is there, and nothing is written meanwhile.
"""

import ctypes
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvray.core.canary import RankSaw
from kvray.engine import versions
from kvray.engine.jobs import SlotSpec
from kvray.node.mapped import MappedSlab

Chunks = Sequence[Sequence[Sequence[int]]]  # by cache group and chunk the ids of device blocks

# What a chunk of the canary is compared in. Another kind of cache is refused by support.
FLOATS = ("bfloat16", "float16", "float32")
# By which an operator has libraries do without instructions that a host has.
KERNEL_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank says of one round."""

    rank: int
    saw: RankSaw


class RankCanary:
    """kv_caches: vLLM's CanonicalKVCaches, tensors of shape (blocks, page bytes)."""

    def __init__(self, kv_caches: Any, *, rank: int) -> None:
        self._rank = rank
        self._layers = [
            [(kv_caches.tensors[ref.tensor_idx].tensor, ref.page_size_bytes) for ref in refs]
            for refs in kv_caches.group_data_refs
        ]
        self._kept: list[list[Any]] = []  # by group and chunk: uint8 in host memory

    def take(self, chunks: Chunks, dtypes: Sequence[str], *, keep: bool) -> RankReport:
        """Read the chunks of a canary that was just computed. keep: as those that `write` writes
        and that later ones are measured against.

        The distance is the largest relative error of a layer: the norm of the difference over the
        norm of what was kept. dtypes: of each group's numbers, one of FLOATS.
        """
        import xxhash

        fresh = [
            [_part(layers, blocks) for blocks in group]
            for layers, group in zip(self._layers, chunks, strict=True)
        ]
        digest = xxhash.xxh3_64()
        for group in fresh:
            for part in group:
                digest.update(part.numpy())
        distance = 0.0
        if keep:
            self._kept = fresh
        elif self._kept:
            distance = max(
                (
                    _distance(part, kept, dtype, layer_count=len(layers))
                    for layers, dtype, group, group_kept in zip(
                        self._layers, dtypes, fresh, self._kept, strict=True
                    )
                    for part, kept in zip(group, group_kept, strict=True)
                ),
                default=0.0,
            )
        counts = tuple(len(layers) for layers in self._layers)
        saw = RankSaw(digest.digest(), distance, counts, machine_facts())
        return RankReport(self._rank, saw)

    def write(self, slab: MappedSlab, spec: SlotSpec, chunks: Sequence[int]) -> bool:
        """Put this rank's part of these kept chunks into their slots. chunks: their numbers,
        counted through all groups; one for each slot of spec. False if the slots do not fit.
        """
        kept = [part for group in self._kept for part in group]
        if not all(chunk < len(kept) for chunk in chunks):
            return False
        parts = [kept[chunk] for chunk in chunks]
        if len(parts) != len(spec) or not slab.contains(spec.offsets, spec.slot_bytes):
            return False
        for part, offset, slot_bytes in zip(
            parts, spec.offsets.tolist(), spec.slot_bytes.tolist(), strict=True
        ):
            first = self._rank * part.numel()
            if first + part.numel() > slot_bytes:
                return False
            ctypes.memmove(slab.address + offset + first, part.data_ptr(), part.numel())
        return True


def machine_facts() -> dict[str, Any]:
    """What of this process decides how its numbers are rounded, as far as it is known. Too much of
    it only makes like engines allow each other some noise; too little has engines that round
    otherwise held to the bit, and told apart for it.
    """
    import torch

    return {
        "vllm": versions.installed_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        # vLLM and oneDNN have kernels of their own for a host with bf16 instructions, or with AMX.
        "instructions": [
            name
            for name in sorted(vars(torch.cpu))
            if name.startswith("_is_") and getattr(torch.cpu, name)()
        ],
        "limits": {name: os.environ[name] for name in KERNEL_LIMITS if name in os.environ},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    """Libraries choose their kernels by who has made a CPU, too. A hypervisor's name for it says
    less than its family and model.
    """
    said: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            said.setdefault(name.strip(), value.strip())
    known = [said[name] for name in ("model name", "cpu family", "model") if name in said]
    return ", ".join(known) or platform.processor() or platform.machine()


def _part(layers: Sequence[tuple[Any, int]], blocks: Sequence[int]) -> Any:
    """A chunk as it lies in a slot: layer by layer, and of each layer block by block."""
    import torch

    pages = [tensor[list(blocks), :page_bytes].reshape(-1) for tensor, page_bytes in layers]
    return torch.cat(pages).view(torch.uint8).cpu()


def _distance(part: Any, kept: Any, dtype: str, *, layer_count: int) -> float:
    import torch

    if torch.equal(part, kept):
        return 0.0
    shape = (layer_count, -1)
    numbers, others = (x.view(getattr(torch, dtype)).reshape(shape).float() for x in (part, kept))
    scale = others.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    distance = float(((numbers - others).norm(dim=1) / scale).max())
    return distance if math.isfinite(distance) else math.inf


# ---- in each worker; `worker` is vLLM's worker or its wrapper


def rank_take(
    worker: Any,
    chunks: Chunks,
    dtypes: Sequence[str],
    keep: bool,  # noqa: FBT001 (collective_rpc)
) -> RankReport:
    del worker
    report: RankReport = _transfers().canary.take(chunks, dtypes, keep=keep)
    return report


def rank_write(worker: Any, spec: SlotSpec, chunks: Sequence[int]) -> bool:
    """Whether this rank's part of these chunks is in these slots."""
    del worker
    return bool(_transfers().write_canary(spec, chunks))


def _transfers() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().transfers
