"""Runs the benchmarks and writes one page of them, with plots.

    python benchmarks/report.py [--set short|full] [--only NAME ...] [--output DIR] [--smoke]
    python benchmarks/report.py --from-results              the page again, from what was measured

    each script ──its last line──▶ DIR/results/NAME.json ──▶ DIR/RESULTS.md, DIR/plots/*.png

One at a time: two benchmarks would measure each other. A script that fails or ends without a
result is named on the page. What is in DIR/notes.md is put at the end of the page: what was
measured by other commands.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track

from benchmarks import report_page, report_plots

FOLDER = Path(__file__).resolve().parent
TRACE = "tests/data/mooncake_conversation.jsonl.xz"
# What needs ray[llm] runs in the environment that `make install-ray-llm` makes.
RAY_LLM_PYTHON = str(FOLDER.parent / ".venv-ray-llm" / "bin" / "python")
# The longest, long_doc_qa with three modes and two scenarios, takes ten minutes here.
SCRIPT_LIMIT_S = 1_800

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of one script. is_short: part of the set that shows whether all is well."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    is_short: bool = False
    python: str = sys.executable


def _hit_rate(nodes: int, blocks: int, *, is_short: bool = False) -> Entry:
    arguments = (TRACE, "--nodes", str(nodes), "--capacity", str(blocks))
    return Entry(f"hit_rate-{nodes}x{blocks}", "hit_rate.py", arguments, is_short)


ENTRIES = (
    Entry("ttft-tiny", "ttft.py", ("--model", "tiny"), is_short=True),
    Entry("ttft-smollm2", "ttft.py", ("--model", "smollm2")),
    Entry("long_doc_qa", "long_doc_qa.py", ("--model", "smollm2")),
    Entry(
        "long_doc_qa-round-robin",
        "long_doc_qa.py",
        ("--model", "smollm2", "--instances", "4", "--routing", "round-robin"),
    ),
    Entry("multi_turn", "multi_turn.py"),
    Entry("transfer", "transfer.py"),
    Entry("lookup", "lookup.py", is_short=True),
    _hit_rate(4, 2_000, is_short=True),
    _hit_rate(4, 8_000),
    _hit_rate(16, 2_000),
    Entry("routing", "routing.py", (TRACE,)),
    Entry("serve_routing", "serve_routing.py", python=RAY_LLM_PYTHON),
    Entry("idle", "idle.py", is_short=True),
    Entry("overhead", "overhead.py"),
    Entry("watching", "watching.py"),
    *(
        Entry(f"behind_nginx-{load}", "behind_nginx.py", ("--load", load))
        for load in ("prefix_repetition", "random", "timed_trace", "multi_turn")
    ),
    Entry("audit", "engines/audit.py"),
    Entry("descriptors", "descriptors.py", is_short=True),
    Entry("gpu", "gpu.py", is_short=True),
)


def run(entry: Entry, *, is_smoke: bool) -> dict[str, Any]:
    """What the script's last line says, with the command and the time that it took; or an error."""
    arguments = [*entry.arguments, "--json", *(["--smoke"] if is_smoke else [])]
    python = ".venv-ray-llm/bin/python" if entry.python == RAY_LLM_PYTHON else "python"
    command = [python, f"benchmarks/{entry.script}", *arguments]
    begun_s = time.monotonic()
    result: dict[str, Any]
    try:
        done = subprocess.run(  # noqa: S603 (our own scripts)
            [entry.python, str(FOLDER / entry.script), *arguments],
            cwd=FOLDER.parent,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SCRIPT_LIMIT_S,
            check=False,
        )
        result = json.loads(done.stdout.splitlines()[-1])
        result["exit_code"] = done.returncode
    except (OSError, subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as exc:
        result = {"benchmark": entry.name, "error": f"no result: {type(exc).__name__}"}
    result["command"] = " ".join(command)
    result["took_s"] = round(time.monotonic() - begun_s, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="runs the benchmarks, writes a page of them")
    parser.add_argument("--set", choices=("short", "full"), default="full")
    parser.add_argument("--only", action="append", choices=[entry.name for entry in ENTRIES])
    parser.add_argument("--output", type=Path, default=FOLDER, help="a folder")
    parser.add_argument("--smoke", action="store_true", help="each script's own short run")
    parser.add_argument("--from-results", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    chosen = [
        entry
        for entry in ENTRIES
        if (entry.name in options.only if options.only else options.set == "full" or entry.is_short)
    ]
    folder: Path = options.output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.from_results:
        for entry in track(chosen, "benchmarks", console=console):
            console.print(f"[bold]{entry.name}[/]")
            result = run(entry, is_smoke=options.smoke)
            (folder / f"{entry.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = {
        entry.name: json.loads(path.read_text())
        for entry in ENTRIES
        if (path := folder / f"{entry.name}.json").exists()
    }
    plots = report_plots.draw(results, options.output / "plots")
    notes = options.output / "notes.md"
    page = report_page.page(results, plots, notes=notes.read_text() if notes.exists() else "")
    (options.output / "RESULTS.md").write_text(page)
    missed = report_page.missed(results)
    for text in missed:
        console.print(f"[red]missed[/] {text}")
    if options.json:
        print(json.dumps({"page": str(options.output / "RESULTS.md"), "missed": missed}))
    return 1 if missed and not options.smoke else 0


if __name__ == "__main__":
    sys.exit(main())
