"""What kvray says where it is installed and what it needs is not.

    python -I doors.py [--cluster-only]

Runs with the Python of a clean environment, which has no tests; imports nothing of this package.
Prints {"tried": N, "problems": [...]} as its last line.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

COMMAND_LIMIT_S = 120.0  # `kvray start` begins Ray and two actors, on a busy machine
SLAB = ("--slab-bytes", "16 MiB", "--set", "extent_bytes=1 MiB")
CLUSTER = ("--cluster", "clean")
HIDE = "import sys; sys.modules[{package!r}] = None; "
RAISES = """
import kvray
try:
    {call}
except kvray.KVRayError as exc:
    print(type(exc).__name__, exc)
"""
LIGHT = """
import sys, kvray
print(sorted(set(sys.modules) & {"ray", "nixl", "vllm", "torch", "pandas"}))
"""
# (what is called, a package that is hidden, what is said)
SAYS = (
    ("kvray.attach(None)", "vllm", "MissingPackageError kvray.attach needs vLLM"),
    ("kvray.attach(None)", "vllm", "pip install 'vllm==0.32.0' 'nixl==1.5.1'"),
    ("kvray.enable()", "vllm", "MissingPackageError kvray.enable needs vLLM"),
    (
        "import kvray.serve; kvray.serve.enable(None)",
        "ray.serve.llm",
        "pip install 'ray[llm]~=2.60",
    ),
    ("from kvray.serve import KVRayRouter", "starlette", 'pip install "ray[serve]"'),
    ("kvray.start()", "ray", "MissingPackageError kvray.start needs the package 'ray'"),
    ("kvray.start()", "ray", "pip install 'ray[default]<2.61,>=2.60'"),
    ("kvray.attach(None)", "ray", "MissingPackageError kvray.attach needs the package 'ray'"),
    ("import kvray.serve; kvray.serve.enable(None)", "ray", "kvray.serve.enable needs the package"),
    ("kvray.Config.parse({'slab_byte': 1})", "ray", "did you mean 'slab_bytes'"),
    ("import ray; ray.__version__ = '2.59.0'; kvray.start()", "", "install 'ray[default]~=2.60.0'"),
)
COMMAND = "from kvray.watch.__main__ import main; sys.argv = ['kvray', 'status']; main()"


class Tried:
    def __init__(self, folder: Path) -> None:
        self.count = 0
        self.problems: list[str] = []
        (folder / "ray").mkdir()
        # Of Ray and of kvray: no other cluster is found by what it has noted.
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "RAY_TMPDIR": str(folder / "ray"),
            "KVRAY_RUNTIME_DIR": str(folder / "run"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "COLUMNS": "400",
        }
        self._folder = folder

    def look(self, what: str, found: str, wanted: str) -> None:
        self.count += 1
        if wanted not in found:
            self.problems.append(f"{what}: expected {wanted!r}, found {found!r}")

    def python(self, script: str) -> str:
        return self._run(sys.executable, "-I", "-c", script)

    def kvray(self, *words: str) -> str:
        return self._run(str(Path(sys.executable).parent / "kvray"), *words)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        return f"{done.stdout}{done.stderr}exit code {done.returncode}"


def look_at_all(tried: Tried) -> None:
    tried.look("where kvray is", tried.python("import kvray; print(kvray.__file__)"), sys.prefix)
    tried.look(
        "its version", tried.python("import kvray; print(kvray.__version__)"), version("kvray")
    )
    tried.look("what it loads", tried.python(LIGHT), "[]")
    for call, package, said in SAYS:
        hidden = HIDE.format(package=package) if package else ""
        tried.look(call, tried.python(hidden + RAISES.format(call=call)), said)
    typed = tried.python(HIDE.format(package="ray") + COMMAND)
    tried.look("kvray without Ray", typed, "needs the package 'ray'")
    tried.look("kvray without Ray", typed, "exit code 1")
    tried.look("kvray without a cluster", tried.kvray("status"), "`kvray start` begins one")
    if importlib.util.find_spec("vllm") is None:
        tried.look("enable", tried.python(RAISES.format(call="kvray.enable()")), "needs vLLM")


def run_a_cluster(tried: Tried) -> None:
    """From nothing to nothing, with the command that pip has made."""
    try:
        begun = tried.kvray("start", *SLAB, *CLUSTER, "--json")
        tried.look("kvray start", begun, "exit code 0")
        status = tried.kvray("status", *CLUSTER, "--json")
        tried.look("kvray status", status, '"ready"')
        page_url = json.JSONDecoder().raw_decode(status)[0]["page_url"]
        for name, text in (("", "<html"), ("page.css", "{"), ("page.js", "function")):
            with urllib.request.urlopen(page_url + name, timeout=10) as answer:  # noqa: S310 (ours)
                tried.look(f"the page's {name}", answer.read().decode(), text)
        tried.look("kvray doctor", tried.kvray("doctor", *CLUSTER), "no engine is attached")
    finally:
        tried.look("kvray stop", tried.kvray("stop", *CLUSTER), "exit code 0")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kvray-", dir="/tmp") as folder:  # short: sockets
        tried = Tried(Path(folder))
        if "--cluster-only" not in sys.argv:
            look_at_all(tried)
        run_a_cluster(tried)
    sys.stdout.write(json.dumps({"tried": tried.count, "problems": tried.problems}) + "\n")


if __name__ == "__main__":
    main()
