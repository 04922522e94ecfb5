"""Which replica a request goes to, in Ray Serve itself: two replicas of SmolLM2-135M on two Ray
nodes, the same requests behind each router, with kvray and without.

    .venv-ray-llm/bin/python benchmarks/serve_routing.py [--quick] [--json]

    documents   conversations about several documents, more turns than one each, at random times:
                who keeps a document where it was read computes it once, and so does who shares
    hot         one document that was read before, about which everybody asks at once, faster than
                one replica answers: who keeps it where it was read lets the other replica idle

Requests come at their times, whether those before have been answered or not. Time to the first
token is the client's, with the queue; tokens that were computed are vLLM's count of the prompts'
tokens that no cache had. One run of each case, in turn, each with fresh replicas. KVRayRouter
without kvray is no case: no directory answers, and it is two choices, as Serve's own router.
"""

import argparse
import logging
import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, at_most
from benchmarks.measure import finish, percentile
from benchmarks.serve_routing_world import (
    CASES,
    KVRAY,
    SLAB_BYTES,
    Answer,
    Case,
    Message,
    decisions_ms,
    serving,
    smollm2_folder,
)
from tests.engines import ROOT
from tests.ray_nodes import running_nodes

TEXT = ROOT / "examples" / "data" / "constitution.txt"
DOCUMENT_WORDS = 1_300  # about 1,550 tokens, three seconds of a core
DOCUMENTS, QUICK_DOCUMENTS = 5, 2
TURNS, QUICK_TURNS = 3, 2
TURN_WORDS = 30
MEAN_GAP_S = 2.5  # round-robin without kvray then computes for about six tenths of the time
HOT_REQUESTS, QUICK_HOT_REQUESTS = 24, 6
HOT_WORDS = 200  # of a question: 250 tokens, half a second of a core
HOT_GAP_S = 0.7  # more than one replica answers, less than two
WARM_UPS, WARM_WORDS = 6, 250
MAX_DECISION_MS = 2.0
SEED = 6

console = Console(stderr=True)


class Writer:
    """Texts of words of a real one, in random order, so that no two begin alike."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._words = TEXT.read_text().split()

    def text(self, words: int) -> str:
        return " ".join(self._dice.choices(self._words, k=words))


def documents_scene(count: int, turns: int) -> list[Message]:
    """Each prompt is all that was said so far; what the model has said is made up, the same for
    all. First turns, then second ones, each time in another order.
    """
    writer, dice = Writer(SEED), random.Random(SEED)
    said = [writer.text(DOCUMENT_WORDS) for _ in range(count)]
    messages, at_s = [], 0.0
    for _ in range(turns):
        for number in dice.sample(range(count), count):
            said[number] += f"\n\n{writer.text(TURN_WORDS)}"
            messages.append(Message(at_s, said[number]))
            at_s += dice.expovariate(1 / MEAN_GAP_S)
    return messages


def hot_scene(count: int) -> tuple[str, list[Message]]:
    """What was read before, and the questions."""
    writer = Writer(SEED + 1)
    document = writer.text(DOCUMENT_WORDS)
    return document, [
        Message(i * HOT_GAP_S, f"{document}\n\n{writer.text(HOT_WORDS)}") for i in range(count)
    ]


def measure(cases: tuple[Case, ...], *, is_quick: bool) -> dict[str, Any]:
    counts = (
        (QUICK_DOCUMENTS, QUICK_TURNS, QUICK_HOT_REQUESTS)
        if is_quick
        else (DOCUMENTS, TURNS, HOT_REQUESTS)
    )
    documents = documents_scene(counts[0], counts[1])
    document, hot = hot_scene(counts[2])
    writer = Writer(SEED + 2)
    warm_up = [writer.text(WARM_WORDS) for _ in range(WARM_UPS)]
    model = smollm2_folder(console.print)
    rows: list[dict[str, Any]] = []
    decisions: dict[str, float] = {}
    with running_nodes(2, slab_bytes=SLAB_BYTES) as nodes:
        for case in cases:
            console.print(f"[bold]{case.name}[/]: two replicas start")
            with serving(case, model, nodes, warm_up) as requests:
                rows.append(row(case, "documents", requests.play(documents)))
                requests.ask(document)
                rows.append(row(case, "hot", requests.play(hot)))
                if case.router_class == KVRAY:
                    decisions = decisions_ms(len(documents) + len(hot))
            for done in rows[-2:]:
                console.print(f"  {done}", highlight=False)
    return {
        "model": "SmolLM2-135M",
        "replicas": 2,
        "document_tokens": documents_tokens(rows),
        "decision_ms_at_most": decisions,
        "rows": rows,
    }


def row(case: Case, scene: str, answers: list[Answer]) -> dict[str, Any]:
    good = [answer for answer in answers if not answer.failure]
    for answer in answers:
        if answer.failure:
            console.print(f"[red]failed[/] {case.name}, {scene}: {answer.failure}")
    times = [answer.ttft_ms for answer in good] or [0.0]
    return {
        "scene": scene,
        "router": case.router,
        "kvray": "yes" if case.has_kvray else "no",
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "mean_ttft_ms": round(statistics.mean(times)),
        "p99_ttft_ms": round(percentile(times, 99)),
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "computed_tokens": sum(answer.prompt_tokens - answer.cached_tokens for answer in good),
    }


def documents_tokens(rows: list[dict[str, Any]]) -> int:
    """Of one prompt about a document, on average."""
    first = next(found for found in rows if found["scene"] == "documents")
    return int(first["prompt_tokens"] // max(1, first["requests"]))


def bars(result: dict[str, Any]) -> list[Bar]:
    failed = sum(found["failed"] for found in result["rows"])
    return [
        at_most(0, "failed requests", failed),
        at_most(
            MAX_DECISION_MS, "a decision in Serve, p99 ms", result["decision_ms_at_most"]["p99"]
        ),
    ]


def show(result: dict[str, Any]) -> None:
    for scene in ("documents", "hot"):
        rows = [found for found in result["rows"] if found["scene"] == scene]
        names = [name for name in rows[0] if name != "scene"]
        table = Table(
            *(name.replace("_", " ") for name in names),
            title=f"{scene}: {result['model']}, two replicas of one core each",
        )
        for found in rows:
            table.add_row(
                *(f"{found[n]:,}" if n not in ("router", "kvray") else found[n] for n in names)
            )
        Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="routers of Ray Serve LLM, with kvray and without")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--quick", "--smoke", action="store_true", help="two cases, a few requests, no bars"
    )
    arguments = parser.parse_args()
    for name in ("httpx", "httpx2"):  # OpenAI's client uses one of them: a line a request
        logging.getLogger(name).setLevel(logging.WARNING)
    cases = CASES[-1:] + CASES[2:3] if arguments.quick else CASES
    result = measure(cases, is_quick=arguments.quick)
    return finish(
        "serve_routing",
        result,
        bars(result),
        n=min(found["requests"] for found in result["rows"]),
        as_json=arguments.json,
        is_smoke=arguments.quick,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
