"""Audits of honest engines by honest engines: how many there are, and that none is an alarm.

    python benchmarks/engines/honest.py [--audits 200] [--dtype bfloat16] [--json] [--smoke]

Engine A on one node, B on another, of another class: with other batch limits, so that prompts are
cut and batched otherwise; half of the way with one thread, too. In turn one of them computes a few
documents at once, and the other asks for them: it loads them, and now and then is told a chunk less
than there is. Then it computes them all anew, in one batch. What it stores is there already, by the
other: such a store is audited for nothing, up to core.audit.MAX_AUDITS of it at a time. The node's
`audit_rate` is what users have.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, at_least, at_most
from benchmarks.measure import finish
from kvray.engine.arguments import transfer_settings
from tests import in_engine
from tests.engines import Engine, start_engine
from tests.models import tiny
from tests.noise import in_engine as ways
from tests.prompts import CHUNK_TOKENS, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

DOCUMENTS = 4  # of a round, computed at once
BLOCKS = (3, 9)  # of a document, at least and at most
POOL_BYTES = 256 << 20
SLAB_BYTES = 1 << 30
TRUST_LIMIT_S = 30.0
MAX_ROUNDS_WITHOUT = 8  # an audit: then there is something wrong
BATCH_TOKENS = {"A": 2_048, "B": 300}
LATER_BATCH_TOKENS, LATER_THREADS = 8_192, 1  # of B, for the second half

console = Console(stderr=True)


@dataclass(frozen=True)
class Player:
    """An engine of node `index`."""

    name: str
    index: int
    engine: Engine

    @property
    def maker(self) -> int:
        return int(self.engine.call(in_engine.canary)["maker"], 16)


@dataclass(frozen=True)
class Audits:
    """Of all nodes together. told: hits that were told as misses for one; the others were free."""

    audited: int
    mismatches: int
    different: int
    told: int

    @classmethod
    def of(cls, nodes: Nodes) -> "Audits":
        found = [nodes.status(index) for index in range(len(nodes.node_ids))]
        trust = [one["trust"] for one in found]
        return cls(
            audited=sum(one["audited_chunks"] for one in trust),
            mismatches=sum(one["audit_mismatch"] for one in trust),
            different=sum(one["canaries_different"] for one in trust),
            told=sum(one["lookups"]["misses"].get("audited", 0) for one in found),
        )


@dataclass(frozen=True)
class Stage:
    nodes: Nodes
    folder: Path
    dtype: str

    @contextmanager
    def player(
        self, name: str, index: int, *, batch_tokens: int, threads: int = 2
    ) -> Iterator[Player]:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        settings = self.nodes.cluster.engine_settings() | {"node_id": self.nodes.node_ids[index]}
        engine = start_engine(
            tiny(),
            folder=self.folder,
            environment={
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                "OMP_NUM_THREADS": str(len(cores)),
            },
            dtype=self.dtype,
            max_model_len=2_048,
            max_num_batched_tokens=batch_tokens,
            kv_cache_memory_bytes=POOL_BYTES,
            kv_transfer_config=transfer_settings(settings),
        )
        try:
            engine.ready()
            yield Player(name, index, engine)
        finally:
            engine.close()

    def wait_trust(self, one: Player, other: Player) -> None:
        makers = {player.index: player.maker for player in (one, other)}
        assert makers[one.index] != makers[other.index], "one maker: there is nothing to audit"
        here, there = makers
        wait_until(
            lambda: (
                self.nodes.trusts(here, makers[here], makers[there])
                and self.nodes.trusts(there, makers[there], makers[here])
            ),
            what=f"that {one.name} and {other.name} trust each other",
            limit_s=TRUST_LIMIT_S,
        )


def documents_of(number: int) -> list[list[int]]:
    """Of a round; their lengths are no multiple of anything."""
    low, high = BLOCKS
    return [
        prompt_of(
            CHUNK_TOKENS * (low + (number + i) % (high - low + 1)) + 17 * i + 1,
            seed=number * DOCUMENTS + i,
        )
        for i in range(DOCUMENTS)
    ]


def play_round(stage: Stage, first: Player, second: Player, number: int) -> int:
    """How many tokens were loaded."""
    documents = documents_of(number)
    first.engine.generate_many(documents)
    first.engine.call(in_engine.settle)
    stage.nodes.wait_listed(stage.nodes.keys(first.index))
    answers = second.engine.generate_many(documents)
    second.engine.call(in_engine.settle)
    second.engine.call(ways.compute_anew, documents)
    return sum(answer.cached_tokens for answer in answers)


def play(stage: Stage, one: Player, other: Player, *, audits: int, numbers: Iterator[int]) -> int:
    """Until so many have been made since. How many tokens were loaded."""
    stage.wait_trust(one, other)
    begun = before = Audits.of(stage.nodes)
    without = loaded_tokens = 0
    while before.audited - begun.audited < audits:
        number = next(numbers)
        pair = (one, other) if number % 2 else (other, one)
        loaded_tokens += play_round(stage, *pair, number)
        now = Audits.of(stage.nodes)
        without = without + 1 if now.audited == before.audited else 0
        assert without < MAX_ROUNDS_WITHOUT, "nothing is audited any more"
        before = now
        console.print(f"{now.audited} audits, {now.mismatches} of them a mismatch")
    return loaded_tokens


def measure(*, audits: int, dtype: str) -> dict[str, Any]:
    numbers = itertools.count()
    half = -(-audits // 2)
    with (
        tempfile.TemporaryDirectory(prefix="kvray-honest-") as folder,
        running_nodes(2, slab_bytes=SLAB_BYTES) as nodes,
    ):
        stage = Stage(nodes, Path(folder), dtype)
        with stage.player("A", 0, batch_tokens=BATCH_TOKENS["A"]) as a:
            with stage.player("B", 1, batch_tokens=BATCH_TOKENS["B"]) as b:
                loaded_tokens = play(stage, a, b, audits=half, numbers=numbers)
            with stage.player("B", 1, batch_tokens=LATER_BATCH_TOKENS, threads=LATER_THREADS) as b:
                loaded_tokens += play(stage, a, b, audits=audits - half, numbers=numbers)
        found = Audits.of(nodes)
    return {
        "audits": found.audited,
        "audit_mismatch": found.mismatches,
        "canaries_different": found.different,
        "rounds": next(numbers),
        "loaded_tokens": loaded_tokens,
        "told_as_misses": found.told,
    }


def bars(result: dict[str, Any], audits: int) -> list[Bar]:
    return [
        at_least(audits, "audits made", result["audits"]),
        at_most(0, "mismatches", result["audit_mismatch"]),
        at_most(0, "canaries that differ", result["canaries_different"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("what", "found")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="audits of honest engines: none is an alarm")
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="a few audits, no bars")
    options = parser.parse_args()
    audits = 8 if options.smoke else options.audits
    result = measure(audits=audits, dtype=options.dtype)
    return finish(
        "honest",
        result,
        bars(result, audits),
        n=result["audits"],
        as_json=options.json,
        is_smoke=options.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
