"""`python -m tests.wheel`: what is done on stderr, its result as one line of JSON on stdout.

Exit codes: 0 all is as it has to be; 1 not, each problem on stderr.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engines import ROOT
from tests.wheel.building import Built, build, problems
from tests.wheel.clean import make_clean, oldest, pinned
from tests.wheel.commands import CommandError
from tests.wheel.sources import copy_sources

DIST = ROOT / "dist"
TORCH = "torch"  # NIXL wants it. The lock's is a CPU build where pip was told of one (README)
# PyPI's, beside the CPU build of torch: see README.
BROKEN_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
# What each extra must make possible; all of them can be loaded without a GPU.
PLUGIN = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.engine.core import EngineCore
EngineCore.kvray_attach
"""
EXTRAS = {
    "cpu": PLUGIN,
    "vllm": PLUGIN,
    "serve": "from ray.serve.llm import LLMConfig; from kvray.serve import enable, KVRayRouter; "
    "enable(LLMConfig(model_loading_config={'model_id': 'm'}))",
    "cuda12": "import cupy",
    "cuda13": "import cupy",
    "dev": "import build, twine, pytest, hypothesis, mypy, playwright",
}

_begun_s = time.monotonic()


def say(line: str) -> None:
    sys.stderr.write(f"{time.monotonic() - _begun_s:5.0f} s  {line}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wheel")
    parser.add_argument("--extra", action="append", default=[], choices=[*EXTRAS], metavar="NAME")
    options = parser.parse_args(arguments)
    found: list[str] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kvray-wheel-") as scratch:
        folder = Path(scratch)
        sources = folder / "sources"
        copy_sources(sources)
        try:
            result |= try_all(sources, options.extra, folder, found)
        except CommandError as exc:
            found.append(str(exc))
    for problem in found:
        say(problem)
    result["problems"] = len(found)
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if found else 0


def try_all(sources: Path, extras: Sequence[str], folder: Path, found: list[str]) -> dict[str, Any]:
    """found: what is wrong is added there. Raises CommandError where nothing can go on."""
    say("python -m build")
    built = build(sources, DIST)
    found += problems(built, sources, folder / "direct")
    environments = {"base": try_base(built, folder, found)}
    for extra in extras:
        environments[extra] = try_extra(built, extra, folder, found)
    return {
        "wheel": built.wheel.name,
        "files": len(built.files()),
        "environments": environments,
    }


def try_base(built: Built, folder: Path, found: list[str]) -> dict[str, Any]:
    """Without an extra; then with the oldest of each package that kvray says to run with."""
    clean = make_clean(folder / "base")
    torch = [pinned(TORCH)]
    say(f"pip install {built.wheel.name}")
    clean.install(str(built.wheel), constraints=torch)
    packages = clean.packages()
    say(f"{len(packages)} packages; kvray without vLLM, and a cluster from nothing to nothing")
    looks = clean.doors()
    found += looks["problems"]
    say("what mypy sees of it")
    found += clean.types()
    bounds = oldest(built.requirements())
    say(f"again with {', '.join(bounds)}")
    clean.install(str(built.wheel), *bounds, constraints=torch)
    again = clean.doors("--cluster-only")
    found += [f"with the oldest packages: {problem}" for problem in again["problems"]]
    return {"packages": len(packages), "looks": looks["tried"], "looks_with_oldest": again["tried"]}


def try_extra(built: Built, extra: str, folder: Path, found: list[str]) -> dict[str, Any]:
    """As pip resolves it here today."""
    clean = make_clean(folder / extra)
    say(f"pip install '{built.wheel.name}[{extra}]'")
    try:
        clean.install(f"{built.wheel}[{extra}]")
        clean.check()
        packages = clean.packages()
        if packages[TORCH].endswith("+cpu"):
            clean.uninstall(*(name for name in BROKEN_ON_CPU if name in packages))
        clean.loads(EXTRAS[extra])
    except CommandError as exc:
        found.append(f"{extra}: {exc}")
        return {}
    return {"packages": len(packages)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
