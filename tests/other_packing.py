"""An engine that arranges the KV of a block otherwise: values where others have keys.

As two x86 hosts differ of which one has AMX; an instruction set can not be added to a host, an
arrangement can. vLLM loads this module in each worker before the model:

    start_engine(..., worker_extension_cls="tests.other_packing.OtherPacking")

It writes and reads its cache consistently, so it answers as any other engine does. It says that it
has another instruction set, as vLLM would, unless tests.named_alike says otherwise.
"""

from typing import Any

from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn

from tests.named_alike import NamedAlike

_write, _attend = ops.cpu_attn_reshape_and_cache, ops.cpu_attention_with_kv_cache


class OtherPacking(NamedAlike):
    """Adds nothing to vLLM's worker but that these modules are loaded."""


def _write_swapped(
    key: Any, value: Any, key_cache: Any, value_cache: Any, *others: Any, **named: Any
) -> Any:
    return _write(key, value, value_cache, key_cache, *others, **named)


def _attend_swapped(*, key_cache: Any, value_cache: Any, **named: Any) -> Any:
    return _attend(key_cache=value_cache, value_cache=key_cache, **named)


def _other_isa(*_model: Any) -> str:
    """vLLM's for what has no wider one: each x86 host can compute with it."""
    return "vec16"


ops.cpu_attn_reshape_and_cache = _write_swapped
ops.cpu_attention_with_kv_cache = _attend_swapped
cpu_attn._get_attn_isa = _other_isa  # noqa: SLF001 (vLLM asks nobody else)
