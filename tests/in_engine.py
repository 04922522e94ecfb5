"""What tests run inside an engine's client process, through Engine.call.

For an engine in one process (Mode.IN_PROCESS) EngineCore and the worker are there too, so faults
can be planted at the seams: an Executor that fails, a header that changes.
"""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kvray.core.direction import Direction
from kvray.core.layout import HEADER_BYTES, SLOT_HEADER_DTYPE
from kvray.engine.copier import CopyEnd, Executor
from kvray.engine.raw_copy import Pointers

MAX_SETTLE_ROUNDS = 2_000  # 2 ms each
SETTLE_POLL_S = 0.002


def attach(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """kvray.attach as a user calls it; several calls are one."""
    import kvray

    attachment = kvray.attach(llm, **settings)
    _attachments[id(llm)] = attachment
    return stats(llm)


async def attach_async(llm: Any, settings: dict[str, Any]) -> dict[str, int]:
    import kvray

    attachment = await kvray.attach(llm, **settings)
    _attachments[id(llm)] = attachment
    counters: dict[str, int] = (await attachment.stats()).counters
    return counters


async def stats_async(llm: Any) -> dict[str, int]:
    counters: dict[str, int] = (await _attachments[id(llm)].stats()).counters
    return counters


def detach(llm: Any) -> None:
    _attachments.pop(id(llm)).detach()


def stats(llm: Any) -> dict[str, Any]:
    """kvray_stats of the engine, however it got its connector."""
    found = _stats_with_fields(llm)
    found.pop("fields")
    found["slot_bytes"] = {str(k): v for k, v in found["slot_bytes"].items()}
    return found


def fields(llm: Any) -> dict[str, Any]:
    """What the namespace is the digest of."""
    found: dict[str, Any] = _stats_with_fields(llm)["fields"]
    return found


def _stats_with_fields(llm: Any) -> dict[str, Any]:
    core = llm.llm_engine.engine_core
    if hasattr(core, "call_utility"):
        found: dict[str, Any] = core.call_utility("kvray_stats")
        return found
    from kvray.engine.attach import kvray_stats

    return kvray_stats(core.engine_core)


def settle(llm: Any) -> dict[str, Any]:
    """Returns the stats once nothing is under way any more: all stores are committed or given up,
    and the NodeStore has said that it knows.
    An engine in this process steps only when it is told to."""
    core = llm.llm_engine.engine_core
    if not hasattr(core, "call_utility"):
        core.engine_core.step()  # offers the last chunk of a request that has just ended
    found = stats(llm)
    for _ in range(MAX_SETTLE_ROUNDS):
        found = stats(llm)
        if not found["pending"] and not found["unacknowledged"]:
            return found
        if not hasattr(core, "call_utility"):
            core.engine_core.step()
        time.sleep(SETTLE_POLL_S)
    message = f"not settled: {found}"
    raise TimeoutError(message)


def change_weights_unseen(llm: Any) -> None:
    """A function of an operator's own, whose name speaks of weights."""

    def push_weights(_worker: Any) -> None: ...

    llm.collective_rpc(push_weights)


def load_adapter_again(llm: Any, name: str, number: str, folder: str) -> None:
    """As vllm serve does with load_inplace."""
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest(name, int(number), folder, load_inplace=True))


def waiting(llm: Any) -> dict[str, Any]:
    """What a test leaves behind in an engine of this process, some steps after its last request:
    requests that are not over, and device blocks that nobody holds. See assert_nothing_waits.
    """
    core = _core(llm)
    pool = core.scheduler.kv_cache_manager.block_pool
    found: dict[str, Any] = {}
    for _ in range(MAX_SETTLE_ROUNDS):
        core.step()
        found = {
            "requests": sorted(core.scheduler.requests),
            "device_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # null block
        }
        if not any(found.values()):
            break
        time.sleep(SETTLE_POLL_S)
    return found


def waiting_elsewhere(llm: Any) -> dict[str, Any]:
    """The same where EngineCore is a process of its own: it says only whether any block is held, by
    refusing to forget all of them.
    """
    for _ in range(MAX_SETTLE_ROUNDS):
        if llm.reset_prefix_cache():
            return {"requests": [], "device_blocks": 0}
        time.sleep(SETTLE_POLL_S)
    return {"requests": ["unknown"], "device_blocks": -1}


