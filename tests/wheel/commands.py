"""Commands that must succeed; one that does not says why."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

TAIL_CHARS = 3_000  # of what a command that failed has said
# What would lead Python to other code than that of the environment that it belongs to.
MISLEADING = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class CommandError(Exception):
    """A command failed; the text has the end of what it said."""


def run(words: Sequence[str], *, limit_s: float, cwd: Path | None = None) -> str:
    """What it has printed. Raises CommandError."""
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={name: value for name, value in os.environ.items() if name not in MISLEADING},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise CommandError(f"{shlex.join(words)} did not end within {limit_s:.0f} s") from exc
    if done.returncode:
        said = (done.stdout + done.stderr)[-TAIL_CHARS:]
        raise CommandError(f"{shlex.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout
