"""How far honest engines differ from each other: the record that core.tolerance is made from.

    python benchmarks/engines/noise.py [--model tiny] [--dtype bfloat16] [--output FILE] [--smoke]

Engines of one model and dtype, one after the other on one node: as it is on this machine, with one
thread, and as on hosts with a smaller instruction set. Each computes the same prompts in every way
of tests.noise.in_engine, so its blocks are from prefills whole and cut, alone, in batches, beside
decoding, behind a hit of its own and behind blocks that the first engine has stored. Every two
blocks of one name that two engines have are compared as an audit does (kvray.node.comparing).

Beside them what is not the same: one weight is changed in a real engine; and of a real block two
layers, the tokens of a layer, keys and values change places.

Writes tests/data/kv_noise.json (ten minutes on two quiet cores); what is there of other models and
dtypes stays. `python -m tests.noise` replays it.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.engine_world import MODELS
from benchmarks.measure import machine, versions
from kvray.core.messages import ChunkShape
from kvray.core.tolerance import Tolerance
from kvray.node.comparing import piece_errors
from tests import in_engine, kv_recorder
from tests.engines import ROOT, Engine, start_engine
from tests.noise import in_engine as ways
from tests.noise.record import PATH, Family, Machine, Record, Sample, load, save
from tests.prompts import CHUNK_TOKENS, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

DTYPES = ("bfloat16", "float16", "float32")
SIZES = {"tiny": (2, 6), "smollm2": (2, 4)}  # prompts, and blocks of each; of 1 MB and of 3 MB
HEAD_BLOCKS = 2  # that are hits where a way is about hits
KEPT = 160  # samples of a family: the worst half, and as many by chance
ALONE = "one by one"
MEET, LOAD = "met, {}", "behind a load, {}"  # ways of the engine of that name
SLAB_BYTES = 1 << 30
POOL_BYTES = 256 << 20
TRUST_LIMIT_S = 5.0
LOOSE = Tolerance(is_exact=False, first=0.0, others=0.0)  # the errors are what is wanted
HEAD_NUMBERS = 64  # that one head has of a token; they lie side by side

# A host without these instructions, as far as the libraries ask about it.
HIDE = "import torch\ntorch.cpu._is_avx512_bf16_supported = lambda: False\n"
HIDE_ALL = HIDE + "torch.cpu._is_avx512_supported = lambda: False\n"

console = Console(stderr=True)
Blocks = npt.NDArray[np.uint8]  # (prompt, block, layer, bytes)


@dataclass(frozen=True)
class Kind:
    """How an engine is started. hides: a sitecustomize of its processes."""

    batch_tokens: int = 4_096
    threads: int = 2
    hides: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


KINDS = {
    "as it is": Kind(),
    "1 thread": Kind(batch_tokens=2_048, threads=1),
    "AVX-512 without bf16": Kind(
        hides=HIDE, environment={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
    ),
    "AVX2": Kind(
        hides=HIDE_ALL,
        environment={"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    ),
}
FIRST = "as it is"


@dataclass(frozen=True)
class Stage:
    """Where the engines of one family run. model: its name in MODELS."""

    nodes: Nodes
    folder: Path
    model: str
    dtype: str

    @contextmanager
    def engine(self, kind: Kind) -> Iterator[Engine]:
        cores = sorted(os.sched_getaffinity(0))[: kind.threads]
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(len(cores)),
            **kind.environment,
        }
        if kind.hides:
            hidden = Path(tempfile.mkdtemp(dir=self.folder))
            (hidden / "sitecustomize.py").write_text(kind.hides)
            environment["PYTHONPATH"] = f"{hidden}{os.pathsep}{ROOT}"
        engine = start_engine(
            MODELS[self.model].folder(),
            folder=self.folder,
            environment=environment,
            dtype=self.dtype,
            max_num_batched_tokens=kind.batch_tokens,
            max_model_len=2_048,
            kv_cache_memory_bytes=POOL_BYTES,
            kv_transfer_config=self.nodes.transfer(0),
        )
        try:
            engine.ready().call(kv_recorder.watch)
            yield engine
        finally:
            engine.close()

    def prompts(self) -> list[list[int]]:
        count, blocks = SIZES[self.model]
        return [prompt_of(blocks * CHUNK_TOKENS + 9, seed=seed) for seed in range(count)]

    def saved(self, engine: Engine, way: str, count: int) -> Blocks:
        path = self.folder / "blocks.npy"
        engine.call(ways.save, way, count, str(path))
        content: Blocks = np.load(path)
        return content

    def trusts(self, engine: Engine, maker: int) -> bool:
        """Whether this engine comes to trust that maker. Another namespace never does."""
        mine = machine_of(engine).maker
        with suppress(AssertionError):
            wait_until(
                lambda: self.nodes.trusts(0, mine, maker), what="trust", limit_s=TRUST_LIMIT_S
            )
        return self.nodes.trusts(0, mine, maker)


def machine_of(engine: Engine) -> Machine:
    found = engine.call(in_engine.canary)
    assert found["state"] == "proven", found
    return Machine(int(found["maker"], 16), found["alone"], found["batched"])


def compute(stage: Stage, engine: Engine, name: str, prompts: list[list[int]]) -> dict[str, Blocks]:
    """All ways that need no other engine; with names that no other engine has stored under."""
    found = {}
    for function in (
        ways.one_by_one,
        ways.together,
        ways.in_small_steps,
        ways.staggered,
        ways.behind_a_hit,
    ):
        way = function.__name__.replace("_", " ")
        heads = [HEAD_BLOCKS * CHUNK_TOKENS + 1] if function is ways.behind_a_hit else []
        engine.call(function, f"{name}, {way}", prompts, *heads)
        found[way] = stage.saved(engine, f"{name}, {way}", len(prompts))
    return found


@dataclass
class Found:
    """What was recorded of a family. blocks: by engine and way; wrong: by what is not the same."""

    engines: dict[str, Machine] = field(default_factory=dict)
    blocks: dict[tuple[str, str], Blocks] = field(default_factory=dict)
    wrong: dict[str, Blocks] = field(default_factory=dict)


def record(stage: Stage, prompts: list[list[int]], kinds: Sequence[str]) -> Found:
    found = Found()
    for name in kinds:
        console.print(f"{stage.model} in {stage.dtype}: {name}")
        with stage.engine(KINDS[name]) as engine:
            found.engines[name] = machine_of(engine)
            for way, content in compute(stage, engine, name, prompts).items():
                found.blocks[name, way] = content
            if name == FIRST:
                heads = [prompt[: HEAD_BLOCKS * CHUNK_TOKENS + 1] for prompt in prompts]
                others = [what.format(other) for other in kinds for what in (MEET, LOAD)]
                engine.call(ways.store_heads, others, heads)
                found.wrong |= change_weights(stage, engine, prompts[:1], found.blocks)
                continue
            # A maker is looked for when a block of it is met.
            engine.call(ways.behind_a_load, MEET.format(name), prompts[:1])
            if not stage.trusts(engine, found.engines[FIRST].maker):
                console.print("  it does not trust the first one, and loads nothing of it:")
                console.print(stage.nodes.status(0)["trust"])
                continue
            loaded = engine.call(ways.behind_a_load, LOAD.format(name), prompts)
            assert loaded == len(prompts), f"{loaded} prompts were found"
            content = stage.saved(engine, LOAD.format(name), len(prompts))
            found.blocks[name, "behind a load"] = content
    found.wrong |= move_parts(stage, found.blocks[FIRST, ALONE][:1])
    return found


def change_weights(
    stage: Stage, engine: Engine, prompts: list[list[int]], blocks: Mapping[Any, Blocks]
) -> dict[str, Blocks]:
    """One number of a layer's norm, larger by powers of two, so that it can be taken back."""
    found = {}
    layer_count = blocks[FIRST, ALONE].shape[2]
    for layer in (0, layer_count // 2):
        for factor in (2.0**7, 2.0):
            name = f"one weight of layer {layer}, times {factor:.0f}"
            engine.call(ways.scale_a_weight, layer, factor)
            engine.call(ways.one_by_one, name, prompts)
            found[name] = stage.saved(engine, name, len(prompts))
            engine.call(ways.scale_a_weight, layer, 1 / factor)
    return found


def move_parts(stage: Stage, right: Blocks) -> dict[str, Blocks]:
    count, layer_bytes = right.shape[2:]
    token_bytes = HEAD_NUMBERS * (4 if stage.dtype == "float32" else 2)
    moved = right.copy()
    moved[:, :, count // 2] = np.roll(right[:, :, count // 2], token_bytes, axis=-1)
    return {
        "keys and values change places": np.roll(right, layer_bytes // 2, axis=-1),
        "two layers change places": right[:, :, [1, 0, *range(2, count)]],
        "one layer's tokens move by one": moved,
    }


def errors_of(mine: Blocks, other: Blocks, dtype: str) -> Iterator[tuple[float, ...]]:
    """Of each block that both have, layer by layer."""
    shape = ChunkShape(mine[0, 0].size, mine.shape[-1], dtype)
    for prompt, block in itertools.product(range(len(other)), range(mine.shape[1])):
        one, two = mine[prompt, block], other[prompt, block]
        if one.any() and two.any():  # else it was a hit
            errors = piece_errors(one.reshape(-1), two.reshape(-1), shape, LOOSE)
            assert errors is not None
            yield tuple(float(f"{error:.3g}") for error in errors)


def kept_of(samples: list[Sample], count: int) -> tuple[Sample, ...]:
    """The worst half, and as many of the others by chance."""
    ranked = sorted(samples, key=lambda sample: max(sample.errors), reverse=True)
    others = ranked[count // 2 :]
    chosen = np.random.default_rng(0).permutation(len(others))[: count // 2]
    return (*ranked[: count // 2], *(others[i] for i in sorted(chosen)))


def record_family(model: str, dtype: str, *, is_smoke: bool) -> Family:
    with (
        tempfile.TemporaryDirectory(prefix="kvray-noise-") as folder,
        running_nodes(1, slab_bytes=SLAB_BYTES) as nodes,
    ):
        stage = Stage(nodes, Path(folder), model, dtype)
        prompts = stage.prompts()[: 1 if is_smoke else None]
        found = record(stage, prompts, list(KINDS)[:2] if is_smoke else list(KINDS))
    console.print("comparing")
    samples = [
        Sample(mine[0], mine[1], other[0], other[1], errors)
        for pair in itertools.combinations(found.blocks, 2)
        for mine, other in (random.sample(pair, 2),)  # either may be the one that looks
        if mine[0] != other[0]
        for errors in errors_of(found.blocks[mine], found.blocks[other], dtype)
    ]
    right = found.blocks[FIRST, ALONE]
    different = {}
    for what, wrong in found.wrong.items():
        by_us = errors_of(right, wrong, dtype)
        by_them = errors_of(wrong, right[:1], dtype)
        different[what] = (
            *(Sample(FIRST, ALONE, what, ALONE, one) for one in itertools.islice(by_us, 3)),
            *(Sample(what, ALONE, FIRST, ALONE, one) for one in itertools.islice(by_them, 3)),
        )
    every = np.array([sample.errors for sample in samples])
    return Family(
        model=model,
        dtype=dtype,
        engines=found.engines,
        compared=len(samples),
        equal=int((every.max(axis=1) == 0.0).sum()),
        largest=tuple(every.max(axis=0).tolist()),
        honest=kept_of(samples, KEPT),
        different=different,
    )


def source() -> dict[str, Any]:
    import torch

    isa = torch.backends.cpu.get_cpu_capability()
    return {**machine(), "isa": isa, "versions": versions()}


def show(family: Family) -> None:
    noise = {name: (one.alone, one.batched) for name, one in family.engines.items()}
    console.print(
        f"{family.model} {family.dtype}: {family.compared} compared, {family.equal} equal"
    )
    console.print(f"  first {family.largest[0]:.3g}, others {max(family.largest[1:]):.3g}; {noise}")
    for what, rows in family.different.items():
        errors = np.array([row.errors for row in rows])
        console.print(f"  {what}: {errors[:, 0].min():.3g}, {errors[:, 1:].max(axis=1).min():.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description="how far honest engines differ")
    parser.add_argument("--model", choices=MODELS, action="append", help="each, if not said")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="each, if not said")
    parser.add_argument("--output", type=Path, default=PATH)
    parser.add_argument("--smoke", action="store_true", help="two engines, one prompt")
    options = parser.parse_args()
    random.seed(0)
    wanted = itertools.product(options.model or MODELS, options.dtype or DTYPES)
    families = []
    for model, dtype in wanted:
        family = record_family(model, dtype, is_smoke=options.smoke)
        show(family)
        families.append(family)
    kept = load(options.output).families if options.output.exists() else ()
    fresh = {(family.model, family.dtype) for family in families}
    families += [one for one in kept if (one.model, one.dtype) not in fresh]
    families.sort(key=lambda family: (family.model, family.dtype))
    save(Record(source(), tuple(families)), options.output)
    summary = [{"model": f.model, "dtype": f.dtype, "compared": f.compared} for f in families]
    print(json.dumps({"families": summary, "output": str(options.output)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