async def waiting_elsewhere_async(llm: Any) -> dict[str, Any]:
    for _ in range(MAX_SETTLE_ROUNDS):
        if await llm.reset_prefix_cache():
            return {"requests": [], "device_blocks": 0}
        await asyncio.sleep(SETTLE_POLL_S)
    return {"requests": ["unknown"], "device_blocks": -1}


def chunk_tokens(llm: Any) -> int:
    """Of the first cache group: how many tokens kvray stores and finds at once."""
    config = connector_of(llm).connector_scheduler.config
    return int(config.kv_group_configs[0].tokens_per_chunk)


_attachments: dict[int, Any] = {}


def connector_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def transfers_of(_llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().transfers


# ---- faults


class FaultyExecutor:
    """Another Executor whose jobs end as planned. fault: called with the job's verify before it is
    handed on; returns the verify to use."""

    def __init__(
        self, inner: Executor, fault: Callable[[Callable[[], bool] | None], Callable[[], bool]]
    ) -> None:
        self.inner = inner
        self._fault = fault

    def submit(
        self,
        job_id: int,
        sources: Pointers,
        targets: Pointers,
        piece_bytes: Pointers,
        *,
        direction: Direction,
        arrived: Callable[[], int | None] | None = None,
        verify: Callable[[], bool] | None = None,
        keep_alive: object = None,
    ) -> None:
        self.inner.submit(
            job_id,
            sources,
            targets,
            piece_bytes,
            direction=direction,
            arrived=arrived,
            verify=self._fault(verify),
            keep_alive=keep_alive,
        )

    def finished(self) -> list[CopyEnd]:
        return self.inner.finished()

    def wait(self, job_ids: Iterable[int]) -> None:
        self.inner.wait(job_ids)

    def wait_any(self, timeout_s: float) -> bool:
        return self.inner.wait_any(timeout_s)

    def close(self) -> None:
        self.inner.close()


def fail_copies(llm: Any) -> None:
    """From now on every copy of this rank fails after it has moved its bytes."""
    transfers = transfers_of(llm)
    transfers._executor = FaultyExecutor(transfers._executor, lambda _verify: lambda: False)


def mend_copies(llm: Any) -> None:
    transfers = transfers_of(llm)
    transfers._executor = transfers._executor.inner


def rewrite_every_header_under_loads(llm: Any) -> None:
    """Every header of the slab gets another generation while a load compares headers, and its own
    again afterwards: as if the slots had been given away under the copy."""
    transfers = transfers_of(llm)

    def fault(verify: Callable[[], bool] | None) -> Callable[[], bool]:
        if verify is None:
            return lambda: True

        def rewritten() -> bool:
            slab = transfers._client.session.slab
            generations = _writable_headers(slab)["generation"]
            generations += 1
            matches = verify()
            generations -= 1
            return matches

        return rewritten

    transfers._executor = FaultyExecutor(transfers._executor, fault)


def _writable_headers(slab: Any) -> Any:
    """The table of slot headers, past MappedSlab's own refusal to write into it."""
    count = slab.geometry.slot_count
    address = slab.address + slab.geometry.slot_table_offset
    raw = (ctypes.c_uint8 * (count * HEADER_BYTES)).from_address(address)
    return np.frombuffer(raw, dtype=SLOT_HEADER_DTYPE)


def worker_is_connected(llm: Any) -> bool:
    """It says hello by itself, a moment before or after its EngineCore."""
    return bool(transfers_of(llm)._client.connected)


# ---- what is loaded where


def mapped_objects(pid: int) -> list[str]:
    """Shared objects mapped into a process: what it has loaded, whoever imported it."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in maps if line.count(" /") == 1})


def own_pid(_llm: Any) -> int:
    return os.getpid()


# ---- changes of weights


def name_weights(llm: Any, version: str) -> None:
    from kvray.engine.attach import kvray_name_weights

    kvray_name_weights(llm.llm_engine.engine_core.engine_core, version)


def reload_weights_under_a_load(llm: Any, prompt: list[int]) -> dict[str, Any]:
    """Step a request until its load is under way, reload the weights, and let it finish."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request(
        "under-load",
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False),
    )
    transfers = transfers_of(llm)
    hold = HeldExecutor(transfers._executor)
    transfers._executor = hold
    for _ in range(MAX_SETTLE_ROUNDS):
        engine.step()
        if hold.holds_a_load:
            break
    else:
        message = "no load began"
        raise TimeoutError(message)
    engine.engine_core.engine_core.collective_rpc("reload_weights")
    hold.let_go()
    outputs: list[Any] = []
    for _ in range(MAX_SETTLE_ROUNDS):
        outputs += [output for output in engine.step() if output.finished]
        if outputs:
            break
    transfers._executor = hold.inner
    (output,) = outputs
    return {
        "cached_tokens": output.num_cached_tokens or 0,
        "tokens": list(output.outputs[0].token_ids),
    }


