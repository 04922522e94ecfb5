"""Sees to it that a process has kvray from the wheel, and writes down that it had.

A copy of this file lies in the environment that layered.py makes, as `kvray_from_wheel`, and each
Python of that environment loads it when it starts: pytest, engines with their workers, Ray's
actors, commands. When kvray is imported from any other place, that process ends at once.

    python -m tests.wheel.guard FOLDER      what was written there: how many of which processes
                                            had kvray from the wheel. Exit code 1 if there is one
                                            that had not, or none that had
"""

import os
import sys
from collections import Counter
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGE = "kvray"
NAME = "kvray_from_wheel"  # as which it is loaded
NOTES = "KVRAY_FROM_WHEEL"  # in the environment: the folder of what is written down
ELSEWHERE = "elsewhere: "
WRONG = 70  # exit code


class Guard:
    """First of the finders that Python asks for a module. home: where kvray has to be."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def find_spec(
        self, name: str, _path: object = None, _target: object = None
    ) -> ModuleSpec | None:
        if name != PACKAGE:
            return None
        spec = PathFinder.find_spec(name)
        origin = str(spec.origin) if spec is not None else "no folder of sys.path"
        if Path(origin).parent != self._home:
            _note(ELSEWHERE + origin)
            sys.stderr.write(f"expected kvray from the wheel in {self._home}, found {origin}\n")
            sys.stderr.flush()
            os._exit(WRONG)
        _note(_kind(sys.orig_argv))
        return spec


def _kind(words: list[str]) -> str:
    """The first word of a command line that says what it is: a module, a script, `-c`."""
    if "--multiprocessing-fork" in words:
        return "spawned by multiprocessing"  # EngineCore and workers of vLLM
    for index, word in enumerate(words[1:], start=1):
        if word == "-m":
            return words[index + 1]
        if word == "-c" or not word.startswith("-"):
            return Path(word).name
    return "python"


def _note(line: str) -> None:
    folder = os.environ.get(NOTES)
    # The hosts of tests/cluster may not see it, or keep what they write for themselves.
    if folder and Path(folder).is_dir():
        with Path(folder, str(os.getpid())).open("a") as notes:
            notes.write(line + "\n")


def main(folder: str) -> int:
    lines = [line for path in Path(folder).iterdir() for line in path.read_text().splitlines()]
    counts = Counter(lines)
    for line, count in counts.most_common():
        sys.stderr.write(f"{count:6d}  {line}\n")
    wrong = [line for line in lines if line.startswith(ELSEWHERE)]
    sys.stderr.write(
        f"kvray was loaded from the wheel by {len(lines) - len(wrong)} processes, from elsewhere "
        f"by {len(wrong)}\n"
    )
    return 1 if wrong or not lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
if __name__ == NAME:
    sys.meta_path.insert(0, Guard(Path(__file__).parent / PACKAGE))
