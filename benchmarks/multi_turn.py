"""Conversations whose turns land on two instances in turn, as behind a plain load balancer: vLLM
alone, one cache a node, one cache of all nodes (modes none, silo, p2p; see engine_world).

    python benchmarks/multi_turn.py [--model tiny|smollm2] [--sessions S] [--turns T] [--json]
        [--smoke]

T turns in all: a long first one, then short ones; each prompt is everything said so far. Sessions
are interleaved turn by turn, and a turn of a session goes to another instance than its last. The
device cache holds POOL_SESSIONS sessions, each node's slab holds all of them. Each turn is played
in all modes before the next, so they meet the same machine.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.bars import Bar, at_least
from benchmarks.engine_world import MODELS, Instance, Mode, Model, prompt_of, running_world
from benchmarks.measure import finish, spread

FIRST_TOKENS = 4_000
TURN_TOKENS = 128
ANSWER_TOKENS = 32
POOL_SESSIONS = 2
INSTANCES = 2
SEEDS_PER_SESSION = 1_000  # more than a session has turns
WARM_TOKENS = 1_500
MIN_OVER_NONE, MIN_OVER_SILO = 4.0, 2.0

console = Console(stderr=True)


class Talk:
    """One session in one mode: what was said so far, answers of this mode's engines included."""

    def __init__(self, session: int, first_tokens: int) -> None:
        self._session = session
        self._first_tokens = first_tokens
        self._said: list[int] = []

    def take_turn(self, instance: Instance, turn: int) -> tuple[float, int]:
        """TTFT in ms, and the tokens that were reused."""
        count = TURN_TOKENS if turn else self._first_tokens
        self._said += prompt_of(count, seed=self._session * SEEDS_PER_SESSION + turn)
        answer = instance.ask(self._said, max_tokens=ANSWER_TOKENS)
        self._said += answer.tokens
        return answer.ttft_ms, answer.cached_tokens


def measure(
    model: Model, *, sessions: int, turns: int, first_tokens: int, is_smoke: bool
) -> dict[str, Any]:
    session_tokens = first_tokens + ANSWER_TOKENS + (turns - 1) * (TURN_TOKENS + ANSWER_TOKENS)
    talks = {mode: [Talk(session, first_tokens) for session in range(sessions)] for mode in Mode}
    ttft_ms: dict[Mode, list[list[float]]] = {mode: [[] for _ in range(turns)] for mode in Mode}
    reused: dict[Mode, list[list[int]]] = {mode: [[] for _ in range(turns)] for mode in Mode}
    with (
        console.status("") as status,
        running_world(
            model,
            dict.fromkeys(Mode, range(INSTANCES)),
            slab_tokens=2 * sessions * session_tokens,  # of silo and of p2p
            pool_tokens=POOL_SESSIONS * session_tokens,
            warm_tokens=min(first_tokens, WARM_TOKENS),
            is_smoke=is_smoke,
            say=status.update,
        ) as world,
    ):
        status.stop()
        with Progress(console=console) as progress:
            task = progress.add_task(f"{sessions} sessions", total=turns * sessions)
            for turn in range(turns):
                for session in range(sessions):
                    for mode in Mode:
                        instance = world[mode, (session + turn) % INSTANCES]
                        ms, tokens = talks[mode][session].take_turn(instance, turn)
                        ttft_ms[mode][turn].append(ms)
                        reused[mode][turn].append(tokens)
                        instance.settle()
                    progress.advance(task)
        counters = {mode: world.counters(mode) for mode in Mode}
    later = {mode: _mean_later(per_turn) for mode, per_turn in ttft_ms.items()}
    return {
        "model": model.name,
        "sessions": sessions,
        "turns": turns,
        "instances": INSTANCES,
        "first_tokens": first_tokens,
        "modes": {
            mode.value: {
                "mean_later_ttft_ms": round(later[mode], 1),
                "mean_ttft_ms": [round(statistics.mean(ms), 1) for ms in ttft_ms[mode]],
                "ttft_ms": [spread(ms) for ms in ttft_ms[mode]],
                "counters": counters[mode],
                "mean_cached_tokens": [round(statistics.mean(t)) for t in reused[mode]],
            }
            for mode in Mode
        },
        "p2p_over_none": round(later[Mode.NONE] / later[Mode.P2P], 2),
        "p2p_over_silo": round(later[Mode.SILO] / later[Mode.P2P], 2),
    }


def _mean_later(per_turn: list[list[float]]) -> float:
    """From the second turn on."""
    return statistics.mean(ms for turn in per_turn[1:] for ms in turn)


def bars(result: dict[str, Any]) -> list[Bar]:
    what = "mean TTFT from the second turn on"
    return [
        at_least(MIN_OVER_NONE, f"{what}, none / p2p", result["p2p_over_none"]),
        at_least(MIN_OVER_SILO, f"{what}, silo / p2p", result["p2p_over_silo"]),
    ]


def show(result: dict[str, Any]) -> None:
    table = Table(
        "mode", *(f"turn {n + 1}" for n in range(result["turns"])), "from the second on",
        title=f"{result['model']}, {result['sessions']} sessions: mean TTFT (tokens reused)",
    )  # fmt: skip
    for mode, found in result["modes"].items():
        table.add_row(
            mode,
            *(
                f"{ms:,.0f} ms ({tokens:,})"
                for ms, tokens in zip(
                    found["mean_ttft_ms"], found["mean_cached_tokens"], strict=True
                )
            ),
            f"{found['mean_later_ttft_ms']:,.0f} ms",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="conversations whose turns change instances")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--instances", type=int, choices=(INSTANCES,), default=INSTANCES)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="three short talks, no bars")
    arguments = parser.parse_args()
    if arguments.turns < 2:  # noqa: PLR2004
        parser.error("the first turn is everybody's: --turns 2 at least")
    if arguments.smoke:
        result = measure(MODELS["tiny"], sessions=3, turns=2, first_tokens=1_000, is_smoke=True)
    else:
        result = measure(
            MODELS[arguments.model],
            sessions=arguments.sessions,
            turns=arguments.turns,
            first_tokens=FIRST_TOKENS,
            is_smoke=False,
        )
    promises = bars(result)
    return finish(
        "multi_turn",
        result,
        promises,
        n=result["sessions"],
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
