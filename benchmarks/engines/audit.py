"""Trust what has been seen to be equal: what the canary and the audit find, and what they cost.

    python benchmarks/engines/audit.py [--documents N] [--filler N] [--json] [--smoke]

Engine A computes documents on one node. On another an engine B comes up when they are all stored,
three times:

    its like        the same maker, if it computes the same bytes: nothing is to be compared
    other class     with other batch limits: another maker, which must come to trust A by itself;
                    what it stores of its own earns the credit for an audit
    other packing   with another arrangement of a block's bytes (tests.other_packing) and the same
                    name, as a host without AMX beside one with it: nothing of A may be loaded

Each question goes to an engine without kvray, too, in float32, where an answer does not hang on how
a prompt was cut: no answer may differ, the first included.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, at_least, at_most
from benchmarks.engine_world import cpu_binding
from benchmarks.measure import finish
from kvray.engine.arguments import transfer_settings
from tests import in_engine
from tests.engines import Answer, Engine, start_engine
from tests.engines import Mode as EngineMode
from tests.models import tiny
from tests.prompts import prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

TOKENS = 1_000  # of a document
ANSWER_TOKENS = 8
POOL_BYTES = 64 << 20  # 4,096 tokens of the tiny model in float32
SLAB_BYTES = 512 << 20
VERDICT_LIMIT_S = 30.0  # until B has met A's canary, or it never will
OTHER_BATCH_TOKENS = 2_048  # of a step; an engine with other limits is another maker
MAX_TRUSTED_S = 3.0
MAX_EXTRA_SHARE = 0.005

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Trust:
    """What node 1 has seen of other makers, all its engines together."""

    equal: int
    different: int

    @classmethod
    def of(cls, nodes: Nodes) -> "Trust":
        found = nodes.status(1)["trust"]
        return cls(found["canaries_equal"], found["canaries_different"])


@dataclass(frozen=True)
class Scene:
    """mode: users have an EngineCore of its own; in one process an engine is up sooner."""

    nodes: Nodes
    folder: Path
    mode: EngineMode

    def start(self, index: int | None, **arguments: Any) -> Engine:
        """An engine that belongs to node `index`, or one without kvray."""
        if index is not None:
            settings = self.nodes.cluster.engine_settings() | {
                "node_id": self.nodes.node_ids[index]
            }
            arguments["kv_transfer_config"] = transfer_settings(settings)
        return start_engine(
            tiny(),
            folder=self.folder,
            mode=self.mode,
            environment={"VLLM_CPU_OMP_THREADS_BIND": cpu_binding()},
            dtype="float32",
            max_model_len=2_048,
            kv_cache_memory_bytes=POOL_BYTES,
            **arguments,
        )


@contextmanager
def ending(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine.ready()
    finally:
        engine.close()


@contextmanager
def scene(*, is_smoke: bool) -> Iterator[Scene]:
    mode = EngineMode.IN_PROCESS if is_smoke else EngineMode.MULTIPROCESS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvray-audit-")))
        nodes = stack.enter_context(running_nodes(2, slab_bytes=SLAB_BYTES))
        yield Scene(nodes, folder, mode)


def counters_of(engine: Engine) -> dict[str, int]:
    found: dict[str, int] = engine.call(in_engine.settle)["counters"]
    return found


def hit_tokens(counters: dict[str, int]) -> int:
    return counters["hit_tokens_local"] + counters["hit_tokens_peer"]


def audited_chunks(nodes: Nodes) -> int:
    return int(nodes.status(1)["trust"]["audited_chunks"])


def wait_verdict(nodes: Nodes, before: Trust) -> tuple[float, Trust]:
    """Seconds until node 1 has met a maker more, and what it has seen then."""
    begun_s = time.monotonic()
    wait_until(
        lambda: Trust.of(nodes) != before,
        what="a verdict on another maker's canary",
        limit_s=VERDICT_LIMIT_S,
    )
    return time.monotonic() - begun_s, Trust.of(nodes)


def ask_all(engine: Engine, documents: list[list[int]]) -> list[Answer]:
    return [engine.generate(one, max_tokens=ANSWER_TOKENS) for one in documents]


def wrong(answers: list[Answer], controls: list[Answer]) -> int:
    return sum(a.tokens != b.tokens for a, b in zip(answers, controls, strict=True))


def meet_another_class(
    stage: Scene, documents: list[list[int]], controls: list[Answer], filler: list[list[int]]
) -> dict[str, Any]:
    before, audits = Trust.of(stage.nodes), audited_chunks(stage.nodes)
    with ending(stage.start(1, max_num_batched_tokens=OTHER_BATCH_TOKENS)) as b:
        seconds, seen = wait_verdict(stage.nodes, before)
        answers = ask_all(b, documents)
        for prompt in filler:
            b.generate(prompt)
        counters_of(b)
        assert b.reset_prefix_cache()
        again = ask_all(b, documents)
        counters = counters_of(b)
        audits = audited_chunks(stage.nodes) - audits
    return {
        "trusted_after_s": round(seconds, 3) if seen.equal > before.equal else None,
        "hit_tokens": hit_tokens(counters),
        "wrong_answers": wrong(answers, controls) + wrong(again, controls),
        "audited_chunks": audits,
        "extra_prefill_share": counters.get("miss_tokens_audited", 0)
        / max(1, counters["prefill_tokens"]),
    }


def meet_its_like(
    stage: Scene, documents: list[list[int]], controls: list[Answer]
) -> dict[str, Any]:
    """Its first question comes as soon as its canary is computed."""
    with ending(stage.start(1)) as b:
        begun_s = time.monotonic()
        wait_until(
            lambda: b.call(in_engine.canary)["state"] == "proven",
            what="the canary",
            limit_s=VERDICT_LIMIT_S,
        )
        seconds = time.monotonic() - begun_s
        answers = ask_all(b, documents)
        counters = counters_of(b)
    return {
        "trusted_after_s": round(seconds, 3),
        "hit_tokens": hit_tokens(counters),
        "first_cached_tokens": answers[0].cached_tokens,
        "wrong_answers": wrong(answers, controls),
    }


def meet_another_packing(
    stage: Scene, documents: list[list[int]], controls: list[Answer]
) -> dict[str, Any]:
    """Its first question comes as soon as it is up, whatever has been compared by then."""
    before = Trust.of(stage.nodes)
    other = "tests.other_packing.OtherPacking"
    with ending(stage.start(1, worker_extension_cls=other)) as b:
        answers = ask_all(b, documents[:1])
        _, seen = wait_verdict(stage.nodes, before)
        first = hit_tokens(counters_of(b))
        answers += ask_all(b, documents[1:])
        counters = counters_of(b)
    return {
        "mismatch_before_first_load": seen.different > before.different and not first,
        "loaded_tokens": hit_tokens(counters),
        "wrong_answers": wrong(answers, controls),
    }


def measure(*, documents: int, filler: int, is_smoke: bool) -> dict[str, Any]:
    prompts = [prompt_of(TOKENS, seed=seed) for seed in range(documents)]
    others = [prompt_of(TOKENS, seed=10_000 + seed) for seed in range(filler)]
    with (
        console.status("starting a Ray cluster of two nodes") as status,
        scene(is_smoke=is_smoke) as stage,
    ):
        status.update("the control: an engine without kvray")
        with ending(stage.start(None)) as plain:
            controls = ask_all(plain, prompts)
        status.update("engine A computes")
        with ending(stage.start(0)) as a:
            own = ask_all(a, prompts)
            counters_of(a)
            stage.nodes.wait_listed(stage.nodes.keys(0))
            status.update("engine B is like A")
            like = meet_its_like(stage, prompts, controls)
            status.update("engine B is of another class")
            other = meet_another_class(stage, prompts, controls, others)
            # Last: what it stores takes the names on its node, and is nothing to the others.
            status.update("engine B packs blocks otherwise")
            packing = meet_another_packing(stage, prompts, controls)
    met = (packing, other, like)
    return {
        "requests": 5 * documents,
        "hit_tokens": other["hit_tokens"] + like["hit_tokens"],
        "trusted_after_s": like["trusted_after_s"],
        "other_class_trusted_after_s": other["trusted_after_s"],
        "first_cached_tokens": like["first_cached_tokens"],
        "audited_chunks": other["audited_chunks"],
        "mismatch_before_first_load": packing["mismatch_before_first_load"],
        "loaded_of_another_packing": packing["loaded_tokens"],
        "wrong_answers": wrong(own, controls) + sum(one["wrong_answers"] for one in met),
        "extra_prefill_share": round(other["extra_prefill_share"], 5),
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    never = float("inf")
    trusted_s = result["other_class_trusted_after_s"] or never
    return [
        at_most(0, "answers that differ from the control", result["wrong_answers"]),
        at_most(0, "tokens loaded of another packing", result["loaded_of_another_packing"]),
        at_least(1, "mismatch seen before a load", float(result["mismatch_before_first_load"])),
        at_least(1, "tokens of A's that B hits", result["hit_tokens"]),
        at_least(1, "audits made", result["audited_chunks"]),
        at_most(MAX_TRUSTED_S, "s from ready to trust, its like", result["trusted_after_s"]),
        at_most(MAX_TRUSTED_S, "s from ready to trust, another class", trusted_s),
        at_most(MAX_EXTRA_SHARE, "prefill more, for audits", result["extra_prefill_share"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("what", "found")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="what the canary and the audit find and cost")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--filler", type=int, default=40, help="of B's own; seven chunks each")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="two documents, no bars")
    arguments = parser.parse_args()
    documents, filler = (2, 1) if arguments.smoke else (arguments.documents, arguments.filler)
    result = measure(documents=documents, filler=filler, is_smoke=arguments.smoke)
    return finish(
        "audit",
        result,
        bars(result),
        n=documents,
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
