"""What kvray adds to the start of an engine: this tree beside another commit of it, in one run.

    python benchmarks/engines/start.py [--against COMMIT] [--starts N] [--json] [--smoke]

Each tree has a cluster of one node, made by its own code, and starts engines there in turn with the
other one, as users do (EngineCore in a process of its own). A start lasts from the command until
the engine takes requests: the names of its weights and its canary are in it. How long a worker
takes to name 1 GB of parameters is measured by itself first (--starts 0: nothing else is).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.bars import Bar, at_most
from benchmarks.measure import finish
from kvray.engine.weights import tensor_digest

ROOT = Path(__file__).resolve().parent.parent.parent
STARTER = Path(__file__).with_name("starter.py")
BEFORE_NAMES = "bf1055e"  # the last commit whose engines neither named weights nor had a canary
MAX_RATIO = 1.05
MAX_DIGEST_S = 0.5
PARAMETERS, PARAMETER_BYTES = 8, 125_000_000  # 1 GB, as bfloat16
DIGESTS = 5
END_LIMIT_S = 60.0  # of a Ray cluster of one node

console = Console(stderr=True)


class Starter:
    """A tree with its cluster; see starter.py."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(  # noqa: S603 (our own script)
            [sys.executable, str(STARTER)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start_s(self) -> float:
        """How long one engine took to start; it has ended when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.write("start\n")
        self._process.stdin.flush()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a tree's engine did not start: see its traceback above")
        return float(json.loads(line)["start_s"])

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_LIMIT_S)


@contextmanager
def starter(tree: Path) -> Iterator[Starter]:
    it = Starter(tree)
    try:
        yield it
    finally:
        it.end()


def unpack(commit: str, folder: Path) -> Path:
    """The tree of a commit, under `folder`."""
    packed = folder / "tree.tar"
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "archive", "-o", str(packed), commit], check=True)  # noqa: S603
    tree = folder / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xf", str(packed), "-C", str(tree)], check=True)  # noqa: S603, S607
    return tree


def digest_s() -> float:
    """The median time in which 1 GB of parameters in host memory gets its names."""
    noise = torch.randint(0, 256, (PARAMETER_BYTES,), dtype=torch.uint8).view(torch.bfloat16)
    parameters = [noise.clone() for _ in range(PARAMETERS)]
    took_s = []
    for _ in range(DIGESTS):
        begun_s = time.perf_counter()
        for parameter in parameters:
            tensor_digest(parameter)
        took_s.append(time.perf_counter() - begun_s)
    return statistics.median(took_s)


def measure(*, against: str, starts: int) -> dict[str, Any]:
    named = {"digest_s": round(digest_s(), 3)}
    if not starts:
        return named
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvray-start-")))
        before = stack.enter_context(starter(unpack(against, folder)))
        now = stack.enter_context(starter(ROOT))
        before.start_s(), now.start_s()  # the first of each also warms the page cache
        pairs = [
            (before.start_s(), now.start_s())
            if index % 2
            else (now.start_s(), before.start_s())[::-1]
            for index in track(range(starts), "starts of both", console=console)
        ]
    before_s, now_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    return named | {
        "against": against,
        "start_s": round(now_s, 3),
        "start_before_s": round(before_s, 3),
        "start_ratio": round(now_s / before_s, 4),
        "pairs": [[round(seconds, 3) for seconds in pair] for pair in pairs],
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    found = [at_most(MAX_DIGEST_S, "s to name 1 GB of parameters", result["digest_s"])]
    if "start_ratio" in result:
        what = "start of an engine over the one before"
        found.append(at_most(MAX_RATIO, what, result["start_ratio"]))
    return found


def show(result: dict[str, Any]) -> None:
    out = Console()
    out.print(f"1 GB of parameters has its names in {result['digest_s']} s")
    if "start_s" not in result:
        return
    out.print(
        f"an engine starts in {result['start_s']} s, with {result['against']} in "
        f"{result['start_before_s']} s: {result['start_ratio']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="what kvray adds to the start of an engine")
    parser.add_argument("--against", default=BEFORE_NAMES, metavar="COMMIT")
    parser.add_argument("--starts", type=int, default=5, help="of each tree")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="one start of each, no bars")
    arguments = parser.parse_args()
    starts = 1 if arguments.smoke else arguments.starts
    result = measure(against=arguments.against, starts=starts)
    return finish(
        "start",
        result,
        bars(result),
        n=starts,
        as_json=arguments.json,
        is_smoke=arguments.smoke,
        show=lambda: show(result),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
