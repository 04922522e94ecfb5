"""Two pairs of `vllm serve` on this machine, each behind an nginx of its own: one pair without
kvray, one with it (examples/behind_nginx), and vLLM's own client.

Engine i of either pair computes on core i. Only one pair has requests at a time, so both meet the
same machine; an idle engine costs half a percent of a core.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from behind_nginx.errors import SceneError
from behind_nginx.scene import Scene, behind_nginx, kvray_nodes, require_all
from behind_nginx.servers import EngineSettings
from behind_nginx.vllm_command import COMMAND
from smollm2 import smollm2_folder

from benchmarks.nginx_loads import CHUNK_TOKENS

os.environ.setdefault("RAY_worker_niceness", "0")  # as in ray_cluster.yaml
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

NAME = "smollm2"
MODES = ("none", "kvray")
KV_BYTES_PER_TOKEN = 23_040  # 30 layers of 3 heads of 64, keys and values, 2 bytes each
POOL_REQUESTS = 2  # what each engine's device cache holds
CLIENT_LIMIT_S = 1_500.0
# For the weights of all engines, with kvray and without. On small pages two engines that are alike
# were seen to multiply at speeds a tenth apart for as long as they lived, whatever they served.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
WARM_SEED = 1_000_000  # no run has it
WARM_REQUESTS = 4  # of the longest length: two an engine, which write its whole pool


@dataclass(frozen=True)
class Pairs:
    """scenes: by mode."""

    model: Path
    scenes: dict[str, Scene]

    def bench(
        self,
        mode: str,
        arguments: Sequence[str],
        *,
        seed: int,
        rate_per_s: float | None = None,
    ) -> dict[str, Any]:
        """One run of `vllm bench serve`: what it has saved, and in "tokens" those of the prompts
        (see `tokens`). rate_per_s: None is all at once. Raises SceneError if it fails.
        """
        scene = self.scenes[mode]
        if scene.cluster is not None:
            scene.cluster.clear()  # what an earlier run has stored is none of this one's
        before = tokens(scene)
        with tempfile.TemporaryDirectory(prefix="kvray-bench-") as folder:
            done = subprocess.run(  # noqa: S603 (vLLM's own client)
                [
                    *COMMAND, "bench", "serve",
                    "--backend", "vllm",
                    "--base-url", f"http://127.0.0.1:{scene.port}",
                    "--model", NAME,
                    "--tokenizer", str(self.model),
                    "--request-rate", "inf" if rate_per_s is None else str(rate_per_s),
                    "--seed", str(seed),
                    "--temperature", "0",
                    "--ignore-eos",
                    "--disable-tqdm",
                    "--save-result", "--save-detailed",
                    "--result-dir", folder,
                    "--result-filename", "result.json",
                    *arguments,
                ],
                # timed_trace makes its tokens of Python's hash of a text.
                env=os.environ | {"PYTHONHASHSEED": str(seed), "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=CLIENT_LIMIT_S, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise SceneError(f"vllm bench serve failed:\n{done.stdout[-4_000:]}")
            result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        result["tokens"] = grown(before, tokens(scene))
        return result


def tokens(scene: Scene) -> dict[str, int]:
    """Prompt tokens of both engines so far, by source, and the computed ones by the reason why;
    nothing where there is no kvray to count them.
    """
    if scene.cluster is None:
        return {}
    status = scene.cluster.status()
    return {**status.hit_tokens, **status.miss_tokens}


def grown(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """A source or reason that was not there before counts from nothing."""
    return {name: count - before.get(name, 0) for name, count in now.items()}


@contextmanager
def running_pairs(
    request_tokens: int, *, slab_tokens: int, say: Callable[[str], None]
) -> Iterator[Pairs]:
    """request_tokens: of the longest request; each device cache holds POOL_REQUESTS of them, each
    node's slab slab_tokens.
    """
    require_all(None)
    model = smollm2_folder(progress=lambda line: print(line, file=sys.stderr))
    blocks = POOL_REQUESTS * -(-request_tokens // CHUNK_TOKENS)
    settings = EngineSettings(
        model=model,
        name=NAME,
        # A token more or less: random tokens are not always themselves again after text.
        max_model_len=min(blocks * CHUNK_TOKENS, request_tokens + CHUNK_TOKENS),
        kv_cache_bytes=(blocks + 2) * CHUNK_TOKENS * KV_BYTES_PER_TOKEN,
        environment=HUGE_PAGES,
    )
    slab_bytes = -(-slab_tokens * KV_BYTES_PER_TOKEN * 9 // 8 // (64 << 20)) * (64 << 20)
    say("starting a Ray cluster of two nodes and kvray on it, then four vllm serve: two minutes")
    with (
        kvray_nodes(slab_bytes=max(slab_bytes, 256 << 20)) as cluster,
        behind_nginx(settings, cluster=None, name="engine without kvray") as none,
        behind_nginx(settings, cluster=cluster, name="engine with kvray") as ours,
    ):
        pairs = Pairs(model, {"none": none, "kvray": ours})
        say("warming all engines with prompts that nobody asks again")
        warm = ("--dataset-name", "random", "--num-prompts", str(WARM_REQUESTS))
        lengths = ("--random-input-len", str(request_tokens - 64), "--random-output-len", "2")
        for mode in MODES:
            pairs.bench(mode, (*warm, *lengths), seed=WARM_SEED)
        yield pairs


__all__ = ["MODES", "NAME", "Pairs", "SceneError", "grown", "running_pairs", "tokens"]
