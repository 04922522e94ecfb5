"""Goal: engines whose blocks have other bytes have other names, and the field that tells it has a
name that a person understands. Method: layers and tensors as vLLM's workers have them, one thing
changed at a time; the connector's own handshake is in test_engine_names.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvray.core.keys import difference
from kvray.engine.facts import MAX_FACT_BYTES, Facts, facts_of, joined, layout_of
from kvray.engine.namespace import (
    NONCE,
    are_named,
    as_text,
    digest,
    measured,
    renewed,
    with_facts,
)
from kvray.engine.weights import Weights

pytestmark = pytest.mark.engine

LAYERS = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
BLOCKS, HEADS, TOKENS, WIDTH = 20, 4, 128, 64


def cache(blocks: int = BLOCKS, tokens: int = TOKENS) -> torch.Tensor:
    return torch.zeros(blocks, HEADS, tokens, WIDTH, dtype=torch.bfloat16)


def heads_inside() -> torch.Tensor:
    """The same shape, with the heads of a token side by side."""
    return cache().transpose(1, 2).contiguous().transpose(1, 2)


def rank(
    *,
    isa: str = "amx",
    backend: str = "CPU_ATTN",
    blocks: int = BLOCKS,
    caches: dict[str, torch.Tensor] | None = None,
    k_scale: float = 1.0,
    weights: str | None = "digest",
    last_isa: str | None = None,
) -> Facts:
    def layer(name: str) -> Any:
        return SimpleNamespace(
            attn_backend=SimpleNamespace(get_name=lambda: backend),
            impl=object(),
            isa=last_isa if last_isa and name == LAYERS[-1] else isa,
            _k_scale_float=k_scale,
            _v_scale_float=1.0,
        )

    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=WIDTH // 2, dtype=torch.bfloat16
    )
    return facts_of(
        {name: layer(name) for name in LAYERS},
        caches or {name: cache(blocks) for name in LAYERS},
        specs=dict.fromkeys(LAYERS, spec),
        num_blocks=blocks,
        weights=Weights(weights),
    )


def names(facts: Facts, **fields: Any) -> dict[str, Any]:
    return with_facts({"model_tag": "", **fields}, [facts], nonce="nonce")


def test_hosts_with_and_without_amx_have_different_names() -> None:
    """vLLM's kernel packs a block otherwise for each: attention over the other's is garbage."""
    here, there = names(rank(isa="amx")), names(rank(isa="vec"))
    assert digest(here) != digest(there)
    assert difference(here, there) == ["attention.isa"]
    assert as_text(here)["attention.isa"] == '"amx"'


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"backend": "FLASHINFER"}, "attention.backend"),
        ({"k_scale": 0.5}, "cache.scales"),
        ({"weights": "other"}, "weights"),
        ({"caches": {name: cache(2 * BLOCKS, 64) for name in LAYERS}}, "cache.layout"),
        ({"last_isa": "vec"}, "attention.isa"),
        ({"caches": {name: heads_inside() for name in LAYERS}}, "cache.layout"),
    ],
    ids=["backend", "scale", "weights", "smaller pieces", "one layer", "heads inside"],
)
def test_what_changes_bytes_is_in_the_name(change: dict[str, Any], field: str) -> None:
    found = difference(names(rank()), names(rank(**change)))
    assert {name for name in found if not name.startswith(field)} == set()
    assert found


def test_how_many_blocks_there_are_is_not_in_the_name() -> None:
    assert names(rank(blocks=20)) == names(rank(blocks=300))


def test_blocks_behind_a_dimension_of_their_own_are_found_too() -> None:
    """(2, blocks, ...): keys and values apart, as some backends have it."""
    apart = [torch.zeros(2, blocks, TOKENS, WIDTH) for blocks in (20, 300)]
    one, other = (layout_of(tensor, tensor.shape[1]) for tensor in apart)
    assert one == other
    assert one != layout_of(torch.zeros(20, 2, TOKENS, WIDTH), 20)


def test_ranks_with_other_shards_are_named_by_all_of_them_in_their_order() -> None:
    a, b = rank(weights="a"), rank(weights="b")
    assert joined([a, b])["weights"] == ["a", "b"]
    assert joined([a, b])["attention.isa"] == "amx"
    fields = {"model_tag": ""}
    one, other = (with_facts(fields, ranks, nonce="n") for ranks in ([a, b], [b, a]))
    assert digest(one) != digest(other)


def test_weights_without_a_digest_are_shared_with_nobody_or_by_their_tag() -> None:
    unseen = rank(weights=None)
    assert not are_named([rank(), unseen])
    one, other = (with_facts({"model_tag": ""}, [unseen], nonce=nonce) for nonce in "ab")
    assert digest(one) != digest(other)
    assert one[NONCE] == "a"
    tagged = [with_facts({"model_tag": "v1"}, [unseen], nonce=nonce) for nonce in "ab"]
    assert tagged[0] == tagged[1]
    assert tagged[0] != with_facts({"model_tag": "v2"}, [unseen], nonce="a")
    assert tagged[0] != with_facts({"model_tag": "v1"}, [rank()], nonce="a")


def test_a_change_of_weights_has_a_nonce_until_they_are_measured_or_named() -> None:
    before = names(rank(weights="v1"))
    changing = renewed(before, "random")
    assert digest(changing) != digest(before)
    assert digest(renewed(before, "other")) != digest(changing)
    assert measured(changing, ["v1"]) == before
    assert measured(changing, ["v2"]) == names(rank(weights="v2"))
    # An operator's word stands for the new ones, whatever each engine had before.
    named = renewed(renewed(names(rank(weights="v0")), "x"), "named:step 7")
    assert named == renewed(changing, "named:step 7")
    assert digest(named) not in {digest(before), digest(changing)}


def test_facts_of_very_many_different_layers_stay_small() -> None:
    caches = {name: torch.zeros(BLOCKS, i + 1, *[1] * 60) for i, name in enumerate(LAYERS)}
    facts = rank(caches={**caches})
    assert all(len(text) <= MAX_FACT_BYTES for text in map(repr, facts.values()))
    other = {**caches, LAYERS[-1]: torch.zeros(BLOCKS, 9, *[1] * 60)}
    assert rank(caches=other)["cache.layout"] != facts["cache.layout"]
