"""Goal: other weights have another name and equal ones the same, whatever they came from. Method:
vLLM's own loaders with kvray's plugin and no engine, over checkpoints in which single bits are
others. Each parameter of a larger model in turn: tests/integration/test_each_parameter.py.
"""

import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvray.engine.weights import NotReadableError, tensor_digest
from tests.loading import Case, Seen, load_all
from tests.models import tiny_biased

pytestmark = pytest.mark.engine

KINDS = {
    "a linear weight": "model.layers.1.mlp.down_proj.weight",
    "a part of a merged one": "model.layers.0.self_attn.k_proj.weight",
    "a norm": "model.layers.1.input_layernorm.weight",
    "an embedding": "model.embed_tokens.weight",
    "a bias": "model.layers.0.self_attn.v_proj.bias",
}


FOLDERS = ("a copy", "pt", "bin", "ranks")


def all_cases(here: Path, place: Path) -> dict[str, Case]:
    """Loaded one after the other in one process, since vLLM takes 10 s to be imported."""
    folders = {name: place / name for name in FOLDERS}
    shutil.copytree(here, folders["a copy"])
    for name in ("pt", "bin", "ranks"):
        shutil.copytree(here, folders[name], ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(here / "model.safetensors")
    torch.save(tensors, folders["pt"] / "model.pt")
    torch.save(tensors, folders["bin"] / "pytorch_model.bin")
    copy = str(folders["a copy"])
    return {
        "plain": Case(str(here)),
        "a longer prompt": Case(str(here), {"max_model_len": 4_096}),
        "safetensors": Case(copy, {"load_format": "safetensors"}),
        "pt": Case(str(folders["pt"]), {"load_format": "pt"}),
        "bin": Case(str(folders["bin"])),
        "to save": Case(str(here), save_sharded=str(folders["ranks"])),
        "sharded_state": Case(str(folders["ranks"]), {"load_format": "sharded_state"}),
        **{kind: Case(copy, flip=name) for kind, name in KINDS.items()},
        "dummy 0": Case(copy, {"load_format": "dummy", "seed": 0}),
        "dummy 1": Case(copy, {"load_format": "dummy", "seed": 1}),
        "again": Case(copy, reload=True),
        "unseen": Case(copy, unseen=True),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    cases = all_cases(tiny_biased(), tmp_path_factory.mktemp("models"))
    found = dict(zip(cases, load_all(list(cases.values())), strict=True))
    assert not {name: one.error for name, one in found.items() if one.error}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_of_any_kind_of_parameter_is_another_name(seen: dict[str, Seen], kind: str) -> None:
    assert seen[kind].digest
    others = [one.digest for name, one in seen.items() if name != kind]
    assert seen[kind].digest not in others


@pytest.mark.parametrize("origin", ["a longer prompt", "safetensors", "pt", "bin", "sharded_state"])
def test_equal_weights_have_one_name_whatever_they_came_from(
    seen: dict[str, Seen], origin: str
) -> None:
    """Another folder, files of another kind, what ranks have saved; another longest prompt, which
    has other tables of angles.
    """
    assert seen[origin].digest
    assert seen[origin] == seen["plain"]


def test_dummy_weights_are_named_by_their_bytes_as_all_others(seen: dict[str, Seen]) -> None:
    """vLLM makes the same ones for each seed of the engine."""
    assert seen["dummy 0"].digest
    assert seen["dummy 0"] == seen["dummy 1"]
    assert seen["dummy 0"] != seen["plain"]


def test_what_was_loaded_anew_is_named_anew_and_what_nobody_saw_is_not(
    seen: dict[str, Seen],
) -> None:
    """vLLM has packed the linear weights by then, and left empty tensors behind."""
    assert seen["again"] == seen["plain"]
    assert seen["unseen"].digest is None
    assert "is packed, and was not loaded anew" in seen["unseen"].why


def test_a_tensor_is_named_by_its_elements_and_not_by_how_they_lie() -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    across = tensor.t().contiguous().t()
    assert across.stride() != tensor.stride()
    assert tensor_digest(across) == tensor_digest(tensor)
    assert tensor_digest(tensor.t()) != tensor_digest(tensor)
    assert tensor_digest(torch.tensor(1.5)) != tensor_digest(torch.tensor(2.5))
    assert tensor_digest(torch.empty(0))
    with pytest.raises(NotReadableError):
        tensor_digest(torch.empty(4, device="meta"))


def test_a_tensor_in_pieces_has_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(100_000, dtype=torch.int32)
    whole = tensor_digest(tensor)
    monkeypatch.setattr("kvray.engine.weights.PIECE_BYTES", 4_099)
    assert tensor_digest(tensor) == whole


def test_a_gigabyte_takes_half_a_second() -> None:
    gigabyte = torch.ones(1_000_000_000, dtype=torch.uint8)
    took_s = []
    for _ in range(3):
        begin_s = time.perf_counter()
        tensor_digest(gigabyte)
        took_s.append(time.perf_counter() - begin_s)
    print(f"1 GB of parameters in {min(took_s):.3f} s")  # noqa: T201
    assert min(took_s) <= 0.5
