"""Goal: a network that goes silent in the middle of a read ends the read soon, and one that is back
is used soon: an abandoned read holds its slots until it has ended.

Method: a reader and an owner in two network namespaces, over TCP, with the data network cut.
"""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from tests.namespaces import NamespacesError, namespaces

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        metadata.version("nixl").startswith("1.3."),
        reason="the UCX of NIXL 1.3.2 has no UCX_TCP_USER_TIMEOUT: such a read ends when the "
        "network is back",
    ),
]

SILENT_LIMIT_MS = 4_000  # UCX_TCP_USER_TIMEOUT is 1.5 s, and TCP looks at it when it sends again
HEALED_LIMIT_MS = 3_000


@pytest.fixture(autouse=True)
def _namespaces_are_allowed() -> None:
    try:
        with namespaces("b"):
            pass
    except NamespacesError as exc:
        pytest.skip(f"no network namespaces here: {exc}")


def test_a_read_over_a_silent_network_ends_and_a_healed_one_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.silent_link"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == "DONE"
    assert found["during"] == "FAILED", found
    assert found["silent_ms"] < SILENT_LIMIT_MS, found
    assert found["after"] == "DONE", found
    assert found["healed_ms"] < HEALED_LIMIT_MS, found
