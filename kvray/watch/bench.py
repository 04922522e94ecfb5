"""`kvray bench`: the benchmarks of a checkout, scripts of their own, run by benchmarks/report.py.

They are no part of the package: whoever measures wants to read what is measured.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvray.errors import ConfigError, KVRayError

REPORT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "report.py"


def run_benchmarks(
    output: Path, only: Sequence[str], *, smoke: bool, report: Path = REPORT
) -> tuple[str, list[str]]:
    """The path of the page, and the promises that were missed, for people. What the scripts print
    meanwhile goes to stderr. Raises ConfigError without a checkout, or if `only` names none.
    """
    if not report.is_file():
        raise ConfigError(
            f"expected the benchmarks in {report.parent}, found nothing: `kvray bench` needs "
            "kvray's source. Clone the repository, type `make install` and .venv/bin/kvray bench"
        )
    chosen = [word for name in only for word in ("--only", name)] or ["--set", "short"]
    command = [sys.executable, str(report), *chosen, "--output", str(output.resolve()), "--json"]
    done = subprocess.run(  # noqa: S603 (our own script)
        [*command, *(["--smoke"] if smoke else [])],
        cwd=report.parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 2:  # noqa: PLR2004 (argparse's: what it wants is on stderr)
        raise ConfigError(f"not a benchmark: {', '.join(only)}")
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as exc:
        raise KVRayError(f"{report.name} ended with {done.returncode} and no result") from exc
    return str(said["page"]), [str(text) for text in said["missed"]]
