"""vLLM's own arguments, as far as kvray has a word in them. Needs no vLLM: whoever describes an
engine may do that on a machine that has none.
"""

from typing import Any

CONNECTOR = {
    "kv_connector": "KVRayConnector",
    "kv_connector_module_path": "kvray.engine.connector",
    "kv_role": "kv_both",
}
LOAD_FAILURE_POLICY = "recompute"  # a load that fails is a miss

# Ways to be parallel that were not tested: each must be 1. Fields of vLLM's ParallelConfig, and
# engine arguments of the same names.
UNTESTED_PARALLEL = (
    "data_parallel_size",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)


def transfer_settings(kvray: dict[str, Any]) -> dict[str, Any]:
    """KVTransferConfig's arguments for an engine with these settings (EngineConfig's keys)."""
    return {
        **CONNECTOR,
        "kv_load_failure_policy": LOAD_FAILURE_POLICY,
        "kv_connector_extra_config": {"kvray": kvray},
    }


def is_untested_cache(dtype: object) -> bool:
    """Of the KV cache, as vLLM's kv_cache_dtype."""
    return "fp8" in str(dtype)
