"""What kvray was not tested with is refused by its name; what only looks like it is not."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from vllm.config.cache import CacheDType
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvray.engine import support, versions
from kvray.engine.arguments import SHOWN_CACHE_DTYPES
from kvray.engine.hooks import changes_weights
from kvray.engine.jobs import RankHandshake
from kvray.errors import NotAttachedError

pytestmark = pytest.mark.engine

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 32,
    "dtype": torch.bfloat16,
}
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=256)


def vllm_config(**changes: Any) -> SimpleNamespace:
    """The fields of a VllmConfig that decide whether kvray takes an engine."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=changes.get("data_parallel_size", 1),
            pipeline_parallel_size=changes.get("pipeline_parallel_size", 1),
            decode_context_parallel_size=changes.get("decode_context_parallel_size", 1),
            prefill_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        speculative_config=changes.get("speculative_config"),
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=changes.get("extra", {}), kv_load_failure_policy="fail"
        ),
    )


def cache_config(*specs: KVCacheSpec) -> SimpleNamespace:
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs or (FULL,)]
    return SimpleNamespace(
        kv_cache_groups=groups,
        prefix_cacheable_group_ids=tuple(range(len(groups))),
        hisparse_host_num_blocks=None,
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data_parallel_size": 2}, r"mixture of experts.*data_parallel_size=2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"speculative_config": object()}, "speculative decoding"),
    ],
)
def test_an_engine_with_what_was_not_tested_is_refused_by_name(
    changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(NotAttachedError, match=name):
        support.require_supported(vllm_config(**changes), cache_config())


@pytest.mark.parametrize("name", [*get_args(CacheDType), "of_a_later_release"])
def test_a_cache_dtype_that_was_not_shown_equal_is_refused_by_name(name: str) -> None:
    """By a list of what is taken: int8_per_token_head and nvfp4 have no "fp8" in their names."""
    if name in SHOWN_CACHE_DTYPES:
        support.require_supported(vllm_config(cache_dtype=name), cache_config())
        return
    with pytest.raises(NotAttachedError, match=f"kv_cache_dtype={name}"):
        support.require_supported(vllm_config(cache_dtype=name), cache_config())


def test_a_checkpoint_that_quantises_its_cache_is_refused_whatever_its_dtype_is_called() -> None:
    quantised = FullAttentionSpec(**SHAPE, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)
    with pytest.raises(NotAttachedError, match="INT8_PER_TOKEN_HEAD"):
        support.require_supported(vllm_config(), cache_config(quantised))


def test_layers_that_look_ahead_are_refused() -> None:
    """The KV of a token would depend on those behind it, which are not in its name."""
    with pytest.raises(NotAttachedError, match="non-causal"):
        support.require_supported(
            vllm_config(), cache_config(FullAttentionSpec(**SHAPE, non_causal=True))
        )


def test_cache_groups_of_another_kind_are_refused_by_name() -> None:
    local = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)
    with pytest.raises(NotAttachedError, match="ChunkedLocalAttentionSpec"):
        support.require_supported(vllm_config(), cache_config(FULL, local))
    derived = MLAAttentionSpec(**SHAPE)
    assert isinstance(derived, FullAttentionSpec)
    with pytest.raises(NotAttachedError, match="MLAAttentionSpec"):
        support.require_supported(vllm_config(), cache_config(derived))


@pytest.mark.parametrize("kind", ["tpu", "xpu"])
def test_devices_that_kvray_can_not_copy_for_are_refused_by_name(kind: str) -> None:
    with pytest.raises(NotAttachedError, match=f"runs on {kind}"):
        support.require_copies(SimpleNamespace(device_type=kind))


def test_engines_on_gpus_are_taken_and_amds_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    support.require_copies(SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr("torch.version.hip", "7.0")
    with pytest.raises(NotAttachedError, match="ROCm"):
        support.require_copies(SimpleNamespace(device_type="cuda"))


def test_a_plain_engine_is_taken() -> None:
    support.require_supported(vllm_config(), cache_config())


def test_an_unknown_release_of_vllm_is_refused_with_the_ones_that_are_known() -> None:
    with pytest.raises(NotAttachedError, match=r"0\.32\.0.*0\.29\.0.*runs vLLM 0\.33\.1"):
        versions.require_tested("0.33.1")


def blocks_per_chunk(*specs: KVCacheSpec, **extra: Any) -> Any:
    config = vllm_config(extra=extra)
    support.prepare_settings(config, cache_config(*specs))
    return config.kv_transfer_config.kv_connector_extra_config.get("blocks_per_chunk")


def test_small_device_blocks_are_joined_to_chunks_of_a_useful_size() -> None:
    config = vllm_config()
    support.prepare_settings(config, cache_config())
    extra = config.kv_transfer_config.kv_connector_extra_config
    assert extra["blocks_per_chunk"] == 8  # 16 tokens a block, 128 a chunk
    assert extra["offload_prompt_only"] is False
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_where_there_is_a_window_a_chunk_is_one_block() -> None:
    """A window leaves blocks behind one by one: a chunk of several would have a hole."""
    assert blocks_per_chunk(WINDOW) == 1
    assert blocks_per_chunk(FULL, WINDOW) == 1
    assert blocks_per_chunk(WINDOW, blocks_per_chunk=1) == 1


@pytest.mark.parametrize("setting", [{"block_size": 64}, {"blocks_per_chunk": 4}])
@pytest.mark.parametrize("specs", [[WINDOW], [FULL, WINDOW]], ids=["alone", "hybrid"])
def test_chunks_of_several_blocks_are_refused_where_there_is_a_window(
    setting: dict[str, int], specs: list[KVCacheSpec]
) -> None:
    with pytest.raises(NotAttachedError, match=f"{next(iter(setting))}=.*blocks_per_chunk=1"):
        blocks_per_chunk(*specs, **setting)


def test_what_an_operator_set_himself_is_left_alone() -> None:
    assert blocks_per_chunk(block_size=64) is None
    assert blocks_per_chunk(blocks_per_chunk=2) == 2


def rank(number: int, part_bytes: int = 512, host: str = "a") -> RankHandshake:
    return RankHandshake(rank=number, part_bytes=(part_bytes,), host=host)


def test_ranks_share_a_slot_only_if_they_are_alike_and_on_one_host() -> None:
    assert support.mismatch([rank(0), rank(1)], 2) is None
    assert "several hosts" in (support.mismatch([rank(0), rank(1, host="b")], 2) or "")
    assert "different amounts" in (support.mismatch([rank(0), rank(1, part_bytes=256)], 2) or "")
    assert "1 of 2 ranks" in (support.mismatch([rank(0)], 2) or "")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("update_weights", True),
        ("reload_weights", True),
        ("start_weight_update", True),
        ("my_extension_receives_Weights", True),
        ("apply_model", True),
        ("compute_weight_checksums", False),
        ("add_lora", False),
        ("get_model_inspection", False),
    ],
)
def test_calls_that_may_change_weights_are_known_by_their_names(
    method: str, *, expected: bool
) -> None:
    assert changes_weights(method) is expected


def test_a_function_that_is_sent_to_the_workers_is_known_by_its_name_too() -> None:
    def push_new_weights() -> None: ...

    assert changes_weights(push_new_weights)
