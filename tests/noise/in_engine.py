"""One set of prompts, computed in an engine in every way that a scheduler may cut and mix them.

Runs inside an engine in one process (Mode.IN_PROCESS), through Engine.call. Each prompt has a salt
of its own for each way, so nothing is found unless the way is to find it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests import in_engine, kv_recorder
from tests.kv_recorder import core_of
from tests.prompts import prompt_of

DECODED_TOKENS = 24  # beside which prompts are staggered
STEPS_BETWEEN = 2
SMALL_STEP_TOKENS = 200  # no multiple of a block


def one_by_one(llm: Any, way: str, prompts: Sequence[Sequence[int]]) -> None:
    """Each alone and in one piece."""
    for number, prompt in enumerate(prompts):
        _add(llm, way, number, prompt)
        kv_recorder.finish(llm)


def together(llm: Any, way: str, prompts: Sequence[Sequence[int]]) -> None:
    """All in one batch."""
    for number, prompt in enumerate(prompts):
        _add(llm, way, number, prompt)
    kv_recorder.finish(llm)


def in_small_steps(llm: Any, way: str, prompts: Sequence[Sequence[int]]) -> None:
    """All at once, and of a step's few tokens each gets some, as with another batch limit."""
    scheduler = core_of(llm).scheduler
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = SMALL_STEP_TOKENS
    try:
        together(llm, way, prompts)
    finally:
        scheduler.max_num_scheduled_tokens = before


def staggered(llm: Any, way: str, prompts: Sequence[Sequence[int]]) -> None:
    """Each begins while another decodes, and the one before it may not be done."""
    other = prompt_of(40, seed=77)
    kv_recorder.add(llm, f"{way} other", other, {"max_tokens": DECODED_TOKENS, "cache_salt": way})
    for number, prompt in enumerate(prompts):
        for _ in range(STEPS_BETWEEN):
            kv_recorder.step(llm)
        _add(llm, way, number, prompt)
    kv_recorder.finish(llm)


def behind_a_hit(llm: Any, way: str, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Its head is computed first, and found on the device by the whole prompt."""
    for number, prompt in enumerate(prompts):
        head = {"max_tokens": 1, "cache_salt": _salt(way, number)}
        kv_recorder.add(llm, f"{way} head {number}", prompt[:tokens], head)
        kv_recorder.finish(llm)
        _add(llm, way, number, prompt)
        kv_recorder.finish(llm)


def store_heads(llm: Any, ways: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    """So that engines that come later, each with a way of its own, find them in the slab."""
    for way in ways:
        for number, prompt in enumerate(prompts):
            options = {"max_tokens": 1, "cache_salt": _salt(way, number)}
            kv_recorder.add(llm, f"{way} stored {number}", prompt, options)
            kv_recorder.finish(llm)
    in_engine.settle(llm)


def behind_a_load(llm: Any, way: str, prompts: Sequence[Sequence[int]]) -> int:
    """Behind what `store_heads` of another engine has stored. How many have loaded something."""
    cached = 0
    for number, prompt in enumerate(prompts):
        _add(llm, way, number, prompt)
        [answer] = kv_recorder.finish(llm).values()
        cached += answer["loads"] > 0
    return cached


def compute_anew(llm: Any, prompts: Sequence[Sequence[int]]) -> None:
    """All in one batch, of any engine: what is computed is offered to be stored."""
    from vllm import SamplingParams

    llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True
        ),
        use_tqdm=False,
    )
    in_engine.settle(llm)


def save(llm: Any, way: str, count: int, path: str) -> None:
    """An array of (prompt, block, layer, bytes); where a block was not computed, zeros."""
    order = [name for name, _ in kv_recorder.layers(llm)]
    blocks = {
        (number, index): np.stack([np.asarray(seen[-1][0][layer]) for layer in order])
        for number in range(count)
        for (_, index), seen in kv_recorder.computed(_name(way, number)).items()
    }
    last = max(index for _, index in blocks)
    shape = next(iter(blocks.values())).shape
    content = np.zeros((count, last + 1, *shape), np.uint8)
    for (number, index), block in blocks.items():
        content[number, index] = block
    np.save(path, content)
    kv_recorder.forget(llm, [_name(way, number) for number in range(count)])


def scale_a_weight(llm: Any, layer: int, factor: float) -> None:
    """One number of the norm before a layer's projections of Q, K and V."""
    core_of(llm).model_executor.collective_rpc(_scaled_weight, args=(layer, factor))


def _scaled_weight(worker: Any, layer: int, factor: float) -> None:
    inner = getattr(worker, "worker", worker)
    named = dict(inner.model_runner.get_model().named_parameters())
    [norm] = [one for name, one in named.items() if f".{layer}.input_layernorm." in name]
    norm.data[-1] *= factor


def _add(llm: Any, way: str, number: int, prompt: Sequence[int]) -> None:
    options = {"max_tokens": 1, "cache_salt": _salt(way, number)}
    kv_recorder.add(llm, _name(way, number), prompt, options)


def _name(way: str, number: int) -> str:
    return f"{way} {number}"


def _salt(way: str, number: int) -> str:
    return f"{way} {number}"
