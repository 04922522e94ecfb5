"""A clean environment: what pip brings with the wheel, and nothing of this checkout.

clean = make_clean(folder)
clean.install(f"{wheel}[cpu]")          pip, as people type it
clean.doors()                           what kvray says and does there
clean.types()                           what a type checker sees of it
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import ROOT
from tests.wheel.commands import CommandError, run

PIP_LIMIT_S = 900.0  # the extra `serve` brings four gigabytes
STEP_LIMIT_S = 300.0
LOCK = ROOT / "requirements" / "lock-vllm-0.32.txt"
# Ray looks for clusters among all processes of a machine, and none of another is meant here.
# bash: the first process there has to reap what others leave.
ALONE = (
    *("unshare", "--kill-child", "--fork", "--pid", "--mount-proc"),
    *("bash", "-c", '"$@"; exit', "bash"),
)
DOORS = Path(__file__).with_name("doors.py")

# A user's file, and of each line that is marked what mypy says of it.
USE = """\
import kvray
from kvray.serve import enable

reveal_type(kvray.attach)  # Revealed type is "def (llm: Any, config: kvray.config.Config | None
reveal_type(kvray.start(slab_bytes=1 << 30))  # Revealed type is "kvray.cluster.Cluster"
reveal_type(kvray.connect().status().nodes[0].node_id)  # Revealed type is "str"
reveal_type(kvray.Attachment.stats)  # -> kvray.api.AttachmentStats"
kvray.attach()  # Missing positional argument "llm" in call to "attach"
kvray.start(deadline_s="soon")  # incompatible type "str"; expected "float"
kvray.connect().statu()  # "Cluster" has no attribute "statu"
enable()  # Missing positional argument "config" in call to "enable"
kvray.atach  # Module has no attribute "atach"
"""


@dataclass(frozen=True)
class Clean:
    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def install(self, *wanted: str, constraints: Sequence[str] = ()) -> None:
        """Raises CommandError."""
        limits = self.folder / "constraints.txt"
        limits.write_text("".join(f"{line}\n" for line in constraints))
        words = ["install", "-q", "--no-input", "--disable-pip-version-check", "-c", str(limits)]
        self._python("-m", "pip", *words, *wanted, limit_s=PIP_LIMIT_S)

    def uninstall(self, *names: str) -> None:
        self._python("-m", "pip", "uninstall", "-q", "-y", "--disable-pip-version-check", *names)

    def loads(self, script: str) -> None:
        """Raises CommandError if it does not run."""
        self._python("-I", "-c", script)

    def packages(self) -> dict[str, str]:
        listed = self._python("-m", "pip", "list", "--format=json", "--disable-pip-version-check")
        return {row["name"]: row["version"] for row in json.loads(listed)}

    def check(self) -> None:
        """That all requirements agree with each other. Raises CommandError."""
        self._python("-m", "pip", "check", "--disable-pip-version-check")

    def doors(self, *options: str) -> dict[str, Any]:
        """{"tried", "problems"} of doors.py; pip's own look at the environment first.
        Raises CommandError.
        """
        self.check()
        words = [self.python, "-I", str(DOORS), *options]
        with contextlib.suppress(CommandError):
            run([*ALONE, "true"], limit_s=STEP_LIMIT_S)
            words = [*ALONE, *words]
        said = run(words, cwd=self.folder, limit_s=STEP_LIMIT_S)
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found

    def types(self) -> Iterator[str]:
        """What mypy sees of the installed kvray, where it is not what it should be."""
        source = self.folder / "use.py"
        source.write_text(USE)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "mypy", "--python-executable", self.python),
                *("--config-file=", f"--cache-dir={self.folder}/mypy", str(source)),
            ],
            cwd=self.folder,  # where no kvray lies about
            env={},
            capture_output=True,
            text=True,
            timeout=STEP_LIMIT_S,
            check=False,
        )
        said = re.findall(r"use\.py:(\d+): \w+: (.*)", done.stdout)
        wanted = {n: line.partition("  # ")[2] for n, line in enumerate(USE.splitlines(), start=1)}
        for number, text in wanted.items():
            found = [words for line, words in said if int(line) == number]
            if bool(found) != bool(text) or not any(text in words for words in found or [""]):
                yield f"mypy, line {number}: expected {text!r}, found {found} {done.stderr}"

    def _python(self, *words: str, limit_s: float = STEP_LIMIT_S) -> str:
        return run([self.python, *words], cwd=self.folder, limit_s=limit_s)


def make_clean(folder: Path) -> Clean:
    run([sys.executable, "-m", "venv", str(folder)], limit_s=STEP_LIMIT_S)
    return Clean(folder)


def pinned(name: str) -> str:
    """A package as the lock has it."""
    [line] = [line for line in LOCK.read_text().splitlines() if line.startswith(f"{name}==")]
    return line


def oldest(requirements: Sequence[str]) -> list[str]:
    """The lower bounds of what kvray itself needs, as exact versions. Ray and NIXL come in one
    release each that suits a vLLM, and are chosen by that.
    """
    found = [
        re.match(r"([\w.-]+)[^;]*>=([\w.]+)", line) for line in requirements if ";" not in line
    ]
    bounds = {match[1]: match[2] for match in found if match is not None}
    return [f"{name}=={bound}" for name, bound in bounds.items() if name not in ("ray", "nixl")]
