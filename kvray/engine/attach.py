"""Putting the connector into an engine that already runs, and taking it out again.

The functions in DOORS become methods of vLLM's EngineCore (see plugin) and are called by name
through vLLM's utility calls, which run between two steps on EngineCore's own thread. They do what
Scheduler.__init__ and the workers' start would have done with a configured connector.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from kvray.engine import hooks, support, versions
from kvray.engine.arguments import transfer_settings
from kvray.errors import ConfigError, NotAttachedError

logger = logging.getLogger("kvray.engine")

# ---- in EngineCore; `self` is vLLM's EngineCore


def kvray_attach(self: Any, kvray: dict[str, Any]) -> dict[str, Any]:
    """Returns {"engine_pid", "worker_pids"} or {"error": text}; an error changes nothing.

    Errors travel as text, since vLLM's utility calls know only text.
    """
    try:
        return _attach(self, kvray)
    except (NotAttachedError, ConfigError) as exc:
        return {"error": str(exc), "kind": type(exc).__name__}


def _attach(core: Any, kvray: dict[str, Any]) -> dict[str, Any]:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    scheduler, vllm_config = core.scheduler, core.vllm_config
    versions.require_tested(versions.installed_version())
    if scheduler.connector is not None:
        if getattr(scheduler.connector, "is_kvray", False):
            return kvray_stats(core) | {"already": True}
        raise NotAttachedError(
            f"this engine has a KV connector already ({type(scheduler.connector).__name__}); "
            "kvray can not be added to another connector"
        )
    if scheduler.has_unfinished_requests() or getattr(core, "batch_queue", None):
        raise NotAttachedError(
            f"this engine is busy ({scheduler.get_num_unfinished_requests()} requests); attach "
            "needs an engine without requests under way. Wait for them, or call kvray.enable() "
            "before the engine is made"
        )
    support.require_supported(vllm_config, scheduler.kv_cache_config)
    settings = transfer_settings(kvray | {"attached": True})
    transfer = KVTransferConfig(**settings)
    settings["engine_id"] = transfer.engine_id
    hasher_was = core.request_block_hasher
    before = {name: getattr(scheduler, name) for name in versions.SCHEDULER_SETTINGS}
    vllm_config.kv_transfer_config = transfer
    versions.ensure_block_hasher(core)
    try:
        pids = core.model_executor.collective_rpc(worker_attach, args=(settings,))
        connector = KVConnectorFactory.create_connector(
            vllm_config, KVConnectorRole.SCHEDULER, scheduler.kv_cache_config
        )
    except Exception:
        core.model_executor.collective_rpc(worker_detach)
        core.request_block_hasher = hasher_was
        vllm_config.kv_transfer_config = None
        raise
    if hooks.weight_changes(core):
        connector.renew(tainted=versions.may_reuse(scheduler.kv_cache_manager.block_pool))
    scheduler.recompute_kv_load_failures = True
    if vllm_config.max_concurrent_batches > 1:
        scheduler.defer_block_free = True
    scheduler.requires_kv_delivery = connector.requires_kv_delivery
    versions.bind_scheduler(connector, scheduler)
    scheduler.connector = connector
    core.model_executor.init_kv_output_aggregator(connector)
    content: dict[Any, Any] = {}
    for ranks in core.model_executor.get_kv_connector_handshake_metadata() or ():
        content.update(ranks or {})
    connector.set_xfer_handshake_metadata_pp_aware(content)
    if hooks.weight_changes(core):
        hooks.after_change(core)
    hooks.tell_adapters(core)
    core._kvray_before = (before, hasher_was)  # noqa: SLF001 (our own mark)
    connector.prove(core)
    logger.info("kvray: attached to engine %d with workers %s", os.getpid(), pids)
    return {"engine_pid": os.getpid(), "worker_pids": pids}


def kvray_drain(self: Any) -> int:
    """From now on nothing is looked up or stored, and no request waits for an answer; returns how
    much is still under way. The engine goes on stepping while that is more than zero.
    """
    connector = _connector(self)
    connector.lookups.drain()
    versions.promote_loaded(self.scheduler)
    loading = len(versions.loading_requests(self.scheduler))
    return max(loading, int(connector.pending()))


def kvray_detach(self: Any, at_any_rate: bool = False) -> int:  # noqa: FBT001, FBT002 (a utility call)
    """Take the connector out, once nothing is under way; returns how much is, and if that is more
    than zero, nothing else was done.

    at_any_rate: the caller waits no longer. The workers end what they copy, and what was loaded is
    computed: without a connector nobody would hear of it, and it would wait for ever.
    """
    connector = _connector(self)
    scheduler = self.scheduler
    left = kvray_drain(self)
    if left and not at_any_rate:
        return left
    before, hasher_was = self._kvray_before
    self.model_executor.collective_rpc(worker_detach)
    if left:
        logger.warning("kvray: %d copies or loads are given up by a detach", left)
        connector.lose_jobs()
        versions.fail_loads(self)
    connector.end_canary(self)
    connector.shutdown()
    scheduler.connector = None
    for name, value in before.items():
        setattr(scheduler, name, value)
    self.request_block_hasher = hasher_was
    self.vllm_config.kv_transfer_config = None
    self.model_executor.kv_output_aggregator = None
    logger.info("kvray: detached from engine %d", os.getpid())
    return 0


def kvray_stats(self: Any) -> dict[str, Any]:
    """Counters and state of this engine's kvray, for Attachment.stats()."""
    return dict(_connector(self).stats())


