"""What is in an engine's KV cache, block by block, as a request computes, loads and reuses it.

Runs inside an engine in one process (Mode.IN_PROCESS), through Engine.call; its workers may be
processes of their own. `tests.oracle` asks, and compares.

    EngineCore   schedule ──▶ workers compute, or report a load ──▶ update_from_output
                                                                     │ here, before it: of each
                                                                     ▼ request that moved
                       Seen(origin, group, block index, bytes of each rank and layer)

At that moment a request still has its blocks, also one that this step ends, and blocks that leave
a sliding window with the next step are still there. A block outside a window has no id (vLLM's
null block) and is not seen.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

MAX_STEPS = 20_000  # of one wait; most are steps that wait for kvray's copies, 0.1 ms each
IDLE_STEP_S = 0.001  # an engine in one process does not sleep by itself while kvray copies

BlockBytes = list[dict[str, Any]]  # of each rank: layer name -> one row of bytes
_Place = tuple[int, int]  # cache group, index of the block in the request


class Origin(Enum):
    """Where a request has the KV of a block from."""

    COMPUTED = "computed"
    LOADED = "loaded"  # by kvray
    DEVICE = "device"  # from vLLM's own prefix cache


@dataclass(frozen=True, slots=True)
class Seen:
    origin: Origin
    place: _Place
    content: BlockBytes


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A block to be read."""

    request_id: str
    origin: Origin
    place: _Place
    block_id: int


@dataclass(slots=True)
class Record:
    """Of one request. seen: in the order of its life; a preempted request sees a block again."""

    seen: list[Seen] = field(default_factory=list)
    loads: int = 0
    failed_loads: int = 0
    external_tokens: int = 0  # of the last load

    def of(self, origin: Origin) -> dict[_Place, list[BlockBytes]]:
        found: dict[_Place, list[BlockBytes]] = {}
        for one in self.seen:
            if one.origin is origin:
                found.setdefault(one.place, []).append(one.content)
        return found


_records: dict[str, Record] = {}  # by the name that the test gave


def watch(llm: Any) -> None:
    """From now on requests made by `add` are recorded. Several calls are one."""
    scheduler = core_of(llm).scheduler
    if "update_from_output" in vars(scheduler):
        return
    original = scheduler.update_from_output

    def seen_first(scheduler_output: Any, runner_output: Any) -> Any:
        _see_step(core_of(llm), scheduler_output, runner_output)
        return original(scheduler_output, runner_output)

    scheduler.update_from_output = seen_first
    connector = scheduler.connector
    if connector is None:
        return
    after_alloc = connector.update_state_after_alloc

    def told(request: Any, blocks: Any, external_tokens: int) -> Any:
        record = _record_of(request.request_id)
        if record is not None and external_tokens:
            record.external_tokens = external_tokens
        return after_alloc(request, blocks, external_tokens)

    connector.update_state_after_alloc = told


