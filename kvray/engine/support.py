"""Which engines kvray takes, and which settings of vLLM it needs. Refuses by name, early."""

from collections.abc import Sequence
from typing import Any

from kvray.config import EngineConfig
from kvray.engine import versions
from kvray.engine.arguments import LOAD_FAILURE_POLICY, UNTESTED_PARALLEL, is_untested_cache
from kvray.engine.jobs import RankHandshake
from kvray.engine.workplace import is_rocm
from kvray.errors import NotAttachedError

CHUNK_TOKENS = 128  # default chunk where device blocks are smaller: a slot of some MB, not of KB
CHUNK_SETTINGS = ("block_size", "blocks_per_chunk")  # vLLM's, in kv_connector_extra_config


def require_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises NotAttachedError naming each feature of this engine that was not tested."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    found = [
        f"{name}={getattr(parallel, name)}"
        for name in UNTESTED_PARALLEL
        if getattr(parallel, name, 1) > 1
    ]
    # vLLM makes each rank of a dense model an engine of its own, with a size of 1.
    if parallel.data_parallel_size > 1:
        found.append(
            "data parallelism of a mixture of experts, whose ranks step together "
            f"(data_parallel_size={parallel.data_parallel_size})"
        )
    if vllm_config.speculative_config is not None:
        found.append("speculative decoding")
    if is_untested_cache(cache.cache_dtype):
        found.append(f"kv_cache_dtype={cache.cache_dtype}")
    require_copies(getattr(vllm_config, "device_config", None))
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if type(spec) not in versions.shown_specs():
            found.append(f"cache groups of kind {type(spec).__name__}")
        elif spec.kv_quant_mode:
            found.append(f"a cache quantised by {spec.kv_quant_mode.name}")
        elif getattr(spec, "non_causal", False):
            found.append("non-causal attention layers")
    if found:
        raise NotAttachedError(
            f"kvray was not tested with {', '.join(sorted(set(found)))}, so it refuses to cache "
            "for this engine. Run it without kvray, or without that feature"
        )


def require_copies(device_config: Any) -> None:
    """Raises NotAttachedError for a device that kvray has no copies for. device_config: vLLM's."""
    kind = str(getattr(device_config, "device_type", "cpu"))
    if kind == "cpu":
        return
    if kind != "cuda" or is_rocm():
        name = "ROCm" if kind == "cuda" else kind
        raise NotAttachedError(
            f"kvray copies between its slab and CPUs or NVIDIA GPUs; this engine runs on {name}. "
            "Run it without kvray"
        )


def engine_config(vllm_config: Any) -> EngineConfig:
    """kvray's own settings out of kv_connector_extra_config["kvray"].

    Raises ConfigError for an unknown key.
    """
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    return EngineConfig.parse(extra.get("kvray", {}))


def prepare_settings(vllm_config: Any, kv_cache_config: Any) -> None:
    """Set what kvray needs where vLLM reads it later. Runs in EngineCore and in each worker, and
    must come to the same in all of them.
    """
    transfer = vllm_config.kv_transfer_config
    config = engine_config(vllm_config)
    transfer.kv_load_failure_policy = LOAD_FAILURE_POLICY
    name_spec(vllm_config)
    extra = transfer.kv_connector_extra_config
    # The next turn of a conversation contains the answer; vLLM stores prompts only by default.
    extra["offload_prompt_only"] = not config.store_answers
    specs = [
        kv_cache_config.kv_cache_groups[group].kv_cache_spec
        for group in versions.offloaded_group_ids(kv_cache_config)
    ]
    has_window = any(versions.has_window(spec) for spec in specs)
    if chosen := [name for name in CHUNK_SETTINGS if name in extra]:
        if has_window and extra.get("blocks_per_chunk") != 1:
            raise NotAttachedError(
                f"{' and '.join(f'{name}={extra[name]}' for name in chosen)} in "
                "kv_connector_extra_config: this model has sliding-window attention, and a chunk "
                "of several device blocks may have left its window in part. Leave that setting "
                "out, or give blocks_per_chunk=1"
            )
        return
    if has_window or len(specs) > 1:
        extra["blocks_per_chunk"] = 1
    else:
        chunk_tokens = config.chunk_tokens or CHUNK_TOKENS
        extra["blocks_per_chunk"] = max(1, chunk_tokens // specs[0].block_size)


def name_spec(vllm_config: Any) -> None:
    """Where vLLM finds KVRaySpec."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra["spec_name"] = "KVRaySpec"
    extra["spec_module_path"] = "kvray.engine.spec"


def runs_uncached(kv_cache_config: Any) -> str | None:
    """Why this engine is served but not cached; None if it is cached."""
    if len(kv_cache_config.kv_cache_groups) > 1 and not versions.reports_failed_requests():
        return (
            f"vLLM {versions.installed_version()} can not report a failed load of a model with "
            "several cache groups (hybrid attention); 0.32 can"
        )
    return None


def mismatch(ranks: Sequence[RankHandshake], world_size: int) -> str | None:
    """Why these ranks can not share a slot; None if they can."""
    if len(ranks) != world_size:
        return f"{len(ranks)} of {world_size} ranks have said hello"
    if len({rank.host for rank in ranks}) > 1:
        return "its ranks are on several hosts, and a slot lies on one"
    if len({rank.part_bytes for rank in ranks}) > 1:
        parts = {rank.rank: rank.part_bytes for rank in ranks}
        return f"its ranks hold different amounts of a chunk: {parts}"
    if 0 in ranks[0].part_bytes:
        return "a chunk has no bytes on its ranks"
    return None


def is_shareable(request: Any) -> bool:
    """Whether vLLM's block hashes cover all that makes this request's KV. Images and the like
    are hashed by content only in some settings, or under ids that the caller chose; such requests
    go without kvray, and so do prompts given as embeddings.
    """
    return not request.mm_features and getattr(request, "prompt_embeds", None) is None
