"""Goal: what a benchmark says a request took is the request, and not the wait for a quiet machine.

Method: an engine that answers at once, and another one that still computes: a process that spins.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.engine_world import Instance, Mode
from tests.engines import Answer

SPINNING_S = 0.4
SPIN = f"import time; end = time.time() + {SPINNING_S}\nwhile time.time() < end: pass"


class AtOnce:
    def generate(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        return Answer(list(prompt), 0, 0.0, f"{max_tokens}")


class Spinning:
    def __init__(self, pid: int) -> None:
        self._pid = pid

    def processes(self) -> list[int]:
        return [self._pid]


def test_the_wait_for_another_engine_is_no_part_of_a_request() -> None:
    with subprocess.Popen([sys.executable, "-c", SPIN]) as spinner:
        others: Any = [Spinning(spinner.pid)]
        engine: Any = AtOnce()
        begun_s = time.monotonic()
        _, took_ms = Instance(Mode.NONE, 0, engine, None, others).ask_timed([1, 2], max_tokens=3)
        waited_ms = (time.monotonic() - begun_s) * 1_000
    assert waited_ms > SPINNING_S * 1_000 / 2, "it has not waited: nothing was shown"
    assert took_ms < waited_ms / 4