def add(llm: Any, name: str, prompt: Sequence[int], options: Mapping[str, Any]) -> None:
    """The request arrives; nobody schedules it yet. options: max_tokens; cache_salt; lora, which is
    name, id and folder.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    assert name not in _records, f"{name} was used already"
    _records[name] = Record()
    inputs: dict[str, Any] = {"prompt_token_ids": list(prompt)}
    if options.get("cache_salt") is not None:
        inputs["cache_salt"] = options["cache_salt"]
    lora = options.get("lora")
    llm.llm_engine.add_request(
        name,
        inputs,
        SamplingParams(
            temperature=0.0,
            max_tokens=options.get("max_tokens", 1),
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
        ),
        lora_request=None if lora is None else LoRARequest(*lora),
    )


def finish(llm: Any) -> dict[str, dict[str, Any]]:
    """Steps until all requests have ended. Of each: tokens, their log-probabilities, cached tokens,
    and of the loads how many there were and failed.
    """
    done: dict[str, dict[str, Any]] = {}
    for _ in range(MAX_STEPS):
        if not llm.llm_engine.has_unfinished_requests():
            return done
        done |= step(llm)
    waiting = sorted(core_of(llm).scheduler.requests)
    message = f"requests do not end: {waiting}"
    raise TimeoutError(message)


def step(llm: Any) -> dict[str, dict[str, Any]]:
    """One step. What has ended in it, as `finish` tells it."""
    done = {}
    outputs = llm.llm_engine.step()
    if not outputs:
        time.sleep(IDLE_STEP_S)  # the copies' turn
    for output in outputs:
        if output.finished and output.request_id in _records:
            record = _records[output.request_id]
            [answer] = output.outputs
            done[output.request_id] = {
                "tokens": list(answer.token_ids),
                "logprobs": [
                    step[token].logprob
                    for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
                ],
                "cached_tokens": output.num_cached_tokens or 0,
                "loads": record.loads,
                "failed_loads": record.failed_loads,
            }
    return done


def step_until_loaded(llm: Any, name: str) -> None:
    """Until the load of a request has been reported; it is taken up in the next step."""
    for _ in range(MAX_STEPS):
        step(llm)
        if _records[name].loads:
            return
    message = f"{name} does not load"
    raise TimeoutError(message)


def forget(_llm: Any, names: Sequence[str]) -> None:
    """So that two hundred prompts need the memory of one."""
    for name in names:
        del _records[name]


def computed(name: str) -> dict[_Place, list[BlockBytes]]:
    """Each block that this request has computed itself."""
    return _records[name].of(Origin.COMPUTED)


def layers(llm: Any) -> list[tuple[str, float]]:
    """In the order in which they are computed: the name, and the relative step of its dtype."""
    import torch

    names = sorted(
        _dtypes(llm).items(), key=lambda one: [int(n) for n in one[0].split(".") if n.isdigit()]
    )
    return [(name, float(torch.finfo(dtype).eps)) for name, dtype in names]


def layer_dtypes(llm: Any) -> list[str]:
    """Of the caches, each once."""
    return sorted({str(dtype).removeprefix("torch.") for dtype in _dtypes(llm).values()})


def schedules_ahead(llm: Any) -> bool:
    """Whether a step may be scheduled before the one before it has ended."""
    core = core_of(llm)
    return bool(core.vllm_config.scheduler_config.async_scheduling or core.batch_queue)


def left_over(llm: Any) -> dict[str, Any]:
    """What an engine without work must not have: requests, blocks of the device that nobody can
    get, jobs of kvray. vLLM keeps one block, the null block, for itself.
    """
    scheduler = core_of(llm).scheduler
    pool = scheduler.kv_cache_manager.block_pool
    connector = scheduler.connector
    return {
        "requests": sorted(scheduler.requests),
        "lost_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "pending": 0 if connector is None else int(connector.pending()),
    }


def step_to_rest(llm: Any) -> None:
    """Steps while there is a request of anybody, kvray's own (the canary) among them."""
    for _ in range(MAX_STEPS):
        if not core_of(llm).scheduler.requests:
            return
        step(llm)


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


# ---- comparing


def compare(llm: Any, name: str, origin: str, other: str, other_origin: str) -> dict[str, Any]:
    """Each block that request `name` has from `origin`, beside the same block of request `other`.

    blocks, equal: how many, and how many of them byte for byte. missing: places that `other` never
    had. errors: for each layer the largest |difference| over the largest |value| of that layer.
    """
    mine = _records[name].of(Origin(origin))
    theirs = _records[other].of(Origin(other_origin))
    blocks = equal = 0
    errors: dict[str, float] = {}
    unequal: list[_Place] = []
    for place in sorted(mine.keys() & theirs.keys()):
        for content in mine[place]:
            blocks += 1
            if _same(content, theirs[place][-1]):
                equal += 1
            else:
                unequal.append(place)
                _note_errors(errors, content, theirs[place][-1], _dtypes(llm))
    return {
        "blocks": blocks,
        "equal": equal,
        "missing": sorted(mine.keys() - theirs.keys()),
        "unequal": unequal,
        "errors": errors,
    }


def _same(a: BlockBytes, b: BlockBytes) -> bool:
    assert [set(rank) for rank in a] == [set(rank) for rank in b]
    return all(
        np.array_equal(mine[layer], theirs[layer])
        for mine, theirs in zip(a, b, strict=True)
        for layer in mine
    )


def _note_errors(
    errors: dict[str, float], a: BlockBytes, b: BlockBytes, dtypes: dict[str, Any]
) -> None:
    import torch

    for mine, theirs in zip(a, b, strict=True):
        for layer in mine:
            x, y = (
                torch.from_numpy(content[layer]).view(dtypes[layer]).float()
                for content in (mine, theirs)
            )
            difference = torch.nan_to_num(x - y, nan=torch.inf)  # garbage may be no number
            error = float(difference.abs().max() / y.abs().max())
            errors[layer] = max(errors.get(layer, 0.0), error)


