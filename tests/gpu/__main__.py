"""`python -m tests.gpu`: all that needs a GPU, and the benchmark's table. `make test-gpu` calls it.

Needs torch, numpy, msgspec and pytest; cupy for the gather kernel and nixl for the whole way from a
peer, whose tests are skipped by name without them. Where there is no GPU it says why it does
nothing, and that is no failure. --no-bench: the tests only. What else is said goes to pytest.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
NEEDED = ("torch", "numpy", "msgspec", "pytest")
TEST_LIMIT_S = 300  # of ten minutes that a borrowed machine may have: half for tests
BENCH_LIMIT_S = 270


def why_nothing_is_run() -> str | None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"this Python ({sys.executable}) has no {', '.join(missing)}: make install-gpu, or "
            "name one that has: make test-gpu GPU_PYTHON=/path/to/python"
        )
    from tests.gpu.rig import why_no_gpu

    return why_no_gpu()


def main(arguments: list[str]) -> int:
    reason = why_nothing_is_run()
    if reason is not None:
        print(f"test-gpu: skipped: {reason}")  # noqa: T201
        return 0
    own = ["-c", str(FOLDER / "gpu.ini"), f"--rootdir={ROOT}", f"--confcutdir={FOLDER}"]
    to_pytest = [argument for argument in arguments if argument != "--no-bench"]
    tests = [sys.executable, "-m", "pytest", *own, *(to_pytest or [str(FOLDER)])]
    code = subprocess.run(tests, cwd=ROOT, timeout=TEST_LIMIT_S, check=False).returncode
    if "--no-bench" in arguments:
        return code
    bench = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    return code or subprocess.run(bench, cwd=ROOT, timeout=BENCH_LIMIT_S, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
