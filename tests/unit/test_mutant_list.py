"""Goal: the list of planted bugs follows the code; a bug that can not be planted tests nothing.

Method: the text that each of them changes is looked for where it is to be; what its check makes of
it is for python -m tests.mutants.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.mutants.bugs import BUGS
from tests.mutants.mutant import Mutant


@pytest.mark.parametrize("mutant", BUGS, ids=[mutant.name for mutant in BUGS])
def test_it_can_be_planted(mutant: Mutant) -> None:
    spec = find_spec(mutant.module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    for old, new in mutant.edits:
        assert source.count(old) == 1, f"{mutant.module} has this {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    compile(source, spec.origin, "exec")


def test_each_has_a_name_of_its_own() -> None:
    names = [mutant.name for mutant in BUGS]
    assert len(set(names)) == len(names)
