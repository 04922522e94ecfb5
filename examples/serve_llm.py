"""Ray Serve LLM: two replicas of one deployment, on two nodes. What one has read, the other knows.

    client ──HTTP──▶ Serve's OpenAI endpoint ──▶ replica on node 1 ──▶ replica on node 2 ──▶ ...
                                                  in turn: Ray's RoundRobinRouter

    the first question about a document   computed by whoever's turn it is         cold
    the second                            by the other one, from the first's KV    peer hit
    the third                             by the first one, its own device cache   device hit

Each request goes the way of any user's; round robin only makes it known beforehand that the next
one meets the other replica, and the NodeStores' counters tell afterwards that it did.

Everything is real and on this machine: a Ray cluster of two nodes, vLLM on the CPU, SmolLM2-135M.
`--json` ends with one line for scripts. Exit code 1 if a replica computed what it should have
fetched, or if cold is less than 20 times a peer hit.
"""

import argparse
import json
import logging
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

import kvray
from kvray.serve import enable

sys.path.insert(0, str(Path(__file__).parent))
from smollm2 import smollm2_folder

DOCUMENT = Path(__file__).parent / "data" / "constitution.txt"
QUESTION = "How long does a Senator serve, and how many Senators does each State have?"
WARM_UP = "Write one sentence about a lighthouse that stands on a small island in the north. " * 12
MODEL_ID = "smollm2"
CHUNK_TOKENS = 128  # vLLM's block on the CPU, and so a chunk of kvray there
SLAB_BYTES = 1 << 30  # per node; a document needs 118 MB
ENGINE_KV_BYTES = 512 << 20
ANSWER_TOKENS = 16
MIN_COLD_OVER_PEER = 20.0
MAX_REPEATS = 3  # of a prompt that a busy machine has dropped a part of
# Both engines share the cores of this machine, and the OpenMP threads of one go on spinning for
# 0.2 s after its last step. One question at a time is measured.
QUIET_S = 0.5
DEADLINE_S = 60.0
WAYS = ("cold", "peer_hit", "device_hit")

console = Console(stderr=True)


@dataclass(frozen=True)
class Answer:
    """ttft_ms: from the request to the first token, at the client. node: who answered. sources:
    prompt tokens by where they came from.
    """

    text: str
    prompt_tokens: int
    ttft_ms: float
    node: str
    sources: dict[str, int]


def application(model: Path) -> serve.Application:
    """Two replicas of one model; `enable` is all that kvray needs."""
    from ray.serve.llm import LLMConfig, build_openai_app

    config = enable(
        LLMConfig(
            model_loading_config={"model_id": MODEL_ID, "model_source": str(model)},
            # With the one of the replica's own, both CPUs that Ray sees on a node: one a node.
            placement_group_config={"bundles": [{"CPU": 1}]},
            deployment_config={
                "num_replicas": 2,
                "autoscaling_config": None,
                "request_router_config": {
                    "request_router_class": (
                        "ray.serve.experimental.round_robin_router:RoundRobinRouter"
                    )
                },
            },
            engine_kwargs={
                "enforce_eager": True,
                "max_model_len": 8_192,
                "dtype": "bfloat16",
                "kv_cache_memory_bytes": ENGINE_KV_BYTES,
            },
            # Serve gathers tokens of a stream for 50 ms before it passes them on.
            experimental_configs={"stream_batching_interval_ms": 0},
            runtime_env={
                "env_vars": {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
            },
        )
    )
    ingress = {
        "num_replicas": 1,  # who goes round, so there is one round
        "autoscaling_config": None,
        "ray_actor_options": {"num_cpus": 0},
    }
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})


@contextmanager
def two_nodes() -> Iterator[kvray.Cluster]:
    """A Ray cluster of two nodes with kvray and Serve on it; all of it is gone afterwards."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        nodes.add_node(num_cpus=2)
        nodes.wait_for_nodes()
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
        cluster = kvray.start(kvray.Config(slab_bytes=SLAB_BYTES))
        try:
            cluster.wait_ready(2, deadline_s=DEADLINE_S)
            yield cluster
        finally:
            serve.shutdown()
            cluster.stop()
    finally:
        ray.shutdown()
        nodes.shutdown()


class Client:
    """Asks over HTTP, and looks at kvray's counters to tell who answered out of which cache."""

    def __init__(self, cluster: kvray.Cluster, port: int) -> None:
        from openai import OpenAI

        self._cluster = cluster
        for name in ("httpx", "httpx2"):  # OpenAI's client uses one of them: a line a request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._openai = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def ask(self, document: str, question: str) -> Answer:
        before = self.tokens()
        began_s = time.perf_counter()
        first_s, text, prompt_tokens = 0.0, "", 0
        for chunk in self._openai.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": f"{document}\n\n{question}".strip()}],
            max_tokens=ANSWER_TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if chunk.choices and chunk.choices[0].delta.content:
                first_s = first_s or time.perf_counter()
                text += chunk.choices[0].delta.content
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
        node, sources = self._counted(before, prompt_tokens)
        time.sleep(QUIET_S)
        return Answer(text, prompt_tokens, (first_s - began_s) * 1_000, node, sources)

    def tokens(self) -> dict[str, dict[str, int]]:
        """Of each node: the prompt tokens of its engines, by source."""
        return {
            node.node_id: {
                source: node.details["engine_totals"].get(counter, 0)
                for source, counter in (
                    ("device", "hit_tokens_device"),
                    ("local", "hit_tokens_local"),
                    ("peer", "hit_tokens_peer"),
                    ("computed", "computed_tokens"),
                )
            }
            for node in self._cluster.nodes()
        }

    def _counted(
        self, before: dict[str, dict[str, int]], prompt_tokens: int
    ) -> tuple[str, dict[str, int]]:
        """An engine tells its NodeStore within a moment of a request's end."""
        end_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < end_s:
            for node, now in self.tokens().items():
                grown = {source: now[source] - before[node][source] for source in now}
                if sum(grown.values()) >= prompt_tokens:
                    return node, grown
            time.sleep(0.05)
        raise TimeoutError("no NodeStore has heard of this request: do the replicas have one?")