def kvray_name_weights(self: Any, version: str) -> None:
    """An operator's word that the weights of now are `version`: engines that were told the same
    share blocks. Call it after the weights changed and before requests come.
    """
    connector = _connector(self)
    connector.renew(f"named:{version}", tainted=connector.is_tainted())
    connector.prove(self)


def _connector(core: Any) -> Any:
    connector = core.scheduler.connector
    if not getattr(connector, "is_kvray", False):
        raise NotAttachedError("kvray is not attached to this engine")
    return connector


DOORS: dict[str, Callable[..., Any]] = {
    "kvray_attach": kvray_attach,
    "kvray_drain": kvray_drain,
    "kvray_detach": kvray_detach,
    "kvray_stats": kvray_stats,
    "kvray_name_weights": kvray_name_weights,
}


# ---- in each worker; `worker` is vLLM's worker or its wrapper


def worker_attach(worker: Any, settings: dict[str, Any]) -> int:
    """Make the worker's half of the connector and give it the caches. Returns the pid."""
    from vllm.config import KVTransferConfig, set_current_vllm_config
    from vllm.distributed.kv_transfer import (
        ensure_kv_transfer_initialized,
        get_kv_transfer_group,
        has_kv_transfer_group,
    )
    from vllm.distributed.kv_transfer.kv_connector.utils import copy_kv_blocks

    inner = getattr(worker, "worker", worker)
    runner, vllm_config = inner.model_runner, inner.vllm_config
    assert not has_kv_transfer_group()
    vllm_config.kv_transfer_config = KVTransferConfig(**settings)
    with set_current_vllm_config(vllm_config):
        ensure_kv_transfer_initialized(vllm_config, runner.kv_cache_config)
    context = vllm_config.compilation_config.static_forward_context
    caches = {
        name: context[name].kv_cache
        for group in runner.kv_cache_config.kv_cache_groups
        for name in group.layer_names
    }
    if getattr(inner, "use_v2_model_runner", False):
        from vllm.v1.worker.gpu.kv_connector import get_kv_connector

        runner.kv_connector = get_kv_connector(vllm_config, caches)  # registers the caches
    else:
        connector = get_kv_transfer_group()
        connector.register_kv_caches(caches)
        connector.set_host_xfer_buffer_ops(copy_kv_blocks)
    return os.getpid()


def worker_detach(worker: Any) -> int:
    """Undo worker_attach, whether it came to its end or not."""
    import vllm.distributed.kv_transfer.kv_transfer_state as state

    inner = getattr(worker, "worker", worker)
    connector = state._KV_CONNECTOR_AGENT  # noqa: SLF001 (vLLM has no call that unsets it)
    state._KV_CONNECTOR_AGENT = None  # noqa: SLF001
    inner.vllm_config.kv_transfer_config = None
    if connector is not None:
        connector.shutdown()
    if getattr(inner, "use_v2_model_runner", False):
        from vllm.v1.worker.gpu.kv_connector import get_kv_connector

        inner.model_runner.kv_connector = get_kv_connector(inner.vllm_config, {})
    return os.getpid()
