"""The demo: two Ray nodes, two engines, one document. The second engine does not read it again.

    engine A (node 1)   reads the document, answers        pays for the prefill: cold
                        the same question again            its own device cache: device hit
    engine B (node 2)   the same question                  A's blocks, over NIXL: peer hit
                        another question on the same text

Everything is real and on this machine: a Ray cluster of two nodes, vLLM on the CPU, SmolLM2-135M.
`--json` ends with one line for scripts. Exit code 1 if B computed what it should have fetched.
"""

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

import kvray
from kvray.watch.tables import status_view

sys.path.insert(0, str(Path(__file__).parent))
from smollm2 import smollm2_folder

DOCUMENT = Path(__file__).parent / "data" / "constitution.txt"
QUESTION = "How long does a Senator serve, and how many Senators does each State have?"
OTHER_QUESTION = "How old must a person be to become President?"
WARM_UP = "Write one sentence about a lighthouse that stands on a small island in the north. " * 12
CHUNK_TOKENS = 128  # vLLM's block on the CPU, and so a chunk of kvray there
SLAB_BYTES = 1 << 30  # per node; the document needs 118 MB
ENGINE_KV_BYTES = 512 << 20
ANSWER_TOKENS = 32
# Both engines share the cores of this machine, and the OpenMP threads of one go on spinning for
# 0.2 s after its last step. One question at a time is measured.
QUIET_S = 0.5
READY_DEADLINE_S = 60.0

console = Console(stderr=True)


@dataclass(frozen=True)
class Answer:
    """One answered request. ttft_ms: from arrival to the first token, taken in the engine."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float


class Engine:
    """A vLLM engine in a Ray actor, attached to kvray after its start."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            enforce_eager=True,
            max_model_len=8_192,
            dtype="bfloat16",
            kv_cache_memory_bytes=ENGINE_KV_BYTES,
            disable_log_stats=False,  # for the time to the first token
        )
        self._attachment = kvray.attach(self._llm)

    def answer(self, document: str, question: str) -> Answer:
        from vllm import SamplingParams

        tokenizer = self._llm.get_tokenizer()
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{document}\n\n{question}".strip()}],
            tokenize=False,
            add_generation_prompt=True,
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
        (output,) = self._llm.generate(prompt, sampling, use_tqdm=False)
        return Answer(
            text=output.outputs[0].text.strip(),
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.num_cached_tokens,
            ttft_ms=output.metrics.first_token_latency * 1_000,
        )

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self._attachment.stats().counters
        return counters


def start_engines(model: Path, node_ids: list[str]) -> list[Any]:
    """One engine per Ray node, both at once; each start takes half a minute."""
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    actor = ray.remote(num_cpus=1)(Engine)
    return [
        actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env={"env_vars": environment},
        ).remote(str(model))
        for node_id in node_ids
    ]


