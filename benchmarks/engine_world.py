"""What the engine benchmarks share: Ray nodes with kvray on this machine, and real engines on them.

    none   vLLM alone: no connector, nothing of kvray in the engine
    silo   kvray as users run it, but each instance has a `model_tag` of its own, so none can use
           what another has stored: a cache of its own node, of the same size
    p2p    kvray as users run it

All modes run side by side in one world and are measured in turn, one request at a time: what else
the machine does falls on all of them alike. Instance i belongs to node i. Times to the first token
are the engine's own, from arrival to the first token.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from smollm2 import smollm2_folder

from benchmarks.measure import cpu_s
from kvray.config import default_extent_bytes
from kvray.engine.arguments import transfer_settings
from tests import in_engine
from tests.engines import Answer, Engine, start_engine
from tests.engines import Mode as EngineMode
from tests.models import tiny
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import READY_LIMIT_S, Nodes, running_nodes, wait_until

# As in ray_cluster.yaml: without it Ray's workers, and so the NodeStores, run with niceness 15.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# In a warm-up every block of the device's pool is written once: a page that was never touched
# costs its first writer a page fault per 4 KiB, 30 ms for 100 MB.
MAX_WARM_ROUNDS = 16
WARM_SEED = 1_000_000  # no benchmark has so many prompts
MAX_MODEL_TOKENS = 8_192
QUIET_WINDOW_S = 0.05
QUIET_SHARE = 0.15  # of a core, by all other engines together; idle they use half a percent each
QUIET_LIMIT_S = 20.0


TOLD_COUNTERS = (
    "hit_tokens_local",
    "hit_tokens_peer",
    "expired_lookups",
    "failed_loads",
    "dropped_chunks",
    "longest_wait_ms",
)


class Mode(Enum):
    NONE = "none"
    SILO = "silo"
    P2P = "p2p"


@dataclass(frozen=True, slots=True)
class Model:
    """prompt_tokens: of the benchmarks that do not say otherwise."""

    name: str
    folder: Callable[[], Path]
    prompt_tokens: int
    kv_bytes_per_token: int

    def pool_bytes(self, tokens: int) -> int:
        """Of the device's cache, for so many tokens. vLLM keeps one block for itself."""
        blocks = -(-tokens // CHUNK_TOKENS) + 2
        return blocks * CHUNK_TOKENS * self.kv_bytes_per_token


def _smollm2() -> Path:
    return smollm2_folder(progress=lambda line: print(line, file=sys.stderr))


MODELS = {
    # 8 layers of 4 heads of 64, keys and values, 2 bytes each
    "tiny": Model("tiny", tiny, prompt_tokens=6_000, kv_bytes_per_token=8_192),
    # 30 layers of 3 heads of 64
    "smollm2": Model("smollm2", _smollm2, prompt_tokens=5_000, kv_bytes_per_token=23_040),
}


@dataclass(frozen=True)
class Instance:
    """One engine and the node that it belongs to."""

    mode: Mode
    index: int
    engine: Engine
    nodes: Nodes | None
    others: list[Engine]  # of the same world

    def ask(self, prompt: Sequence[int], *, max_tokens: int = 1) -> Answer:
        """Once nobody computes any more: see wait_quiet."""
        return self.ask_timed(prompt, max_tokens=max_tokens)[0]

    def ask_timed(
        self, prompt: Sequence[int], *, max_tokens: int, with_stores: bool = False
    ) -> tuple[Answer, float]:
        """The answer, and the ms from the question to the last token, or until the last chunk has
        been stored. The wait for quiet is not in it.
        """
        self.wait_quiet()
        begun_s = time.perf_counter()
        answer = self.engine.generate(prompt, max_tokens=max_tokens)
        if with_stores:
            self.finish_stores()
        return answer, (time.perf_counter() - begun_s) * 1_000

    def wait_quiet(self) -> None:
        """Until no other engine of the world uses a core. The OpenMP threads of an engine spin for
        0.2 s after its last step, on the cores that this one computes on: a request right after
        one of another engine took 60 ms or 500, by chance, whatever its KV came from.
        """
        pids = [pid for engine in self.others for pid in engine.processes()]
        deadline_s = time.monotonic() + QUIET_LIMIT_S
        while True:
            before_s = cpu_s(pids)
            time.sleep(QUIET_WINDOW_S)  # what is measured is what happens in it
            if cpu_s(pids) - before_s <= QUIET_SHARE * QUIET_WINDOW_S:
                return
            assert time.monotonic() < deadline_s, "another engine does not come to rest"

    def stats(self) -> dict[str, int]:
        """kvray's counters in this engine."""
        counters: dict[str, int] = self.engine.call(in_engine.stats)["counters"]
        return counters

    def finish_stores(self) -> None:
        """Until everything it has computed is stored in the slab of its node, or was dropped."""
        if self.mode is not Mode.NONE:
            self.engine.call(in_engine.settle)

    def settle(self) -> None:
        """The same, and until the directory knows."""
        if self.mode is not Mode.NONE:
            assert self.nodes is not None
            self.finish_stores()
            self.nodes.wait_listed(self.nodes.keys(self.index))

    def forget_device(self) -> None:
        """Empty the device's own prefix cache. What the node's slab has stays."""
        assert self.engine.reset_prefix_cache()

    def warm(self, *, tokens: int, pool_tokens: int) -> None:
        """With a prompt that nothing else uses, until each block of the pool has been written."""
        prompt = prompt_of(tokens, seed=WARM_SEED + self.index)
        rounds = 1 if self.mode is Mode.NONE else -(-pool_tokens // tokens) + 1
        assert rounds <= MAX_WARM_ROUNDS
        for _ in range(rounds):
            self.ask(prompt, max_tokens=2)
            self.settle()
            self.forget_device()


@dataclass(frozen=True)
class World:
    """nodes: None where no mode needs them."""

    model: Model
    nodes: Nodes | None
    instances: Mapping[tuple[Mode, int], Instance]

    def __getitem__(self, key: tuple[Mode, int]) -> Instance:
        return self.instances[key]

    def counters(self, mode: Mode) -> dict[str, int]:
        """What kvray did for this mode's instances since their start, warm-up included: why a
        time is what it is. longest_wait_ms: of one request, for kvray.
        """
        if mode is Mode.NONE:
            return {}
        seen = [instance.stats() for instance in self.of(mode)]
        return {
            name: (max if name == "longest_wait_ms" else sum)(one[name] for one in seen)
            for name in TOLD_COUNTERS
        }

    def of(self, mode: Mode) -> list[Instance]:
        return [instance for (its, _), instance in self.instances.items() if its is mode]


@contextmanager
def running_world(
    model: Model,
    wanted: Mapping[Mode, Sequence[int]],
    *,
    slab_tokens: int,
    pool_tokens: int,
    warm_tokens: int,
    is_smoke: bool,
    say: Callable[[str], None],
    settings: Mapping[str, object] | None = None,
) -> Iterator[World]:
    """wanted: for each mode the instances, by the index of their node. settings: those of
    kvray.EngineConfig that are to differ from what users get.

    slab_tokens: what each node's slab holds at least, on top of the warm-up. pool_tokens: the same
    of each engine's device cache. warm_tokens: of the warm-up's prompt; 0 leaves it out. is_smoke:
    engines in one process, which are up sooner; users' have an EngineCore of its own.
    """
    folder = model.folder()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvray-benchmark-")))
        nodes = None
        if any(wanted.get(mode) for mode in (Mode.SILO, Mode.P2P)):
            count = 1 + max(index for indices in wanted.values() for index in indices)
            say(f"starting a Ray cluster of {count} nodes and kvray on it")
            nodes = stack.enter_context(_nodes(model, count, slab_tokens + 2 * warm_tokens))
        say(f"starting {sum(map(len, wanted.values()))} vLLM engines, half a minute each two")
        instances: dict[tuple[Mode, int], Instance] = {}
        stack.callback(_end, instances)
        for mode, indices in wanted.items():
            for index in indices:
                engine = start_engine(
                    folder,
                    folder=logs,
                    mode=EngineMode.IN_PROCESS if is_smoke else EngineMode.MULTIPROCESS,
                    environment={"VLLM_CPU_OMP_THREADS_BIND": cpu_binding()},
                    # vLLM wants room for one request of this length at least.
                    max_model_len=min(MAX_MODEL_TOKENS, pool_tokens),
                    kv_cache_memory_bytes=model.pool_bytes(pool_tokens),
                    **_connector(mode, index, nodes, settings or {}),
                )
                instances[mode, index] = Instance(mode, index, engine, nodes, [])
        for instance in instances.values():
            instance.engine.ready()
            instance.others.extend(i.engine for i in instances.values() if i is not instance)
        if nodes is not None:
            _wait_linked(nodes)
        for (mode, index), instance in instances.items():
            if warm_tokens:
                say(f"warming instance {index} of mode {mode.value}")
                instance.warm(tokens=warm_tokens, pool_tokens=pool_tokens)
        yield World(model, nodes, instances)


def _nodes(model: Model, count: int, slab_tokens: int) -> Any:
    # An eighth more: extents are cut into whole slots, and a full slab evicts before it is full.
    slab_bytes = max(256 << 20, slab_tokens * model.kv_bytes_per_token * 9 // 8)
    slab_bytes = -(-slab_bytes // (64 << 20)) * (64 << 20)
    return running_nodes(
        count, slab_bytes=slab_bytes, extent_bytes=default_extent_bytes(slab_bytes)
    )


def _connector(
    mode: Mode, index: int, nodes: Nodes | None, others: Mapping[str, object]
) -> dict[str, Any]:
    """vllm.LLM's argument that makes an engine one of this mode."""
    if mode is Mode.NONE:
        return {}
    assert nodes is not None
    # Not Nodes.transfer: that is patient, and a benchmark is about what users get.
    settings = {**nodes.cluster.engine_settings(), "node_id": nodes.node_ids[index], **others}
    if mode is Mode.SILO:
        settings["model_tag"] = f"silo-{index}"
    return {"kv_transfer_config": transfer_settings(settings)}


def cpu_binding() -> str:
    """The same cores for every engine in every mode: only one computes at a time."""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores))


def _wait_linked(nodes: Nodes) -> None:
    """Until each NodeStore has its link to each other one, so that no request pays for that."""
    others = len(nodes.node_ids) - 1
    wait_until(
        lambda: all(
            nodes.status(index)["peers_connected"] >= others for index in range(others + 1)
        ),
        what="the links between the nodes",
        limit_s=READY_LIMIT_S,
    )


def _end(instances: Mapping[tuple[Mode, int], Instance]) -> None:
    for instance in instances.values():
        instance.engine.ask_to_end()
    for instance in instances.values():
        instance.engine.close()


__all__ = [
    "CHUNK_TOKENS",
    "MODELS",
    "Instance",
    "Mode",
    "Model",
    "World",
    "full_chunks",
    "prompt_of",
    "running_world",
]
