"""What travels between EngineCore and its workers inside vLLM's own messages.

EngineCore ──▶ workers   SlotSpec: the slots that a job reads or writes
                         KVRayConnectorMetadata: the step's jobs, and which are void
workers ──▶ EngineCore   KVRayWorkerMetadata: ended jobs, which of them failed, how long they took
                         RankHandshake: what one rank's part of a chunk looks like, once
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

from kvray.core.ids import KEY_BYTES, BlockKey
from kvray.engine.adapters import Loaded


@dataclass(frozen=True, slots=True)
class SlotSpec(LoadStoreSpec):
    """The slots of one job, group by group, in chunk order within a group.

    slots, generations, offsets, slot_bytes: shape (n,). offsets are those of the whole slot, from
    the start of the slab; rank r's part of a slot starts at r times its part_bytes.
    keys: n x 16 bytes. slab_id names the slab that all of this is about; empty for a job that can
    only fail (its NodeStore was lost between look-up and load). wait_ms: of a load, some slots of
    which are not READY yet: how long to wait for them, from the receipt on. 0: all were READY.
    """

    slab_id: bytes
    keys: bytes
    slots: npt.NDArray[np.uint32]
    generations: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    slot_bytes: npt.NDArray[np.uint64]
    wait_ms: int = 0

    def __len__(self) -> int:
        return len(self.slots)

    @classmethod
    def of(
        cls,
        slab_id: bytes,
        keys: Sequence[BlockKey],
        places: Sequence[tuple[int, int, int]],
        slot_bytes: Sequence[int],
        *,
        wait_ms: int = 0,
    ) -> "SlotSpec":
        """places: (slot, generation, offset) for each key."""
        assert len(keys) == len(places) == len(slot_bytes)
        columns = np.array(places, dtype=np.uint64).reshape(len(places), 3)
        return cls(
            slab_id=slab_id,
            keys=b"".join(keys),
            slots=columns[:, 0].astype(np.uint32),
            generations=columns[:, 1].copy(),
            offsets=columns[:, 2].copy(),
            slot_bytes=np.array(slot_bytes, dtype=np.uint64),
            wait_ms=wait_ms,
        )

    @classmethod
    def void(cls) -> "SlotSpec":
        """A job that fails on every rank."""
        return cls.of(b"", [], [], [])

    def keys_from(self, index: int) -> bytes:
        """The keys from the slot at this index on."""
        return self.keys[index * KEY_BYTES :]

    def places(self) -> list[tuple[int, int, int]]:
        return list(
            zip(self.slots.tolist(), self.generations.tolist(), self.offsets.tolist(), strict=True)
        )


@dataclass
class KVRayConnectorMetadata(OffloadingConnectorMetadata):
    """void_before: loads with a smaller job id are reported as failed whenever they end, since
    the weights have changed under them. computes: whether the step runs the model. (Not to be seen
    in the worker: vLLM's V2 model runner, which GPUs have, starts loads when its forward pass has
    been launched and the context of that is gone.)
    """

    void_before: int = 0
    computes: bool = True


@dataclass
class KVRayWorkerMetadata(OffloadingWorkerMetadata):
    """failed_jobs: jobs among completed_jobs whose copy failed on at least one of the ranks that
    this message speaks for. copies: how often a rank's copy took how long, by the name of the
    counter (core.durations.copy_counter). fault: why kvray is off in one of these ranks, if it is.
    adapters: by rank, where they have changed.
    """

    failed_jobs: set[int] = field(default_factory=set)
    copies: dict[str, int] = field(default_factory=dict)
    fault: str | None = None
    adapters: dict[int, Loaded] = field(default_factory=dict)

    @classmethod
    def wrap(
        cls,
        meta: OffloadingWorkerMetadata,
        *,
        failed_jobs: set[int],
        copies: Mapping[str, int],
        fault: str | None = None,
        adapters: Mapping[int, Loaded] | None = None,
    ) -> "KVRayWorkerMetadata":
        known = {f.name: getattr(meta, f.name) for f in fields(OffloadingWorkerMetadata)}
        return cls(
            **known,
            failed_jobs=failed_jobs,
            copies=dict(copies),
            fault=fault,
            adapters=dict(adapters or {}),
        )

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join the reports of two ranks. vLLM's own version would drop what is kvray's."""
        assert isinstance(other, KVRayWorkerMetadata)
        merged = super().aggregate(other)
        assert isinstance(merged, OffloadingWorkerMetadata)
        return KVRayWorkerMetadata.wrap(
            merged,
            failed_jobs=self.failed_jobs | other.failed_jobs,
            copies=Counter(self.copies) + Counter(other.copies),
            fault=self.fault or other.fault,
            adapters=self.adapters | other.adapters,
        )


@dataclass
class RankHandshake(KVConnectorHandshakeMetadata):
    """One rank's view, taken after its caches were registered. part_bytes: for each cache group
    the bytes of one chunk on this rank. host: machine and boot, equal for ranks that share a
    /dev/shm. facts: see engine.facts; why_unnamed: why they do not name what it has loaded.
    """

    rank: int
    part_bytes: tuple[int, ...]
    host: str
    facts: dict[str, Any] = field(default_factory=dict)
    why_unnamed: str = ""
