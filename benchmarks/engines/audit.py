"""Trust what has been seen to be equal: what the canary and the audit find, and what they cost.

    python benchmarks/engines/audit.py [--questions N] [--documents N] [--json] [--smoke]

Engine A computes documents on one node. On another an engine B comes up when they are all stored:

    its like          what A has stored is a hit from the first question on   (audit_cases)
    other batches     another maker, which must come to trust A by itself; what audits cost its
                      hits, beside the same without audits                    (audit_ttft)
    other packing,    each under its own names, and under A's: nothing of A may be loaded
    other weight                                                              (audit_cases)

Each answer is compared with that of an engine that computes it all, the first included. What is
called a load, a hit or an audit is so by kvray's own counters.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, at_least, at_most
from benchmarks.engines.audit_cases import (
    ITS_OWN,
    OF_A,
    Like,
    Other,
    meet_its_like,
    meet_others,
)
from benchmarks.engines.audit_ttft import Cost, measure_cost
from benchmarks.engines.audit_world import (
    TOKENS,
    ask_all,
    counters_of,
    ending,
    scene,
    wrong,
)
from benchmarks.measure import finish
from tests.prompts import full_chunks, prompt_of

FILLER_SEED = 10_000  # no document has it
MAX_TRUSTED_S = 3.0
MAX_TTFT_RATIO = 1.03
MAX_EXTRA_SHARE = 0.005

console = Console(stderr=True)


def measure(*, documents: int, filler: int, questions: int, is_smoke: bool) -> dict[str, Any]:
    prompts = [prompt_of(TOKENS, seed=seed) for seed in range(documents)]
    others = [prompt_of(TOKENS, seed=FILLER_SEED + seed) for seed in range(filler)]
    with (
        console.status("starting a Ray cluster of two nodes, and kvray twice") as status,
        scene(is_smoke=is_smoke) as stage,
    ):
        status.update("a control without kvray, A, and A's twin where nothing is audited")
        plain, a, twin = stage.start(None), stage.start(stage.nodes), stage.start(stage.off)
        with ending(a):
            with ending(twin):
                with ending(plain):
                    controls = ask_all(plain, prompts)
                own = [answer for engine in (a, twin) for answer in ask_all(engine, prompts)]
                for engine, nodes in ((a, stage.nodes), (twin, stage.off)):
                    counters_of(engine)
                    nodes.wait_listed(nodes.keys(0))
                status.update("B is like A")
                like = meet_its_like(stage, a, prompts, controls)
                console.print(like)
                status.update("B has other batch limits: hits with audits, and without")
                cost = measure_cost(
                    stage, prompts, controls, others, a=a, twin=twin, rounds=questions
                )
                console.print(cost)
            # Last: what they store takes the names on their node, and is nothing to the others.
            status.update("B packs blocks otherwise; B has another weight")
            rows = meet_others(stage, a, prompts, controls)
    return {
        "requests": len(own) + len(prompts) * (2 + len(rows)) + cost.requests,
        "wrong_answers": wrong(own, 2 * controls)
        + like.wrong_answers
        + cost.wrong_answers
        + sum(row.wrong_answers for row in rows),
        "hit_tokens": like.loaded_tokens + cost.loaded_tokens,
        **_figures(like, cost, rows),
        "others": [row.to_row() for row in rows],
    }


def _figures(like: Like, cost: Cost, rows: Sequence[Other]) -> dict[str, Any]:
    return {
        "trusted_after_s": like.trusted_after_s,
        "is_same_maker": like.is_same_maker,
        "first_cached_tokens": like.first_cached_tokens,
        "first_missed": like.first_missed,
        "other_class_trusted_after_s": cost.trusted_after_s,
        "ttft_ms": cost.ttft_ms,
        "ttft_ratio": cost.ttft_ratio,
        "no_hits": cost.no_hits,
        "audited_chunks": cost.audited_chunks,
        "computed_tokens": cost.missed,
        "extra_prefill_share": round(cost.extra_prefill_share, 5),
        "mismatch_before_first_load": all(row.is_kept_apart for row in rows if row.names == OF_A),
        "never_met_under_own_names": all(row.is_kept_apart for row in rows if row.names == ITS_OWN),
        "loaded_of_others": sum(row.loaded_tokens for row in rows),
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    missing = full_chunks(TOKENS) - result["first_cached_tokens"]
    other_s, ratio = (
        float("inf") if result[name] is None else result[name]
        for name in ("other_class_trusted_after_s", "ttft_ratio")
    )
    return [
        at_most(0, "answers that differ from the control", result["wrong_answers"]),
        at_most(0, "tokens loaded of another packing or weight", result["loaded_of_others"]),
        at_least(1, "mismatch seen before a load", float(result["mismatch_before_first_load"])),
        at_least(1, "never met under own names", float(result["never_met_under_own_names"])),
        at_most(MAX_TRUSTED_S, "s from ready to trust, its like", result["trusted_after_s"]),
        at_most(MAX_TRUSTED_S, "s from ready to trust, other batch limits", other_s),
        at_most(0, "tokens of the first question that are no hit", missing),
        at_most(MAX_TTFT_RATIO, "ttft of hits over no audits", ratio),
        at_least(1, "audits made", result["audited_chunks"]),
        at_most(MAX_EXTRA_SHARE, "prefill more, for audits", result["extra_prefill_share"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table("what", "found")
    for name, value in result.items():
        if name != "others":
            table.add_row(name, str(value))
    rows = result["others"]
    others = Table(*rows[0])
    for row in rows:
        others.add_row(*map(str, row.values()))
    for each in (table, others):
        Console().print(each)


def main() -> int:
    parser = argparse.ArgumentParser(description="what the canary and the audit find and cost")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--filler", type=int, default=36, help="of B's own; seven chunks each")
    parser.add_argument("--questions", type=int, default=100, help="hits, with audits and without")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="two documents, no bars")
    arguments = parser.parse_args()
    documents, filler, questions = (
        (2, 1, 2)
        if arguments.smoke
        else (arguments.documents, arguments.filler, arguments.questions)
    )
    result = measure(
        documents=documents, filler=filler, questions=questions, is_smoke=arguments.smoke
    )
    return finish(
        "audit",
        result,
        bars(result),
        n=questions,
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
