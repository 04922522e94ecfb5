"""What one rank says of itself when its caches are there: what it has loaded, and how it arranges
a block's bytes. All of it is read from what is there, and nothing from what was asked for.

    each rank   facts_of ── RankHandshake ──▶ EngineCore   joined ──▶ fields of the namespace

The number of a rank's blocks is in none of it, since it changes no byte of any.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvray.engine.weights import Weights

MAX_FACT_BYTES = 4_096  # of one fact as JSON; a longer one is its digest, which tells it as well
MAX_NAMED = 4  # different values over the layers of a rank that are spelled out

Facts = dict[str, Any]  # plain values: they travel between processes and make the namespace

WEIGHTS = "weights"


def facts_of(
    layers: Mapping[str, Any],
    kv_caches: Mapping[str, Any],
    *,
    specs: Mapping[str, Any],
    num_blocks: int,
    weights: Weights,
) -> Facts:
    """layers, kv_caches, specs: vLLM's attention layers, their cache tensors and KVCacheSpecs, by
    the layer's name. num_blocks: of this rank's cache, as the scheduler counts them.
    """
    facts: Facts = {
        "cache.layout": _joined({n: layout_of(t, num_blocks) for n, t in kv_caches.items()}),
        "cache.specs": _joined({name: repr(spec) for name, spec in specs.items()}),
        "cache.scales": _joined({name: _scales(layer) for name, layer in layers.items()}),
        "attention.backend": _joined({name: _backend(layer) for name, layer in layers.items()}),
        "attention.isa": _joined(
            {name: getattr(layer, "isa", None) for name, layer in layers.items()}
        ),
    }
    return {name: _bounded(value) for name, value in facts.items()} | {WEIGHTS: weights.digest}


def layout_of(tensor: Any, num_blocks: int) -> dict[str, Any]:
    """How a block's elements lie in its bytes. The blocks' own dimension is left out, and of one
    that is further out its step.
    """
    shape, strides = list(tensor.shape), list(tensor.stride())
    blocks = next(
        (i for i, size in enumerate(shape) if num_blocks and size and size % num_blocks == 0), None
    )
    if blocks is None:
        return {"shape": shape, "strides": strides, "dtype": str(tensor.dtype)}
    step = strides[blocks]
    return {
        "shape": ["blocks" if i == blocks else size for i, size in enumerate(shape)],
        "strides": ["outside" if s > step else s for i, s in enumerate(strides) if i != blocks],
        "step": step,
        "pieces": shape[blocks] // num_blocks,  # a block in several, where a kernel wants smaller
        "dtype": str(tensor.dtype),
    }


def joined(ranks: Sequence[Facts]) -> Facts:
    """Of all ranks, in their order: one value where they agree, else a list."""
    names = sorted({name for facts in ranks for name in facts})
    columns = {name: [facts.get(name) for facts in ranks] for name in names}
    return {
        name: column[0] if all(value == column[0] for value in column) else column
        for name, column in columns.items()
    }


def _backend(layer: Any) -> str:
    backend = getattr(layer, "attn_backend", None)
    name = backend.get_name() if backend is not None else "none"
    return f"{name} ({type(getattr(layer, 'impl', None)).__name__})"


def _scales(layer: Any) -> list[float | None]:
    """Of K and of V."""
    return [getattr(layer, name, None) for name in ("_k_scale_float", "_v_scale_float")]


def _joined(by_layer: Mapping[str, Any]) -> Any:
    """One value where the layers agree; else some, and a digest of which has which."""
    values = list(by_layer.values())
    if all(value == values[0] for value in values):
        return values[0] if values else None
    texts = sorted({json.dumps(value, sort_keys=True) for value in values})
    return {
        "values": [json.loads(text) for text in texts[:MAX_NAMED]],
        "layers": _digest(sorted(by_layer.items())),
    }


def _bounded(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= MAX_FACT_BYTES else f"digest {_digest(value)}"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
