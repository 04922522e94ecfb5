"""One bug, and the cheapest check that finds it: seeds of the simulator, or tests.

A check of the simulator is a range of seeds that ends at the first failure; where a unit test is
named, the simulator can not see the bug (it costs hits and never a byte), or only by rare luck.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """edits: exact text of the module, and what stands there instead. check: a module to run as
    python -m, with its arguments; it must fail.
    """

    name: str
    module: str
    edits: tuple[tuple[str, str], ...]
    check: tuple[str, ...]


def simulated(seeds: int, first: int = 0) -> tuple[str, ...]:
    """Virtual clusters, one process."""
    return ("tests.sim", "--first", str(first), "--seeds", str(seeds), "--jobs", "1")


def tested(*names: str) -> tuple[str, ...]:
    """pytest, of these files or tests."""
    return ("pytest", "-q", "-x", "-p", "no:cacheprovider", *names)
