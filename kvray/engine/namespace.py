"""The namespace of an engine: a digest of everything that changes a block's bytes.

    the configuration (gather_fields) ──┐
    what the ranks have (engine.facts) ─┴─▶ fields ──▶ namespace
    weights change ──▶ renewed: a nonce ──▶ measured: their digest, where it can be had

Two engines share blocks exactly if all fields are equal. The fields are kept beside the digest,
so that a person can be told which one differs. What vLLM's own block hash covers already (tokens,
cache_salt, images by content, the LoRA adapter's name) is not repeated here.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvray.core.keys import namespace_digest
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import MAX_FIELD_BYTES
from kvray.engine import versions
from kvray.engine.facts import WEIGHTS, Facts, joined

NONCE = "weights_nonce"  # the field that makes an engine share with itself alone
NAMED = "named:"  # what an operator calls his weights begins with this


def _hf_config(model_config: Any) -> dict[str, Any]:
    config = json.loads(model_config.hf_config.to_json_string(use_diff=False))
    # The folder's name and the library's version change no byte of KV.
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}


def _rope_depends_on_length(hf_config: Any) -> bool:
    """Whether the engine's longest prompt changes the positions' angles (and so the keys)."""
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None)
    kind = str((rope or {}).get("rope_type", (rope or {}).get("type", "default")))
    return kind not in ("default", "linear", "llama3", "yarn")


def gather_fields(
    vllm_config: Any,
    kv_cache_config: Any,
    *,
    tokens_per_hash: int,
    blocks_per_chunk: int,
    model_tag: str,
) -> dict[str, Any]:
    """What an engine's configuration says that changes the bytes under a block hash, as plain data.
    What its ranks have loaded, and how they arrange it, is not here: see with_facts.
    """
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    algorithm = str(cache.prefix_caching_hash_algo)
    speculative = vllm_config.speculative_config
    groups = [
        {"layers": list(group.layer_names), "spec": repr(group.kv_cache_spec)}
        for group in kv_cache_config.kv_cache_groups
    ]
    return {
        "kvray_format": FORMAT_VERSION,
        "vllm": versions.installed_version(),
        "model_tag": model_tag,
        "model_config": _hf_config(model),
        "model_dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "hf_overrides": repr(getattr(model, "hf_overrides", None)),
        "rope_limit": model.max_model_len if _rope_depends_on_length(model.hf_config) else None,
        "cache_dtype": str(cache.cache_dtype),
        "tokens_per_hash": tokens_per_hash,
        "blocks_per_chunk": blocks_per_chunk,
        "hash_algorithm": algorithm,
        "hash_seed": versions.hash_seed(),
        # vLLM's "sha256" hashes a pickle, whose bytes belong to a Python version.
        "python": list(sys.version_info[:2]) if "cbor" not in algorithm else None,
        "groups": groups,
        "layout": str(getattr(cache, "kv_cache_layout", None)),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "decode_context_parallel": parallel.decode_context_parallel_size,
        "prefill_context_parallel": parallel.prefill_context_parallel_size,
        "speculative": None if speculative is None else repr(speculative),
        "device": str(vllm_config.device_config.device_type),
        "machine": platform.machine(),
    }


def with_facts(fields: Mapping[str, Any], ranks: Sequence[Facts], *, nonce: str) -> dict[str, Any]:
    """The fields when every rank has said what it has, in their order. nonce: names weights of
    which there is no digest. A model_tag does that too, and for all engines that have it.
    """
    found = {**fields, **joined(ranks)}
    if not are_named(ranks):
        found[WEIGHTS] = None
        if not fields.get("model_tag"):
            found[NONCE] = nonce
    return found


def are_named(ranks: Sequence[Facts]) -> bool:
    """Whether there is a digest of all that these ranks have loaded."""
    return all(facts.get(WEIGHTS) is not None for facts in ranks)


def renewed(fields: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """The fields when the weights of this engine change. nonce: random, or what an operator calls
    the new ones (NAMED): then it stands for them, whatever was loaded before.
    """
    if nonce.startswith(NAMED):
        return {**_without_nonce(fields), WEIGHTS: nonce}
    return {**fields, NONCE: nonce}


def measured(fields: Mapping[str, Any], weights: Sequence[str]) -> dict[str, Any]:
    """The fields after a change. weights: the digest of what each rank has now."""
    facts = joined([{WEIGHTS: digest} for digest in weights])
    return {**_without_nonce(fields), **facts}


def _without_nonce(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != NONCE}


def as_text(fields: Mapping[str, Any]) -> dict[str, str]:
    """For people, on another machine: equal texts mean equal fields. A long one is a digest."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in fields.items()}
    return {
        name: text
        if len(text.encode()) <= MAX_FIELD_BYTES
        else f"digest {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        for name, text in texts.items()
    }


def digest(fields: Mapping[str, Any]) -> bytes:
    return bytes(namespace_digest(fields))
