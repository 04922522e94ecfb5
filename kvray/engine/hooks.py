"""Hooks in EngineCore for what vLLM does not tell its connector: that the weights change, that an
adapter is loaded between two steps, and that a step is about to begin (engine.steps).

update_weights and reload_weights are plain collective_rpc calls, sleep drops or moves the weights,
and an operator's own worker extension has names of its own. So EngineCore's doors are wrapped, by
class and once per process, and every call whose name speaks of weights renews the namespace
*before* it runs: new weights never meet old KV, and a false alarm costs misses only. *After* it the
workers are asked what they have now (see engine.weights).
"""

import functools
import logging
from typing import Any

from kvray.engine import steps, versions
from kvray.engine.adapter_watch import loaded_with
from kvray.engine.adapters import Loaded
from kvray.engine.weights import Weights, measured_again

logger = logging.getLogger("kvray.engine")

# Calls that can change weights though their names do not say so, and that only read them.
CHANGING = frozenset({"apply_model", "load_model", "sleep", "checkpoint_restore"})
# Calls after which a change is not over yet: there is nothing to name.
UNFINISHED = frozenset(
    {"start_weight_update", "start_draft_weight_update", "update_weights", "sleep"}
)
READING = frozenset({"compute_weight_checksums", "get_weight_version", "get_weights_info"})


def changes_weights(method: Any) -> bool:
    """Whether a collective_rpc of this name, or of this function, may change the weights."""
    name = method if isinstance(method, str) else getattr(method, "__name__", "")
    return name not in READING and ("weight" in name.lower() or name in CHANGING)


def install() -> None:
    """Wrap EngineCore's doors in this process; a second call does nothing."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    if getattr(EngineCore, "_kvray_hooked", False):
        return
    EngineCore._kvray_hooked = True  # noqa: SLF001 (our own mark)
    _wrap_collective_rpc(EngineCore)
    _wrap_sleep(EngineCore)
    _wrap_wake_up(EngineCore)
    steps.prove_after(EngineCore, "reset_prefix_cache")  # it may have renamed all blocks
    _wrap_add_lora(EngineCore)
    _wrap_reset(Scheduler)
    steps.install()


def weight_changes(engine_core: Any) -> int:
    """How often this engine's weights may have changed since its start: what an attach that
    comes later must know.
    """
    return int(getattr(engine_core, "_kvray_weight_changes", 0))


def _before_change(engine_core: Any) -> None:
    from kvray.engine.connector import KVRayConnector

    engine_core._kvray_weight_changes = weight_changes(engine_core) + 1  # noqa: SLF001
    connector = engine_core.scheduler.connector
    if isinstance(connector, KVRayConnector):
        connector.renew(tainted=connector.is_tainted())


def after_change(engine_core: Any) -> None:
    """Name what the workers have now, as far as they can tell."""
    from kvray.engine.connector import KVRayConnector

    connector = engine_core.scheduler.connector
    if (
        not isinstance(connector, KVRayConnector)
        or connector.is_named
        or versions.is_asleep(engine_core)
    ):
        return
    ranks = engine_core.model_executor.collective_rpc(worker_weights)
    connector.measured(ranks, tainted=connector.is_tainted())


def worker_weights(worker: Any) -> Weights:
    """In each worker: what it has loaded by now."""
    inner = getattr(worker, "worker", worker)
    return measured_again(_layers_of(inner))


def worker_adapters(worker: Any) -> dict[int, Loaded]:
    """In each worker: its adapters, by its rank."""
    inner = getattr(worker, "worker", worker)
    return {inner.vllm_config.parallel_config.rank: loaded_with(_layers_of(inner))}


def _layers_of(worker: Any) -> list[Any]:
    """Those that have caches; none before there are any."""
    config = getattr(worker.model_runner, "kv_cache_config", None)
    groups = config.kv_cache_groups if config is not None else ()
    names = [name for group in groups for name in group.layer_names]
    return list(versions.attention_layers(worker.vllm_config, names).values())


def tell_adapters(engine_core: Any) -> None:
    """An adapter was loaded between two steps: what the workers have now is known at once."""
    from kvray.engine.connector import KVRayConnector

    connector = engine_core.scheduler.connector
    if isinstance(connector, KVRayConnector):
        ranks: dict[int, Loaded] = {}
        for said in engine_core.model_executor.collective_rpc(worker_adapters):
            ranks |= said
        connector.adapters_loaded(ranks)


def _wrap_add_lora(engine_core_class: Any) -> None:
    original = engine_core_class.add_lora

    @functools.wraps(original)
    def add_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        tell_adapters(self)
        return answer

    engine_core_class.add_lora = add_lora


def _wrap_collective_rpc(engine_core_class: Any) -> None:
    original = engine_core_class.collective_rpc

    @functools.wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not changes_weights(method):
            return original(self, method, *args, **kwargs)
        _before_change(self)
        answer = original(self, method, *args, **kwargs)
        if method not in UNFINISHED:
            after_change(self)
        steps.prove(self)
        return answer

    engine_core_class.collective_rpc = collective_rpc


def _wrap_sleep(engine_core_class: Any) -> None:
    original = engine_core_class.sleep

    @functools.wraps(original)
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level >= 1:  # level 0 pauses the scheduler only
            _before_change(self)
        return original(self, level, *args, **kwargs)

    engine_core_class.sleep = sleep


def _wrap_wake_up(engine_core_class: Any) -> None:
    original = engine_core_class.wake_up

    @functools.wraps(original)
    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        after_change(self)
        steps.prove(self)
        return answer

    engine_core_class.wake_up = wake_up


def _wrap_reset(scheduler_class: Any) -> None:
    """After a reset that succeeded the device has nothing of the old weights any more."""
    original = scheduler_class.reset_prefix_cache

    @functools.wraps(original)
    def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvray.engine.connector import KVRayConnector

        answer = original(self, *args, **kwargs)
        connector = self.connector
        if isinstance(connector, KVRayConnector):
            connector.untaint()
        return answer

    scheduler_class.reset_prefix_cache = reset_prefix_cache