class HeldExecutor(FaultyExecutor):
    """Keeps what has ended to itself until let_go()."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner, lambda verify: verify or (lambda: True))
        self.holds_a_load = False
        self._held = True

    def submit(self, *args: Any, **kwargs: Any) -> None:
        self.holds_a_load = self.holds_a_load or kwargs["direction"] is Direction.LOAD
        super().submit(*args, **kwargs)

    def finished(self) -> list[CopyEnd]:
        return [] if self._held else super().finished()

    def let_go(self) -> None:
        self._held = False


def abort_at_first_retry(llm: Any, prompt: list[int]) -> None:
    """Add a request, step once (its look-up has begun), abort it, and step it away."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request(
        "aborted",
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False),
    )
    engine.step()
    engine.abort_request(["aborted"], internal=False)
    core = engine.engine_core.engine_core
    for _ in range(MAX_SETTLE_ROUNDS):
        if not core.scheduler.has_requests():
            return
        core.step()
    message = "the aborted request does not go away"
    raise TimeoutError(message)


def attach_while_busy(llm: Any, settings: dict[str, Any]) -> None:
    """Attach with a request under way; the request is finished before anything is raised on."""
    from vllm import SamplingParams

    llm.llm_engine.add_request(
        "busy",
        {"prompt_token_ids": list(range(1, 300))},
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False),
    )
    llm.llm_engine.step()
    try:
        attach(llm, settings)
    finally:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


def on_rank(llm: Any, rank: int, function: str) -> None:
    """Run a function of this module in one of the workers of a multiprocess engine."""
    llm.collective_rpc(_if_rank, args=(rank, function))


def _if_rank(worker: Any, rank: int, function: str) -> None:
    if getattr(worker, "worker", worker).rank == rank:
        globals()[function](worker)


# ---- what vLLM itself shows


def vllm_metrics(llm: Any) -> dict[str, dict[str, float]]:
    """kvray's counters among vLLM's Prometheus metrics, as llm.get_metrics() has them: for each
    name, by the value of its label.
    """
    found: dict[str, dict[str, float]] = {}
    for metric in llm.get_metrics():
        if "kvray" in metric.name:
            values = [metric.labels[name] for name in ("source", "reason") if name in metric.labels]
            found.setdefault(metric.name, {})["".join(values)] = metric.value
    return found


def log_stats(llm: Any) -> None:
    """vLLM writes its periodic lines now."""
    llm.llm_engine.do_log_stats()


def unsaid_stats(llm: Any) -> list[str]:
    """What vLLM's half of the connector has counted and nobody has taken."""
    return sorted(connector_of(llm).connector_scheduler._connector_stats.data["data"])


# ---- who calls Ray


def count_ray_calls(llm: Any, prompt: list[int]) -> dict[str, int]:
    """Generate while every call into Ray from this process is counted by its caller's thread."""
    import threading

    import ray
    import ray.actor
    from vllm import SamplingParams

    calls = {"on the step": 0, "elsewhere": 0}
    step_thread = threading.get_ident()

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            on_step = threading.get_ident() == step_thread
            calls["on the step" if on_step else "elsewhere"] += 1
            return original(*args, **kwargs)

        return call

    originals = (ray.get, ray.put, ray.wait, ray.actor.ActorMethod._remote)
    ray.get, ray.put, ray.wait = map(counted, originals[:3])
    ray.actor.ActorMethod._remote = counted(originals[3])  # type: ignore[method-assign]
    try:
        llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        settle(llm)
    finally:
        ray.get, ray.put, ray.wait = originals[:3]
        ray.actor.ActorMethod._remote = originals[3]  # type: ignore[method-assign]
    return calls


_preempted: list[str] = []


def count_preemptions(llm: Any) -> None:
    """From now on every preemption is noted."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original = scheduler._preempt_request

    def noted(request: Any, *args: Any, **kwargs: Any) -> Any:
        _preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = noted


def preemptions(_llm: Any) -> int:
    return len(_preempted)


def never_rest(llm: Any) -> None:
    """From now on vLLM's loop goes round while a request waits for kvray."""
    connector_of(llm).lookups.rest = lambda *_: None


