"""Goal: a NodeStore that comes back is not held up by torch, which it does not use.

Method: whatever torch is installed here, a process of its own loads the link and says what else it
has loaded.
"""

import subprocess
import sys
from importlib.metadata import version

import pytest

WHAT_IS_LOADED = """
import sys
from kvray.link.nixl import NixlLink
link = NixlLink("here")
assert link.metadata
link.close()
print(sorted({"nixl", "nixl_cu12", "nixl_cu13", "torch"} & set(sys.modules)))
"""


@pytest.mark.skipif(version("nixl") == "1.3.2", reason="NIXL 1.3.2 imports torch itself")
def test_the_link_works_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHAT_IS_LOADED], capture_output=True, text=True, check=True
    )
    assert "torch" not in done.stdout
    assert "nixl" in done.stdout


def test_where_torch_is_loaded_already_nixl_chooses_by_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import torch{WHAT_IS_LOADED}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'nixl'" in done.stdout
