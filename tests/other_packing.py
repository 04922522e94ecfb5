"""An engine that arranges the KV of a block otherwise: values where others have keys.

As two x86 hosts differ of which one has AMX; an instruction set can not be added to a host, an
arrangement can. vLLM loads this module in each worker before the model:

    start_engine(..., worker_extension_cls="tests.other_packing.OtherPacking")

It writes and reads its cache consistently, so it answers as any other engine does; nothing that it
says of itself is other than theirs.
"""

from typing import Any

from vllm import _custom_ops as ops

_write, _attend = ops.cpu_attn_reshape_and_cache, ops.cpu_attention_with_kv_cache


class OtherPacking:
    """Adds nothing to vLLM's worker but that this module is loaded."""


def _write_swapped(
    key: Any, value: Any, key_cache: Any, value_cache: Any, *others: Any, **named: Any
) -> Any:
    return _write(key, value, value_cache, key_cache, *others, **named)


def _attend_swapped(*, key_cache: Any, value_cache: Any, **named: Any) -> Any:
    return _attend(key_cache=value_cache, value_cache=key_cache, **named)


ops.cpu_attn_reshape_and_cache = _write_swapped
ops.cpu_attention_with_kv_cache = _attend_swapped
