"""What a fault benchmark runs inside an engine, through Engine.call: one measured request, and a
store that is held at its most delicate moment.
"""

from typing import Any

from tests import in_engine


def ask(llm: Any, prompt: list[int], salt: str, max_tokens: int) -> dict[str, Any]:
    """One greedy request that finds nothing in the device's own prefix cache.

    local, peer: tokens that kvray brought, by where they came from. wait_ms: for how long kvray
    held the request (cumulative where EngineCore is another process).
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm.reset_prefix_cache()
    _forget_longest_wait(llm)
    before = in_engine.stats(llm)["counters"]
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt, "cache_salt": salt}],
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        ),
        use_tqdm=False,
    )
    after = in_engine.stats(llm)["counters"]
    step(llm)
    return {
        "tokens": list(output.outputs[0].token_ids),
        "finish_reason": str(output.outputs[0].finish_reason),
        "cached_tokens": output.num_cached_tokens or 0,
        "local": after["hit_tokens_local"] - before["hit_tokens_local"],
        "peer": after["hit_tokens_peer"] - before["hit_tokens_peer"],
        "stored": after["stored_chunks"] - before["stored_chunks"],
        "failed_loads": after["failed_loads"] - before["failed_loads"],
        "wait_ms": after["longest_wait_ms"],
    }


def step(llm: Any) -> None:
    """Offers the last chunk of the request that has just ended; an engine in a process of its own
    does so by itself.
    """
    core = llm.llm_engine.engine_core
    if not hasattr(core, "call_utility"):
        core.engine_core.step()


def _forget_longest_wait(llm: Any) -> None:
    if not hasattr(llm.llm_engine.engine_core, "call_utility"):
        in_engine.connector_of(llm).lookups.counters["longest_wait_ms"] = 0


# ---- copies that do not come to their end


def hold_copies(llm: Any) -> None:
    """From now on every copy of every rank is done and its end is not reported: what a store has
    reserved stays reserved, and what a load has pinned stays pinned.
    """
    llm.collective_rpc(_hold_copies)


def _hold_copies(worker: Any) -> None:
    transfers = in_engine.transfers_of(worker)
    transfers._executor = in_engine.HeldExecutor(transfers._executor)