def run(cluster: kvray.Cluster, model: Path, node_ids: list[str]) -> dict[str, Any]:
    document = DOCUMENT.read_text()
    with console.status("starting two vLLM engines (about half a minute)"):
        a, b = start_engines(model, node_ids)
        ray.get([engine.counters.remote() for engine in (a, b)])
    with console.status("warming both engines with an unrelated prompt"):
        for engine in (a, b):
            ray.get(engine.answer.remote("", WARM_UP))
        wait_connected(cluster)
    with console.status(f"engine A reads the document: {QUESTION}"):
        cold = ray.get(a.answer.remote(document, QUESTION))
    console.print(f"[bold]A[/] (cold, {cold.ttft_ms:,.0f} ms): {cold.text}")
    time.sleep(QUIET_S)
    device = ray.get(a.answer.remote(document, QUESTION))
    time.sleep(QUIET_S)
    before = ray.get(b.counters.remote())
    fetch_before = details(cluster, node_ids[1])["fetch"]
    peer = ray.get(b.answer.remote(document, QUESTION))
    after = ray.get(b.counters.remote())
    fetch = details(cluster, node_ids[1])["fetch"]
    peer_bytes = fetch["fetched_bytes"] - fetch_before["fetched_bytes"]
    busy_ms = max(1, fetch["fetch_busy_ms"] - fetch_before["fetch_busy_ms"])
    console.print(f"[bold]B[/] (from A's node, {peer.ttft_ms:,.0f} ms): {peer.text}")
    other = ray.get(b.answer.remote(document, OTHER_QUESTION))
    console.print(f"[bold]B[/] ({OTHER_QUESTION}): {other.text}")

    return {
        "prompt_tokens": peer.prompt_tokens,
        "cold_ttft_ms": round(cold.ttft_ms, 1),
        "device_hit_ttft_ms": round(device.ttft_ms, 1),
        "peer_hit_ttft_ms": round(peer.ttft_ms, 1),
        "peer_hit_tokens": after["hit_tokens_peer"] - before["hit_tokens_peer"],
        "peer_bytes": peer_bytes,
        "fetch_gb_per_s": round(peer_bytes / busy_ms / 1e6, 2),
        "same_answer": peer.text == device.text and peer.cached_tokens == device.cached_tokens,
    }


def details(cluster: kvray.Cluster, node_id: str) -> dict[str, Any]:
    """What the NodeStore of one node says of itself."""
    (node,) = (node for node in cluster.nodes() if node.node_id == node_id)
    return node.details


def wait_connected(cluster: kvray.Cluster) -> None:
    """Until each NodeStore has made its link to the other, so that no request pays for that."""
    end_s = time.monotonic() + READY_DEADLINE_S
    while any(node.details["peers_connected"] < 1 for node in cluster.nodes()):
        if time.monotonic() > end_s:
            raise TimeoutError("the two NodeStores do not reach each other")
        time.sleep(0.05)


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"SmolLM2-135M, a prompt of {result['prompt_tokens']:,} tokens")
    table.add_column("the prompt's KV comes from")
    table.add_column("time to first token", justify="right")
    table.add_column("cold is so much slower", justify="right")
    for name, key in (
        ("nowhere: engine A computes it (cold)", "cold_ttft_ms"),
        ("engine A's own device cache", "device_hit_ttft_ms"),
        ("the other node's slab (peer hit)", "peer_hit_ttft_ms"),
    ):
        factor = result["cold_ttft_ms"] / result[key]
        table.add_row(name, f"{result[key]:,.0f} ms", f"{factor:,.0f} x")
    console.print(table)
    console.print(
        f"{result['peer_hit_tokens']:,} tokens ({result['peer_bytes'] / 1e6:,.0f} MB) came from "
        f"the peer at {result['fetch_gb_per_s']} GB/s; the same answer: {result['same_answer']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    as_json = parser.parse_args().json
    model = smollm2_folder()
    with console.status("starting a Ray cluster of two nodes and kvray on it"):
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        nodes.add_node(num_cpus=2)
        nodes.wait_for_nodes()
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
        cluster = kvray.start(kvray.Config(slab_bytes=SLAB_BYTES))
        cluster.wait_ready(2, deadline_s=READY_DEADLINE_S)
    try:
        node_ids = [node["NodeID"] for node in ray.nodes()]
        result = run(cluster, model, node_ids)
        status = cluster.status()
    finally:
        cluster.stop()
        ray.shutdown()
        nodes.shutdown()
    result |= {"hit_tokens": status.hit_tokens, "miss_tokens": status.miss_tokens}
    show(result)
    console.print("\nWhat `kvray status` says of it:", status_view(status))
    full_chunks = result["prompt_tokens"] // CHUNK_TOKENS * CHUNK_TOKENS
    good = result["peer_hit_tokens"] == full_chunks and result["same_answer"]
    if not good:
        console.print(f"[red]B should have fetched {full_chunks} tokens and answered like A[/]")
    if as_json:
        print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
