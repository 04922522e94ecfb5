"""Goal: a link that is cut in the middle of a read costs that request its deadline and the others
nothing, and is used again as soon as it is healed.

Method: the fault of benchmarks/fault_link.py. It starts a Ray cluster of its own, in two network
namespaces, so it is in a module of its own: no other cluster of this process may be up.
"""

from pathlib import Path

import pytest

from benchmarks import fault_link
from benchmarks.fault_load import make_controls
from tests.faults import require

pytestmark = [pytest.mark.heavy, pytest.mark.engine, pytest.mark.slow]


def test_a_link_that_was_cut_is_used_again_when_it_is_healed(tmp_path: Path) -> None:
    controls = make_controls(tmp_path)
    report = require(lambda: fault_link.link_cut(tmp_path, controls))
    if report.skipped is not None:
        pytest.skip(report.skipped)
