"""Goal: KV of one version of an adapter is never looked up or stored under the name of another.
Method: what ranks say that they have, in the orders in which vLLM loads, gives up and replaces.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvray.engine.adapter_watch import adapter_digest
from kvray.engine.adapters import AdapterChanges, Adapters, Loaded, LoadedAdapter

pytestmark = pytest.mark.engine

V1, V2 = "11" * 16, "22" * 16
NOTHING_LOST = AdapterChanges(frozenset(), is_replaced=False)


def has(digest: str, *, number: int = 1, is_mixed: bool = False) -> Loaded:
    return {"style": LoadedAdapter(number, digest, is_mixed=is_mixed)}


def loaded(digest: str, **other: Any) -> Adapters:
    adapters = Adapters(1)
    adapters.report({0: has(digest, **other)})
    return adapters


def test_an_adapter_has_no_name_until_it_is_loaded_and_then_that_of_its_content() -> None:
    adapters = Adapters(1)
    assert adapters.salt("style", 1) is None
    assert adapters.report({0: has(V1)}) == NOTHING_LOST
    assert adapters.salt("style", 1) == bytes.fromhex(V1)
    assert adapters.salt("other", 2) is None


def test_every_rank_must_have_loaded_the_same() -> None:
    adapters = Adapters(2)
    adapters.report({0: has(V1)})
    assert adapters.salt("style", 1) is None
    adapters.report({1: has(V2)})  # its files were replaced between the two
    assert adapters.salt("style", 1) is None
    adapters.report({1: has(V1)})
    assert adapters.salt("style", 1) == bytes.fromhex(V1)


def test_a_version_that_replaces_another_waits_for_the_devices_cache_to_be_reset() -> None:
    """vLLM's hash is that of the name, so the device would give out blocks of the old one."""
    adapters = loaded(V1)
    changes = adapters.report({0: has(V2)})
    assert changes == AdapterChanges(frozenset({"style"}), is_replaced=True)
    assert adapters.salt("style", 1) is None
    adapters.device_was_reset()
    assert adapters.salt("style", 1) == bytes.fromhex(V2)


def test_one_that_was_given_up_has_no_name_and_comes_back_under_its_own() -> None:
    adapters = loaded(V1)
    assert adapters.report({0: {}}) == AdapterChanges(frozenset({"style"}), is_replaced=False)
    assert adapters.salt("style", 1) is None
    assert adapters.report({0: has(V1)}) == NOTHING_LOST
    assert adapters.salt("style", 1) == bytes.fromhex(V1)


def test_one_that_was_replaced_while_it_was_given_up_is_seen() -> None:
    adapters = loaded(V1)
    adapters.report({0: {}})
    assert adapters.report({0: has(V2)}).is_replaced
    assert adapters.salt("style", 1) is None


def test_two_of_one_name_at_once_are_named_by_nobody() -> None:
    adapters = loaded(V2, number=2)
    assert adapters.salt("style", 2)
    assert adapters.salt("style", 1) is None  # another number, and so another content
    assert adapters.salt("style", 2) is None


def test_an_attach_is_told_that_there_was_another_version_before() -> None:
    adapters = Adapters(1)
    assert adapters.report({0: has(V2, is_mixed=True)}).lost == {"style"}
    assert adapters.salt("style", 1) is None
    adapters.device_was_reset()
    assert adapters.salt("style", 1) == bytes.fromhex(V2)
    assert adapters.report({0: has(V2, is_mixed=True)}) == NOTHING_LOST


def test_other_adapters_are_not_concerned() -> None:
    both = {**has(V1), "other": LoadedAdapter(2, V2)}
    adapters = Adapters(1)
    adapters.report({0: both})
    assert adapters.report({0: {**both, **has(V2)}}).lost == {"style"}
    assert adapters.salt("other", 2) == bytes.fromhex(V2)


def lora(*, scaling: float = 2.0, change: int = 0) -> Any:
    first = torch.zeros(4, 8)
    first.view(torch.int32)[0, 0] = change
    layer = SimpleNamespace(
        module_name="q",
        rank=4,
        lora_alpha=8,
        lora_a=first,
        lora_b=torch.ones(8, 4),
        scaling=scaling,
    )
    return SimpleNamespace(rank=4, loras={"layers.0.q_proj": layer})


def test_one_bit_or_another_scale_of_an_adapter_is_another_content() -> None:
    assert adapter_digest(lora()) == adapter_digest(lora())
    assert len({adapter_digest(one) for one in (lora(), lora(change=1), lora(scaling=1.0))}) == 3
