"""Loading what vLLM loads of kvray costs milliseconds and brings in neither Ray nor NIXL."""

import json
import subprocess
import sys

import pytest

LIMIT_S = 0.050
RUNS = 5  # the best of them: what the code costs, not what else the machine did

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
heavy = sorted(set(sys.modules) & {{"ray", "nixl", "vllm", "torch", "pandas"}})
print(json.dumps([seconds, heavy]))
"""


@pytest.mark.parametrize("module", ["kvray", "kvray.engine", "kvray.engine.plugin"])
def test_importing_is_light(module: str) -> None:
    script = SCRIPT.format(module=module)
    found = [
        json.loads(
            subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        )
        for _ in range(RUNS)
    ]

    assert {tuple(heavy) for _, heavy in found} == {()}
    assert min(seconds for seconds, _ in found) < LIMIT_S
