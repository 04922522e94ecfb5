"""The OffloadingSpec that joins kvray's two halves to vLLM's connector.

vLLM makes it by name, with its own OffloadingConfig, once in EngineCore and once in each worker.
"""

import hashlib
import os
from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
)

from kvray.config import EngineConfig
from kvray.engine import metrics
from kvray.engine.canary_rank import RankCanary
from kvray.engine.discovery import is_there, socket_finder
from kvray.engine.lookups import Lookups
from kvray.engine.pieces import group_pages
from kvray.engine.transfers import Transfers
from kvray.engine.workplace import open_copies
from kvray.node.client import WorkerClient

FIRST_SESSION_S = 2.0  # a hello takes ms


def engine_nonce(engine_id: str) -> int:
    """64 bits that EngineCore and its workers derive alike, without asking each other."""
    return int.from_bytes(hashlib.blake2b(engine_id.encode(), digest_size=8).digest(), "little")


class KVRaySpec(OffloadingSpec):
    """See vLLM's OffloadingSpec."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """What Lookups.get_stats may name. Asked in the engine's frontend."""
        del extra_config
        return metrics.definitions()

    def get_manager(self) -> OffloadingManager:
        return Lookups(
            config=EngineConfig.parse(self.extra_config.get("kvray", {})),
            tokens_per_chunk={
                group.group_id if hasattr(group, "group_id") else index: group.tokens_per_block
                * self.blocks_per_chunk
                for index, group in enumerate(self.config.groups)
            },
        )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> Transfers:
        config = EngineConfig.parse(self.extra_config.get("kvray", {}))
        rank = self.config.parallel.rank
        copies = open_copies(kv_caches.tensors[0].tensor.device)
        client = WorkerClient(
            find_socket=socket_finder(config),
            engine_nonce=engine_nonce(self.config.engine_id),
            label=f"{self.config.model.name} rank {rank} pid {os.getpid()}",
            on_session=copies.meet,
        )
        client.start()
        # So that the first job finds its slab mapped. A NodeStore that comes later is met later.
        if is_there(config):
            client.wait_session(FIRST_SESSION_S)
        return Transfers(
            groups=group_pages(kv_caches, blocks_per_chunk=self.blocks_per_chunk),
            rank=rank,
            client=client,
            copies=copies,
            canary=RankCanary(kv_caches, rank=rank),
        )
