"""What benchmarks/serve_routing.py runs on: Ray Serve LLM with two replicas, one a Ray node.

    serving(case, ...) ──▶ Requests ──play(scene)──▶ an Answer for each request

A replica has one core's worth of threads and there are two of them: two replicas together are as
quick as two machines would be, and what one leaves idle the other one can not use.
"""

import contextlib
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import ray
from openai import OpenAI
from ray import serve
from smollm2 import smollm2_folder

from kvray.serve import enable
from kvray.serve.decisions import BOUNDS_MS, METRIC, percentile_ms
from tests.ray_nodes import PATIENT, Nodes, wait_until
from tests.serve_app import (
    INGRESS,
    MODEL_ID,
    ONE_A_NODE,
    ROUND_ROBIN,
    free_port,
    replica_logs,
    shared_memory,
)

# As in ray_cluster.yaml: without it Ray's workers, and so the NodeStores, run with niceness 15.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__all__ = [
    "CASES",
    "KVRAY",
    "SLAB_BYTES",
    "Answer",
    "Case",
    "Message",
    "decisions_ms",
    "serving",
    "smollm2_folder",
]

AFFINITY = "ray.serve.llm.request_router:PrefixCacheAffinityRouter"
KVRAY = "kvray.serve.router:KVRayRouter"
POOL_BYTES = 512 << 20  # of a device: all that is asked about fits, so affinity alone loses nothing
KV_BYTES_PER_TOKEN = 23_040  # of SmolLM2-135M in bfloat16
SLAB_BYTES = 1 << 30
ANSWER_TOKENS = 8
REQUEST_LIMIT_S = 180.0  # a scene ends a minute after its last arrival, or something is wrong
LOOK_S = 3.0  # a look of the router at what engines have measured falls into it
SCRAPE_LIMIT_S = 60.0  # Ray's reporter has a period of ten seconds
SAMPLE = re.compile(rf'^ray_{METRIC}_bucket{{.*?le="([^"]+)".*?}} ([0-9.e+]+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Case:
    router: str
    router_class: str
    has_kvray: bool

    @property
    def name(self) -> str:
        return f"{self.router} + kvray" if self.has_kvray else self.router


CASES = (
    Case("round-robin", ROUND_ROBIN, has_kvray=False),
    Case("affinity", AFFINITY, has_kvray=False),
    Case("round-robin", ROUND_ROBIN, has_kvray=True),
    Case("affinity", AFFINITY, has_kvray=True),
    # Without kvray no directory answers, and it is two choices: no case of its own.
    Case("KVRayRouter", KVRAY, has_kvray=True),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One request: when it comes, in s from the scene's begin, and what it says."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """failure: what went wrong, "" if nothing did."""

    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int
    failure: str = ""


class Requests:
    """A client of the running application."""

    def __init__(self, port: int) -> None:
        self._openai = OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="none",
            timeout=REQUEST_LIMIT_S,
            max_retries=0,
        )

    def play(self, messages: Sequence[Message]) -> list[Answer]:
        """Each at its time, whether those before it have been answered or not."""
        answers: list[Answer | None] = [None] * len(messages)

        def ask(index: int) -> None:
            answers[index] = self.ask(messages[index].text)

        threads = []
        begun_s = time.monotonic()
        for index, message in enumerate(messages):
            time.sleep(max(0.0, begun_s + message.at_s - time.monotonic()))
            threads.append(threading.Thread(target=ask, args=(index,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return [answer for answer in answers if answer is not None]

    def ask(self, text: str) -> Answer:
        begun_s = time.perf_counter()
        first_s, usage = 0.0, None
        try:
            for chunk in self._openai.chat.completions.create(
                model=MODEL_ID,
                messages=[{"role": "user", "content": text}],
                max_tokens=ANSWER_TOKENS,
                temperature=0.0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                if chunk.choices and chunk.choices[0].delta.content:
                    first_s = first_s or time.perf_counter()
                usage = chunk.usage or usage
        except Exception as exc:  # noqa: BLE001 (whatever it is, it is a failed request)
            return Answer(0.0, 0, 0, f"{type(exc).__name__}: {exc}")
        if usage is None or not first_s:
            return Answer(0.0, 0, 0, "no token came")
        details = usage.prompt_tokens_details
        cached_tokens = (details.cached_tokens or 0) if details else 0
        return Answer((first_s - begun_s) * 1_000, usage.prompt_tokens, cached_tokens)


@contextmanager
def serving(case: Case, model: Path, nodes: Nodes, warm_up: Sequence[str]) -> Iterator[Requests]:
    """Two fresh replicas with empty caches. warm_up: unrelated texts, which both are asked."""
    from ray.serve.llm import build_openai_app

    nodes.cluster.clear()
    port = free_port()
    segments: set[str] = set()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = _config(case, model)
        serve.run(build_openai_app({"llm_configs": [config], "ingress_deployment_config": INGRESS}))
        segments |= shared_memory()
        requests = Requests(port)
        for text in warm_up:
            answer = requests.ask(text)
            if answer.failure:
                raise RuntimeError(f"{case.name} does not answer: {answer.failure}")
        if case.router_class == KVRAY:
            wait_until(lambda: "ranks by cost: 2 nodes" in replica_logs(), what="the first look")
            time.sleep(LOOK_S)
        yield requests
    finally:
        segments |= shared_memory()
        serve.shutdown()
        for path in segments:
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()


def decisions_ms(count: int) -> dict[str, float]:
    """The bounds below which half and 99 of 100 of the router's decisions were, out of Ray's
    metrics, and how many there are. count: so many at least have been made.
    """
    counts: list[int] = []

    def is_told() -> bool:
        counts[:] = _decision_counts()
        return sum(counts) >= count

    wait_until(is_told, what="the router's metrics", limit_s=SCRAPE_LIMIT_S)
    return {"p50": percentile_ms(counts, 50), "p99": percentile_ms(counts, 99), "n": sum(counts)}


def _decision_counts() -> list[int]:
    below: dict[float, float] = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        for bound, value in SAMPLE.findall(text):
            bound_ms = float(bound.replace("+Inf", "inf"))
            below[bound_ms] = below.get(bound_ms, 0.0) + float(value)
    totals = [below.get(bound_ms, 0.0) for bound_ms in (*BOUNDS_MS, float("inf"))]
    return [round(now - before) for now, before in zip(totals, [0.0, *totals[:-1]], strict=True)]


def _config(case: Case, model: Path) -> Any:
    from ray.serve.llm import LLMConfig

    router: dict[str, Any] = {"request_router_class": case.router_class}
    if case.router_class == KVRAY:
        router["request_router_kwargs"] = {
            "device_tokens": POOL_BYTES // KV_BYTES_PER_TOKEN,
            "slab_tokens": SLAB_BYTES // KV_BYTES_PER_TOKEN,
        }
    config = LLMConfig(
        model_loading_config={"model_id": MODEL_ID, "model_source": str(model)},
        placement_group_config=ONE_A_NODE,
        deployment_config={
            "num_replicas": 2,
            "autoscaling_config": None,
            "request_router_config": router,
        },
        engine_kwargs={
            "enforce_eager": True,
            "max_model_len": 8_192,
            "dtype": "bfloat16",
            "kv_cache_memory_bytes": POOL_BYTES,
            "enable_prompt_tokens_details": True,
        },
        # Serve gathers tokens of a stream for 50 ms before it passes them on.
        experimental_configs={"stream_batching_interval_ms": 0},
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}},
    )
    return enable(config, **PATIENT) if case.has_kvray else config
