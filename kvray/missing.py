"""What is said where a package is missing: who needs it, and how it is installed.

kvray's own dependencies are missing after `pip install --no-deps`, and where another Python runs
than the one that kvray was installed for. vLLM and Ray Serve LLM are no dependencies: which of them
is needed, and for which device, only the user knows.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires

from kvray.errors import MissingPackageError


def missing_package(door: str, exc: ImportError) -> MissingPackageError:
    """door: what was asked for, as it is typed. exc: what its import raised."""
    name = (exc.name or "").partition(".")[0]
    if not name:
        return MissingPackageError(f"{door} can not be loaded: {exc}")
    return MissingPackageError(
        f"{door} needs the package {name!r}, which {sys.executable} does not find ({exc}). It is "
        f"needed on every node and client: pip install '{_requirement(name)}'",
        name=exc.name,
    )


def _requirement(name: str) -> str:
    """As kvray's own metadata asks for it, with its bounds; the bare name if it does not."""
    try:
        asked = requires("kvray") or []
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        asked = []
    for requirement in asked:
        words, _, marker = requirement.partition(";")
        if "extra" not in marker and re.split(r"[^\w.-]", words, maxsplit=1)[0] == name:
            return words.strip()
    return name