def _dtypes(llm: Any) -> dict[str, Any]:
    import torch

    [found, *_] = core_of(llm).model_executor.collective_rpc(_layer_dtypes)
    return {layer: getattr(torch, name) for layer, name in found.items()}


# ---- seeing


def _see_step(core: Any, scheduler_output: Any, runner_output: Any) -> None:
    scheduler = core.scheduler
    wanted: list[_Wanted] = []
    for request_id, count in scheduler_output.num_scheduled_tokens.items():
        request, record = scheduler.requests.get(request_id), _record_of(request_id)
        if request is None or record is None:
            continue
        begin = request.num_computed_tokens - count
        end = min(request.num_computed_tokens, request.num_tokens)
        if not record.seen and not record.loads:
            wanted += _full_blocks(scheduler, request, Origin.DEVICE, range(begin))
        wanted += _full_blocks(scheduler, request, Origin.COMPUTED, range(begin, end))
    result = runner_output.kv_connector_output
    received = (result.finished_recving if result else None) or ()
    failed = (getattr(result, "failed_recving", None) if result else None) or ()
    for request_id in received:
        request, record = scheduler.requests.get(request_id), _record_of(request_id)
        if request is None or record is None:
            continue
        record.loads += 1
        if request_id in failed or result.invalid_block_ids:
            record.failed_loads += 1
            continue
        end = request.num_computed_tokens
        begin = end - record.external_tokens
        wanted += _full_blocks(scheduler, request, Origin.DEVICE, range(begin))
        wanted += _full_blocks(scheduler, request, Origin.LOADED, range(begin, end))
    for one, content in zip(wanted, _read(core, wanted), strict=True):
        record = _record_of(one.request_id)
        assert record is not None
        record.seen.append(Seen(one.origin, one.place, content))


def _record_of(request_id: str) -> Record | None:
    # vLLM may add a random tail to the name of a request.
    return _records.get(request_id) or _records.get(request_id.rsplit("-", 1)[0])


def _full_blocks(scheduler: Any, request: Any, origin: Origin, tokens: range) -> list[_Wanted]:
    """The blocks that were filled by these tokens, in each cache group."""
    found = []
    tables = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    groups = scheduler.kv_cache_config.kv_cache_groups
    for group_index, (table, group) in enumerate(zip(tables, groups, strict=True)):
        block_tokens = group.kv_cache_spec.block_size
        for index in range(tokens.start // block_tokens, tokens.stop // block_tokens):
            if table[index]:  # else it is vLLM's null block
                place = group_index, index
                found.append(_Wanted(request.request_id, origin, place, table[index]))
    return found


def _read(core: Any, wanted: Sequence[_Wanted]) -> list[BlockBytes]:
    if not wanted:
        return []
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    blocks = [(list(groups[one.place[0]].layer_names), one.block_id) for one in wanted]
    ranks = core.model_executor.collective_rpc(_read_blocks, args=(blocks,))
    return [[rank[row] for rank in ranks] for row in range(len(wanted))]


# ---- in each worker; vLLM's worker or its wrapper


def _read_blocks(worker: Any, blocks: list[tuple[list[str], int]]) -> list[dict[str, Any]]:
    """For each block the bytes that each of its layers has in it."""
    caches = _caches(worker)
    return [
        {layer: _bytes_of(caches[layer][block]) for layer in layers} for layers, block in blocks
    ]


def _layer_dtypes(worker: Any) -> dict[str, str]:
    return {name: str(cache.dtype).split(".")[-1] for name, cache in _caches(worker).items()}


def _caches(worker: Any) -> dict[str, Any]:
    """Of each layer vLLM's view of its cache; its first dimension is blocks."""
    inner = getattr(worker, "worker", worker)
    context = inner.vllm_config.compilation_config.static_forward_context
    return {
        name: context[name].kv_cache
        for group in inner.model_runner.kv_cache_config.kv_cache_groups
        for name in group.layer_names
    }


def _bytes_of(block: Any) -> Any:
    import torch

    return block.contiguous().view(torch.uint8).reshape(-1).numpy().copy()


# ---- new weights


def change_one_weight(llm: Any, layer: int) -> None:
    """One number of a norm is twice what it was, by a call that kvray takes for new weights."""
    llm.collective_rpc(_double_a_weight, args=(layer,))


def _double_a_weight(worker: Any, layer: int) -> None:
    inner = getattr(worker, "worker", worker)
    named = dict(inner.model_runner.get_model().named_parameters())
    [norm] = [tensor for name, tensor in named.items() if f".{layer}.input_layernorm." in name]
    norm.data[-1] *= 2
