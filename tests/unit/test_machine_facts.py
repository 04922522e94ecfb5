"""Engines are one class only where they round alike: a class is held to the bit.

Method: one thing of a host is hidden at a time. That it matters is in tests/data/kv_noise.json: an
engine without bf16 instructions computes other bits than one with them.
"""

import pytest

pytest.importorskip("torch")

import torch

from kvray.engine.canary_rank import KERNEL_LIMITS, machine_facts

pytestmark = pytest.mark.engine


def test_the_same_host_is_the_same_class() -> None:
    assert machine_facts() == machine_facts()


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_host_without_instructions_is_another_class(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cpu, name, lambda: True)
    before = machine_facts()
    monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert machine_facts() != before


@pytest.mark.parametrize("name", KERNEL_LIMITS)
def test_a_limit_of_an_operators_makes_another_class(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = machine_facts()
    monkeypatch.setenv(name, "AVX2")
    assert machine_facts() != before
