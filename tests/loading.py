"""Models loaded as vLLM's workers load them, without an engine: one in a second, some in a process
of their own, since vLLM leaves threads and sockets behind.

    python -m tests.loading < cases.json      [{"model", "arguments", "flip", "measure_again"}, ...]
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.mutants.plant import command

LIMIT_S = 280.0  # of all cases; vLLM's import takes 10 s, a model of 100 MB one


@dataclass(frozen=True, slots=True)
class Case:
    """arguments: of vLLM's EngineArgs. flip: a tensor of the checkpoint, one bit of which is wrong
    while it is loaded. reload: load it again into the model that is there, and measure then.
    unseen: only measure again. save_sharded: only write it to this folder, as ranks write theirs.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    flip: str | None = None
    reload: bool = False
    unseen: bool = False
    save_sharded: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What kvray says of a model; error: what vLLM says instead of loading it."""

    digest: str | None
    why: str = ""
    error: str = ""


def load_all(cases: Sequence[Case]) -> list[Seen]:
    done = subprocess.run(
        command("tests.loading"),
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    return [Seen(**seen) for seen in json.loads(done.stdout.splitlines()[-1])]


def tensor_names(model: Path) -> list[str]:
    header, _ = _header(model / "model.safetensors")
    return sorted(name for name in header if name != "__metadata__")


@contextmanager
def flipped(model: Path, name: str) -> Iterator[None]:
    flip(model, name)
    try:
        yield
    finally:
        flip(model, name)


def flip(model: Path, name: str) -> None:
    """The lowest bit of the element in the middle of a tensor."""
    _change_middle(model, name, lambda element: bytes([element[0] ^ 1, element[1]]))


def set_element(model: Path, name: str, element: bytes) -> None:
    """The one in the middle of a tensor. element: two bytes of a bfloat16, the low one first."""
    _change_middle(model, name, lambda _: element)


def _change_middle(model: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = model / "model.safetensors"
    header, start = _header(path)
    begin, end = header[name]["data_offsets"]
    place = start + begin + (end - begin) // 4 * 2
    with path.open("r+b") as file:
        file.seek(place)
        element = file.read(2)
        file.seek(place)
        file.write(change(element))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


# ---- in the process of its own


def _run(case: Case) -> Seen:
    if case.flip is not None:
        with flipped(Path(case.model), case.flip):
            return _load(case)
    return _load(case)


def _load(case: Case) -> Seen:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from kvray.engine import weights

    arguments: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 1_024,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        **case.arguments,
    }
    try:
        config = EngineArgs(model=case.model, **arguments).create_engine_config()
        with set_current_vllm_config(config):
            _be_the_only_rank()
            if case.save_sharded is not None:
                return _save_sharded(config, case.save_sharded)
            model = get_model(vllm_config=config)
            layers = list(config.compilation_config.static_forward_context.values())
            seen = weights.weights_of(layers)
            if case.reload or case.unseen:
                if case.reload:
                    _reload(config, model)
                seen = weights.measured_again(layers)
    except Exception as exc:  # noqa: BLE001 (whatever vLLM says of a model goes to the test)
        return Seen(None, error=f"{type(exc).__name__}: {exc}"[:600])
    return Seen(seen.digest, seen.why)


def _be_the_only_rank() -> None:
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return
    with tempfile.TemporaryDirectory() as folder:
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{folder}/ranks",
            local_rank=0,
            backend="gloo",
        )
        parallel_state.initialize_model_parallel(1, 1)


def _reload(config: Any, model: Any) -> None:
    """As vLLM's model runner does it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Runner:
        """Of a model runner what reloading needs."""

        vllm_config = config
        model_config = config.model_config
        load_config = config.load_config
        lora_config = None
        reset_lora_state = reset_encoder_cache = reset_mm_cache = _nothing

        def get_model(self) -> Any:
            return model

    GPUModelRunner.reload_weights(Runner())


def _save_sharded(config: Any, folder: str) -> Seen:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    loader = DefaultModelLoader(config.load_config)
    with set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
    loader.load_weights(model, config.model_config)
    ShardedStateLoader.save_model(model, folder)
    return Seen(None, why="only saved")


def _nothing(*_: object, **__: object) -> None:
    """Of what is not there."""


def _main() -> None:
    import torch
    from vllm.plugins import load_general_plugins

    torch.accelerator.empty_cache = _nothing  # as vLLM's worker for CPUs does
    load_general_plugins()  # kvray's among them, as in a worker
    cases = [Case(**case) for case in json.load(sys.stdin)]
    print(json.dumps([asdict(_run(case)) for case in cases]))  # noqa: T201


if __name__ == "__main__":
    _main()
