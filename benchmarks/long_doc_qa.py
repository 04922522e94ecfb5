"""Questions about long documents that another instance has read: vLLM alone, one cache a node, one
cache of all nodes (modes none, silo, p2p; see engine_world).

    python benchmarks/long_doc_qa.py [--model tiny|smollm2] [--documents N] [--document-tokens D]
        [--output-tokens K] [--json] [--smoke]
    python benchmarks/long_doc_qa.py --instances 4 --routing round-robin [--requests R] ...

warm-then-query   Instance A reads all documents, then B is asked about each, one query after
                  another; B's device cache is empty at the start. Each document is asked about in
                  all modes before the next one. Without kvray nothing that A has read could reach
                  B, so that mode has no A.
round-robin       A random document a request (seeded), the instances in turn, nobody has read
                  anything. One mode after another: all engines of all modes do not fit a machine
                  of this size.

Gains are none over the mode, of the mean TTFT and of the total time of the queries.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bars import Bar, at_least
from benchmarks.engine_world import (
    MODELS,
    Instance,
    Mode,
    Model,
    full_chunks,
    prompt_of,
    running_world,
)
from benchmarks.measure import finish, spread

QUESTION_TOKENS = 24
QUESTION_SEED = 500_000  # apart from those of the documents
ROUTING_SEED = 4
POOL_DOCUMENTS = 2  # what an instance's device cache holds: documents do not stay there for long
WARM_TOKENS = 1_500
MIN_TTFT_GAIN, MIN_TOTAL_GAIN = 20.0, 5.0

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, the same in every mode."""

    model: Model
    documents: int
    document_tokens: int
    output_tokens: int
    is_smoke: bool = False

    @property
    def tokens(self) -> int:
        """Of a query with its answer."""
        return self.document_tokens + QUESTION_TOKENS + self.output_tokens

    def document(self, index: int) -> list[int]:
        return prompt_of(self.document_tokens, seed=index)

    def query(self, index: int, number: int) -> list[int]:
        question = prompt_of(QUESTION_TOKENS, seed=QUESTION_SEED + number)
        return self.document(index) + question


@dataclass(slots=True)
class Round:
    """The queries of one mode."""

    ttft_ms: list[float] = field(default_factory=list)
    query_ms: list[float] = field(default_factory=list)
    whole_hits: int = 0  # all full chunks of the document were reused
    counters: dict[str, int] = field(default_factory=dict)

    def ask(self, instance: Instance, task: Task, document: int) -> None:
        prompt = task.query(document, len(self.ttft_ms))
        answer, ms = instance.ask_timed(prompt, max_tokens=task.output_tokens)
        self.ttft_ms.append(answer.ttft_ms)
        self.query_ms.append(ms)
        self.whole_hits += answer.cached_tokens >= full_chunks(task.document_tokens)

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean_ttft_ms": round(statistics.mean(self.ttft_ms), 1),
            "total_ms": round(sum(self.query_ms), 1),
            "ttft_ms": spread(self.ttft_ms),
            "whole_hits": self.whole_hits,
            "counters": self.counters,
        }


def warm_then_query(task: Task) -> dict[Mode, Round]:
    rounds = {mode: Round() for mode in Mode}
    with (
        console.status("") as status,
        running_world(
            task.model,
            {Mode.NONE: (1,), Mode.SILO: (0, 1), Mode.P2P: (0, 1)},
            slab_tokens=2 * task.documents * task.tokens,  # of silo and of p2p
            pool_tokens=POOL_DOCUMENTS * task.tokens,
            warm_tokens=min(task.document_tokens, WARM_TOKENS),
            is_smoke=task.is_smoke,
            say=status.update,
        ) as world,
    ):
        status.stop()
        for index in track(range(task.documents), "A reads the documents", console=console):
            for mode in (Mode.SILO, Mode.P2P):
                world[mode, 0].ask(task.document(index))
                world[mode, 0].settle()
        for index in track(range(task.documents), "B is asked about them", console=console):
            for mode, its_round in rounds.items():
                its_round.ask(world[mode, 1], task, index)
                world[mode, 1].finish_stores()  # so that no mode pays for what another left over
        for mode, its_round in rounds.items():
            its_round.counters = world.counters(mode)
    return rounds


