"""What kvray was not tested with is refused by its name; what only looks like it is not."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvray.engine import support, versions
from kvray.engine.hooks import changes_weights
from kvray.engine.jobs import RankHandshake
from kvray.errors import NotAttachedError

pytestmark = pytest.mark.engine


class FullAttentionSpec:
    """Named like vLLM's: the kind of a cache group is told by its class."""

    block_size = 16


class MambaSpec:
    block_size = 16


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


def cache_config(spec: type = FullAttentionSpec) -> SimpleNamespace:
    group = SimpleNamespace(kv_cache_spec=spec())
    return SimpleNamespace(
        kv_cache_groups=[group], prefix_cacheable_group_ids=(0,), hisparse_host_num_blocks=None
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size=2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"cache_dtype": "fp8_e5m2"}, "fp8 KV cache"),
    ],
)
def test_an_engine_with_what_was_not_tested_is_refused_by_name(
    changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(NotAttachedError, match=name):
        support.require_supported(vllm_config(**changes), cache_config())


def test_cache_groups_of_another_kind_are_refused_by_name() -> None:
    with pytest.raises(NotAttachedError, match="MambaSpec"):
        support.require_supported(vllm_config(), cache_config(MambaSpec))


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


def test_small_device_blocks_are_joined_to_chunks_of_a_useful_size() -> None:
    config = vllm_config()
    support.prepare_settings(config, cache_config())
    extra = config.kv_transfer_config.kv_connector_extra_config
    assert extra["blocks_per_chunk"] == 8  # 16 tokens a block, 128 a chunk
    assert extra["offload_prompt_only"] is False
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_what_an_operator_set_himself_is_left_alone() -> None:
    config = vllm_config(extra={"block_size": 64})
    support.prepare_settings(config, cache_config())
    assert "blocks_per_chunk" not in config.kv_transfer_config.kv_connector_extra_config


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
