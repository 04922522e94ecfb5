"""Two `vllm serve` with kvray behind nginx on this machine: start all, prove it, end all.

    python examples/behind_nginx [--json]     prompts through nginx, then the end
    python examples/behind_nginx start        stays until Ctrl-C

    the first question about a document   computed by the engine whose turn it is    cold
    the second                            by the other one, from the first's KV      peer hit
    the third                             by the first one, its own device cache     device hit

Everything is real: nginx, vLLM on the CPU with SmolLM2-135M, a Ray cluster of two nodes, kvray.
Exit code 1 if an engine computed what it should have fetched or answered something else, 2 if
something is missing (it says what).
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table
from smollm2 import smollm2_folder

from behind_nginx.asking import Answer, Client
from behind_nginx.errors import SceneError
from behind_nginx.scene import DEADLINE_S, ENGINES, Scene, behind_nginx, kvray_nodes, require_all
from behind_nginx.servers import EngineSettings

DOCUMENT = Path(__file__).resolve().parent.parent / "data" / "constitution.txt"
QUESTION = "How long does a Senator serve, and how many Senators does each State have?"
WARM_UP = "Write one sentence about a lighthouse that stands on a small island in the north. " * 12
NAME = "smollm2"
CHUNK_TOKENS = 128  # vLLM's block on the CPU, and so a chunk of kvray there
SLAB_BYTES = 1 << 30  # per node; a document needs 118 MB
ENGINE_KV_BYTES = 512 << 20
ANSWER_TOKENS = 16
MAX_REPEATS = 3  # of a document that a busy machine has dropped a part of
WAYS = ("cold", "peer_hit", "device_hit")
WATCH_PERIOD_S = 1.0

console = Console(stderr=True)


def measure(client: Client, scene: Scene, document: str) -> list[Answer]:
    """Three answers about a fresh document, as WAYS has them."""
    question = f"{document}\n\n{QUESTION}"
    before = blocks(scene)
    cold = client.ask(question, max_tokens=ANSWER_TOKENS)
    wait_stored(scene, before + cold.prompt_tokens // CHUNK_TOKENS)
    return [cold, *(client.ask(question, max_tokens=ANSWER_TOKENS) for _ in WAYS[1:])]


def is_as_told(answers: list[Answer]) -> bool:
    """Who answered, out of what. A busy machine drops a store or a look-up now and then."""
    cold, peer, device = answers
    whole = cold.prompt_tokens // CHUNK_TOKENS * CHUNK_TOKENS
    return (
        cold.node == device.node != peer.node
        and cold.sources["computed"] == cold.prompt_tokens
        and peer.sources["peer"] == whole
        and device.sources["device"] == whole
        and peer.text == device.text
    )


def prove(scene: Scene, documents: int) -> dict[str, Any]:
    client = Client(scene, model=NAME)
    for _ in range(ENGINES):
        client.ask(WARM_UP, max_tokens=2)
    text = DOCUMENT.read_text()
    samples: list[list[Answer]] = []
    tried = 0
    while len(samples) < documents and tried < documents + MAX_REPEATS:
        tried += 1
        answers = measure(client, scene, f"Copy {tried} of the document.\n{text}")
        for way, answer in zip(WAYS, answers, strict=True):
            tell(way, answer)
        if is_as_told(answers):
            samples.append(answers)
        else:
            console.print("[yellow]not as told: again, with another document[/]")
    return summary(samples, documents=documents, tried=tried)


def summary(samples: list[list[Answer]], *, documents: int, tried: int) -> dict[str, Any]:
    times = {way: [row[n].ttft_ms for row in samples] for n, way in enumerate(WAYS)}
    median = {way: statistics.median(values) for way, values in times.items() if values}
    return {
        "good": len(samples) == documents,
        "documents": len(samples),
        "repeated": tried - len(samples),
        "prompt_tokens": samples[0][0].prompt_tokens if samples else 0,
        "peer_hit_tokens": sum(peer.sources["peer"] for _, peer, _ in samples),
        "same_answers": sum(peer.text == device.text for _, peer, device in samples),
        **{f"{way}_ttft_ms": round(ms, 1) for way, ms in median.items()},
        "cold_over_peer": round(median["cold"] / median["peer_hit"], 1) if samples else 0.0,
    }


def tell(way: str, answer: Answer) -> None:
    came = ", ".join(f"{count:,} {source}" for source, count in answer.sources.items() if count)
    console.print(
        f"{way:>10}  {answer.ttft_ms:7,.0f} ms  node {answer.node[:8]}  tokens: {came}",
        highlight=False,
    )


def show(result: dict[str, Any]) -> None:
    table = Table(
        "the prompt's KV comes from", "time to first token", "cold is so much slower",
        title=f"two vllm serve behind nginx, {result['prompt_tokens']:,} tokens, medians of "
        f"{result['documents']}",
    )  # fmt: skip
    for name, way in (
        ("nowhere: the engine computes it (cold)", "cold"),
        ("the other engine's node (peer hit)", "peer_hit"),
        ("the engine's own device cache", "device_hit"),
    ):
        ms = result[f"{way}_ttft_ms"]
        table.add_row(name, f"{ms:,.0f} ms", f"{result['cold_ttft_ms'] / ms:,.0f} x")
    console.print(table)


def stay(scene: Scene) -> None:
    """Until Ctrl-C. Raises SceneError when a service ends by itself."""
    import ray

    address = ray.get_runtime_context().gcs_address
    console.print(
        f"serving on http://127.0.0.1:{scene.port}/v1 (Ctrl-C ends all). Try:\n"
        f"  curl http://127.0.0.1:{scene.port}/v1/completions -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{NAME}", "prompt": "Once", "max_tokens": 8}}'\n"""
        f"  RAY_ADDRESS={address} kvray status",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    while not (ended := scene.ended()):
        time.sleep(WATCH_PERIOD_S)
    raise SceneError(f"{', '.join(ended)} ended by itself")


def blocks(scene: Scene) -> int:
    assert scene.cluster is not None
    return sum(node.block_count for node in scene.cluster.nodes())


def wait_stored(scene: Scene, block_count: int) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while blocks(scene) < block_count and time.monotonic() < end_s:
        time.sleep(0.05)  # what does not come is seen by who asks for it


def interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="behind_nginx", description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("demo", "start"), default="demo")
    parser.add_argument("--port", type=int, default=8_000, help="of nginx, on loopback")
    parser.add_argument("--documents", type=int, default=3, help="to ask about; of demo")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; of demo")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("RAY_worker_niceness", "0")  # as in ray_cluster.yaml
    try:
        require_all(arguments.port)
        settings = EngineSettings(
            model=smollm2_folder(progress=console.print),
            name=NAME,
            max_model_len=8_192,
            kv_cache_bytes=ENGINE_KV_BYTES,
        )
        console.print("starting a Ray cluster of two nodes, and kvray on it")
        with kvray_nodes(slab_bytes=SLAB_BYTES) as cluster:
            console.print("starting two vllm serve, and nginx in front (a minute or two)")
            with behind_nginx(settings, cluster=cluster, port=arguments.port) as scene:
                if arguments.mode == "start":
                    stay(scene)
                result = prove(scene, arguments.documents)
    except SceneError as exc:
        console.print(str(exc), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("ended")
        return 0 if arguments.mode == "start" else 130
    if result["documents"]:
        show(result)
    if not result["good"]:
        console.print(f"[red]expected {arguments.documents} documents answered as told[/]")
    if arguments.json:
        print(json.dumps(result))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