def measure(client: Client, cluster: kvray.Cluster, document: str) -> list[Answer]:
    """Three answers about a fresh document, as WAYS has them."""
    before = blocks(cluster)
    cold = client.ask(document, QUESTION)
    whole = cold.prompt_tokens // CHUNK_TOKENS
    wait_until(lambda: blocks(cluster) >= before + whole, "the store of a prompt")
    return [cold, client.ask(document, QUESTION), client.ask(document, QUESTION)]


def is_as_told(answers: list[Answer]) -> bool:
    """Who answered, out of what; a busy machine drops a store or a look-up now and then."""
    cold, peer, device = answers
    whole = cold.prompt_tokens // CHUNK_TOKENS * CHUNK_TOKENS
    return (
        (cold.node == device.node != peer.node)
        and cold.sources["computed"] == cold.prompt_tokens
        and peer.sources["peer"] == whole
        and device.sources["device"] == whole
        and peer.text == device.text
    )


def run(cluster: kvray.Cluster, port: int, prompts: int) -> dict[str, Any]:
    client = Client(cluster, port)
    with console.status("warming both replicas with an unrelated prompt"):
        turns = [client.ask("", WARM_UP).node for _ in range(4)]
        if len(set(turns)) != 2:  # noqa: PLR2004 (two replicas)
            raise RuntimeError(f"the replicas did not take turns: {turns}")
        wait_until(
            lambda: all(node.peer_count for node in cluster.nodes()), "the link of the two nodes"
        )
    text = DOCUMENT.read_text()
    samples: list[list[Answer]] = []
    repeated = 0
    for number in range(prompts + MAX_REPEATS):
        document = f"Copy {number} of the document.\n{text}"
        with console.status(
            f"document {len(samples) + 1} of {prompts}: cold, peer hit, device hit"
        ):
            answers = measure(client, cluster, document)
        for way, answer in zip(WAYS, answers, strict=True):
            came = ", ".join(
                f"{count:,} {source}" for source, count in answer.sources.items() if count
            )
            console.print(
                f"{way:>10}  {answer.ttft_ms:7,.0f} ms  node {answer.node[:8]}  tokens: {came}",
                highlight=False,
            )
        if is_as_told(answers):
            samples.append(answers)
        else:
            repeated += 1
            console.print("[yellow]not as told: this one is repeated[/]")
        if len(samples) == prompts:
            break
    return summary(samples, repeated)


def summary(samples: list[list[Answer]], repeated: int) -> dict[str, Any]:
    times = {way: [row[n].ttft_ms for row in samples] for n, way in enumerate(WAYS)}
    median = {way: statistics.median(values) for way, values in times.items() if values}
    return {
        "prompts": len(samples),
        "repeated": repeated,
        "prompt_tokens": samples[0][0].prompt_tokens if samples else 0,
        **{f"{way}_ttft_ms": round(ms, 1) for way, ms in median.items()},
        "cold_over_peer": round(median["cold"] / median["peer_hit"], 1) if samples else 0.0,
        "samples_ms": {way: [round(ms, 1) for ms in values] for way, values in times.items()},
    }


def blocks(cluster: kvray.Cluster) -> int:
    return sum(node.block_count for node in cluster.nodes())


def wait_until(condition: Any, what: str) -> None:  # noqa: ANN401 (a function without arguments)
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what} did not come within {DEADLINE_S:.0f} s")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def show(result: dict[str, Any]) -> None:
    table = Table(
        "the prompt's KV comes from", "time to first token", "cold is so much slower",
        title=f"Ray Serve LLM, two replicas of SmolLM2-135M, {result['prompt_tokens']:,} tokens, "
        f"medians of {result['prompts']}",
    )  # fmt: skip
    for name, way in (
        ("nowhere: the replica computes it (cold)", "cold"),
        ("the other replica's node (peer hit)", "peer_hit"),
        ("the replica's own device cache", "device_hit"),
    ):
        ms = result[f"{way}_ttft_ms"]
        table.add_row(name, f"{ms:,.0f} ms", f"{result['cold_ttft_ms'] / ms:,.0f} x")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=5, help="documents to ask about")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    model = smollm2_folder()
    port = free_port()
    console.print("starting a Ray cluster of two nodes, and kvray on it")
    with two_nodes() as cluster:
        console.print("starting Serve and two replicas (one to two minutes)")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(model))
        result = run(cluster, port, arguments.prompts)
    good = result["prompts"] == arguments.prompts and result["cold_over_peer"] >= MIN_COLD_OVER_PEER
    if result["prompts"]:
        show(result)
    if not good:
        console.print(
            f"[red]expected {arguments.prompts} documents, cold at least {MIN_COLD_OVER_PEER:.0f} "
            "times a peer hit[/]"
        )
    if arguments.json:
        print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