def round_robin(task: Task, *, instances: int, requests: int) -> dict[Mode, Round]:
    source = random.Random(ROUTING_SEED)
    documents = [source.randrange(task.documents) for _ in range(requests)]
    return {mode: _one_mode(task, mode, range(instances), documents) for mode in Mode}


def _one_mode(task: Task, mode: Mode, indices: Sequence[int], documents: list[int]) -> Round:
    its_round = Round()
    with (
        console.status("") as status,
        running_world(
            task.model,
            {mode: indices},
            slab_tokens=task.documents * task.tokens,
            pool_tokens=POOL_DOCUMENTS * task.tokens,
            warm_tokens=min(task.document_tokens, WARM_TOKENS),
            is_smoke=task.is_smoke,
            say=status.update,
        ) as world,
    ):
        status.stop()
        for n, document in enumerate(track(documents, f"mode {mode.value}", console=console)):
            instance = world[mode, indices[n % len(indices)]]
            its_round.ask(instance, task, document)
            instance.finish_stores()
        its_round.counters = world.counters(mode)
    return its_round


def summary(task: Task, rounds: dict[Mode, Round], routing: str, instances: int) -> dict[str, Any]:
    modes = {mode.value: its_round.to_dict() for mode, its_round in rounds.items()}

    def gain(mode: Mode, what: str) -> float:
        return round(float(modes["none"][what] / modes[mode.value][what]), 2)

    return {
        "model": task.model.name,
        "routing": routing,
        "instances": instances,
        "documents": task.documents,
        "document_tokens": task.document_tokens,
        "output_tokens": task.output_tokens,
        "requests": len(rounds[Mode.P2P].ttft_ms),
        "modes": modes,
        "ttft_gain": gain(Mode.P2P, "mean_ttft_ms"),
        "total_gain": gain(Mode.P2P, "total_ms"),
        "silo_ttft_gain": gain(Mode.SILO, "mean_ttft_ms"),
        "silo_total_gain": gain(Mode.SILO, "total_ms"),
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    """The promise is about smollm2 with a warm peer."""
    if result["model"] != "smollm2" or result["routing"] != "warm-then-query":
        return []
    return [
        at_least(MIN_TTFT_GAIN, "mean TTFT, none / p2p", result["ttft_gain"]),
        at_least(MIN_TOTAL_GAIN, "total time, none / p2p", result["total_gain"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table(
        "mode", "mean TTFT", "p99", "all queries", "documents reused whole",
        title=f"{result['model']}, {result['routing']}: {result['requests']} queries about "
        f"{result['documents']} documents of {result['document_tokens']:,} tokens",
    )  # fmt: skip
    for mode, found in result["modes"].items():
        table.add_row(
            mode,
            f"{found['mean_ttft_ms']:,.0f} ms",
            f"{found['ttft_ms']['p99']:,.0f} ms",
            f"{found['total_ms'] / 1_000:,.1f} s",
            f"{found['whole_hits']} of {result['requests']}",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="questions about documents that a peer has read")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--document-tokens", type=int, help="default: the model's prompt")
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument(
        "--routing", choices=("warm-then-query", "round-robin"), default="warm-then-query"
    )
    parser.add_argument("--requests", type=int, help="of round-robin; default: 4 a document")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="two short documents, no bars")
    arguments = parser.parse_args()
    if arguments.routing == "warm-then-query" and arguments.instances != 2:  # noqa: PLR2004
        parser.error("warm-then-query has two instances: --routing round-robin takes more")
    model = MODELS[arguments.model]
    tokens = arguments.document_tokens or model.prompt_tokens
    task = Task(model, arguments.documents, tokens, arguments.output_tokens)
    if arguments.smoke:
        task = Task(
            MODELS["tiny"], documents=2, document_tokens=1_000, output_tokens=4, is_smoke=True
        )
    if arguments.routing == "round-robin":
        requests = arguments.requests or 4 * task.documents
        rounds = round_robin(task, instances=arguments.instances, requests=requests)
    else:
        rounds = warm_then_query(task)
    result = summary(task, rounds, arguments.routing, arguments.instances)
    promises = bars(result)
    return finish(
        "long_doc_qa",
        result,
        promises,
        n=result["requests"],
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