def count_held_steps(llm: Any, prompt: list[int]) -> int:
    """Generate, and count how often vLLM asked in vain for a hit."""
    from vllm import SamplingParams
    from vllm.v1.kv_offload.base import LookupResult

    lookups = connector_of(llm).lookups
    held_steps = 0

    def counted(*args: Any) -> Any:
        nonlocal held_steps
        answer = type(lookups).lookup(lookups, *args)
        held_steps += answer is LookupResult.RETRY
        return answer

    lookups.lookup = counted
    try:
        llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0.0, max_tokens=1, detokenize=False),
            use_tqdm=False,
        )
    finally:
        del lookups.lookup
    return held_steps


# ---- requests that wait (an engine in this process steps only when it is told to)


def add_request(llm: Any, name: str, prompt: list[int]) -> None:
    """The request arrives; nobody schedules it yet."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def finish_requests(llm: Any) -> dict[str, int]:
    """Steps until all have ended. The cached tokens of each."""
    cached: dict[str, int] = {}
    for _ in range(MAX_SETTLE_ROUNDS):
        if not llm.llm_engine.has_unfinished_requests():
            return cached
        for output in llm.llm_engine.step():
            cached[output.request_id] = output.num_cached_tokens
    message = "requests do not end"
    raise TimeoutError(message)


# ---- the canary


def canary(llm: Any) -> dict[str, Any]:
    """What an engine says of its canary, however it got its connector."""
    found: dict[str, Any] = stats(llm)["canary"]
    return found


async def canary_async(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = (await llm.engine_core.call_utility_async("kvray_stats"))["canary"]
    return found


def change_one_weight(llm: Any, layer: int) -> None:
    """One number of a projection of keys, by a call that speaks of weights."""
    llm.collective_rpc(_nudged_weight, args=(layer,))


def _nudged_weight(worker: Any, layer: int) -> None:
    import torch

    def nudged(tensor: Any) -> None:
        tensor.view(torch.uint8).view(-1)[-1] ^= 0x40  # of a float the exponent

    inner = getattr(worker, "worker", worker)
    named = dict(inner.model_runner.get_model().named_parameters())
    norms = [name for name in named if f"layers.{layer}." in name and "input_layernorm" in name]
    with torch.no_grad():
        nudged(named[norms[0]].data)


def is_cached_anywhere(llm: Any) -> bool:
    """Whether the device keeps any block for reuse."""
    return bool(connector_of(llm).is_tainted())


def change_a_weight_under_a_request(llm: Any, prompt: list[int]) -> dict[str, Any]:
    """The request has begun when the weights change; the canary is computed beside it."""
    add_request(llm, "user", prompt)
    llm.llm_engine.step()
    change_one_weight(llm, 1)
    finish_requests(llm)
    for _ in range(MAX_SETTLE_ROUNDS):
        found = canary(llm)
        if found["state"] == "proven":
            return found
        llm.llm_engine.step()
    message = f"the canary does not end: {canary(llm)}"
    raise TimeoutError(message)


def leave_a_canary_beside_a_request(llm: Any, prompt: list[int]) -> int:
    """The user gives up the request beside which a canary has begun. How many requests the
    scheduler still has.
    """
    add_request(llm, "user", prompt)
    llm.llm_engine.step()
    change_one_weight(llm, 1)
    llm.llm_engine.step()
    llm.llm_engine.abort_request(["user"])
    return int(_core(llm).scheduler.get_num_unfinished_requests())


def pause(llm: Any) -> None:
    from vllm.v1.core.sched.interface import PauseState

    _core(llm).scheduler.set_pause_state(PauseState.PAUSED_NEW)


def resume(llm: Any) -> None:
    from vllm.v1.core.sched.interface import PauseState

    _core(llm).scheduler.set_pause_state(PauseState.UNPAUSED)


def step(llm: Any) -> None:
    llm.llm_engine.step()


def _core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def canary_keys(llm: Any) -> list[str]:
    """Under which its canary is in the slab of its node, in hex."""
    from kvray.core.ids import Maker
    from kvray.core.keys import canary_keys as keys_of

    connector = connector_of(llm)
    maker = Maker(int(canary(llm)["maker"], 16))
    groups = range(len(connector.lookups.slot_bytes))
    namespace = connector.lookups.namespace
    return [key.hex() for group in groups for key in keys_of(namespace, maker, group)]
