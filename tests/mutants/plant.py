"""python -m tests.mutants.plant NAME CHECK...: plants one bug in this process, then runs the check.

The source of one module is changed while it is loaded, before anything else imports it. A text that
is not there exactly once ends it with ANCHOR_LOST: the list of bugs has to follow the code.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.mutants.bugs import BUGS
from tests.mutants.mutant import Mutant

ANCHOR_LOST = 77


class _Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module with the bug in it."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant_name = mutant.name  # for processes that a test starts: see command
        self._name = mutant.module
        self._edits = mutant.edits

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        path = Path(str(module.__file__))
        source = path.read_text()
        for old, new in self._edits:
            if source.count(old) != 1:
                sys.stderr.write(f"{path.name} has this {source.count(old)} times:\n{old}\n")
                sys.exit(ANCHOR_LOST)
            source = source.replace(old, new)
        try:
            exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 (what it is for)
        except Exception:  # noqa: BLE001 (a bug that can not even be loaded is none)
            traceback.print_exc()
            sys.exit(ANCHOR_LOST)


def command(module: str) -> list[str]:
    """That runs a module in another process, with the bug that is planted in this one, if any."""
    for finder in sys.meta_path:
        if (name := getattr(finder, "mutant_name", None)) is not None:
            return [sys.executable, "-m", "tests.mutants.plant", name, module]
    return [sys.executable, "-m", module]


def main() -> None:
    (mutant,) = (mutant for mutant in BUGS if mutant.name == sys.argv[1])
    assert not [name for name in sys.modules if name.startswith("kvray.core")]
    sys.meta_path.insert(0, _Planter(mutant))
    module, *arguments = sys.argv[2:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
