"""Copies of what git knows of this checkout, and of what it would be asked to know."""

import shutil
import subprocess
from pathlib import Path

from tests.engines import ROOT

LIST_LIMIT_S = 30.0


def copy_sources(target: Path, *, kvray: bool = True) -> None:
    """Nothing that was built or cached comes along. kvray: with its package."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIST_LIMIT_S,
        check=True,
    )
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and (kvray or not name.startswith("kvray/")):  # it may have been removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
