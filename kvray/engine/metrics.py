"""kvray's part of vLLM's own metrics: where an engine's prompt tokens came from, and why not.

    TokenCounts ──every step──▶ Lookups.get_stats ──vLLM──▶ its log, and its Prometheus endpoint

vLLM asks its offloading manager for statistics, and the spec for what they are; of copies and
look-ups it counts by itself (vllm:kv_offload_*). Names are those of core.reasons. Engines that have
had the connector from their construction only: see KVRayConnector.get_kv_connector_stats.
"""

from collections.abc import Mapping

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingMetricMetadata

from kvray.core.reasons import tokens_by_reason, tokens_by_source

PROMPT_TOKENS = "vllm:kvray_prompt_tokens"
COMPUTED_TOKENS = "vllm:kvray_computed_tokens"


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """See OffloadingSpec.build_metric_definitions. Four sources, and some twenty reasons."""
    return {
        PROMPT_TOKENS: OffloadingCounterMetadata(
            documentation="Prompt tokens by source: device, local, peer, computed.",
            labelnames=("source",),
        ),
        COMPUTED_TOKENS: OffloadingCounterMetadata(
            documentation="Prompt tokens that were computed, by the reason why.",
            labelnames=("reason",),
        ),
    }


def stats_of(tokens: Mapping[str, int]) -> OffloadingConnectorStats:
    """tokens: by the counters of engine.sources."""
    stats = OffloadingConnectorStats()
    for source, count in tokens_by_source([tokens]).items():
        if count:
            stats.increase_counter(PROMPT_TOKENS, count, (source,))
    for reason, count in tokens_by_reason([tokens]).items():
        stats.increase_counter(COMPUTED_TOKENS, count, (reason,))
    return stats
