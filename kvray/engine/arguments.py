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
# engine arguments of the same names. Data parallelism is not among them: whether its ranks are
# engines of their own is told by the model (see engine.support).
UNTESTED_PARALLEL = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)

# Of vLLM's CacheDType, those whose blocks were seen to come back equal. All else is refused, names
# of later releases included.
SHOWN_CACHE_DTYPES = ("auto", "bfloat16", "float16")


def transfer_settings(kvray: dict[str, Any]) -> dict[str, Any]:
    """KVTransferConfig's arguments for an engine with these settings (EngineConfig's keys)."""
    return {
        **CONNECTOR,
        "kv_load_failure_policy": LOAD_FAILURE_POLICY,
        "kv_connector_extra_config": {"kvray": kvray},
    }


def is_untested_cache(dtype: object) -> bool:
    """Of the KV cache, as vLLM's kv_cache_dtype; None is vLLM's default, "auto"."""
    return dtype is not None and str(dtype) not in SHOWN_CACHE_DTYPES
