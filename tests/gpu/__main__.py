"""`python -m tests.gpu`: all that needs a GPU, and the benchmark's table. `make test-gpu` calls it.

Needs torch, numpy, msgspec and pytest; cupy for the gather kernel and nixl for the whole way from a
peer, whose tests are skipped by name without them. Where there is no GPU it says why it does
nothing, and that is no failure. --no-bench: the tests only. What else is said goes to pytest.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from kvray.engine.cuda_driver import the_driver

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
NEEDED = ("torch", "numpy", "msgspec", "pytest")
TEST_LIMIT_S = 300  # of ten minutes that a borrowed machine may have: half for tests
BENCH_LIMIT_S = 270


def gpu_count() -> int:
    """As the driver counts them: no package is needed to ask it."""
    driver = the_driver()
    return 0 if driver is None else driver.device_count()


def what_is_missing() -> str | None:
    """To use the GPU that is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} has no {', '.join(missing)}: make install-gpu, or name a Python "
            "that has: make test-gpu GPU_PYTHON=/path/to/python"
        )
    from tests.gpu.rig import why_no_gpu

    return why_no_gpu()


def main(arguments: list[str]) -> int:
    if not gpu_count():
        print("test-gpu: skipped: this machine has no GPU that a CUDA driver (libcuda.so.1) sees")
        return 0
    missing = what_is_missing()
    if missing is not None:
        print(f"test-gpu: there is a GPU, and it can not be used: {missing}")
        return 1
    own = ["-c", str(FOLDER / "gpu.ini"), f"--rootdir={ROOT}", f"--confcutdir={FOLDER}"]
    to_pytest = [argument for argument in arguments if argument != "--no-bench"]
    tests = ["-m", "pytest", *own, *(to_pytest or [str(FOLDER)])]
    code = run(tests, limit_s=TEST_LIMIT_S)
    if "--no-bench" not in arguments:  # also after a failed test: the machine may be lent
        code = run([str(ROOT / "benchmarks" / "gpu.py")], limit_s=BENCH_LIMIT_S) or code
    return code


def run(arguments: list[str], *, limit_s: float) -> int:
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"test-gpu: ended after {limit_s:.0f} s: {' '.join(command)}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
