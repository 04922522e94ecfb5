"""Goal: `ray up` with ray_cluster.yaml makes a cluster that shares blocks, `ray down` ends it all.

Method: the story of tests/cluster, on hosts made of namespaces. Its module holds no Ray of its own.
"""

import pytest

from tests.cluster.hosts import HostsError
from tests.cluster.story import play

pytestmark = [pytest.mark.heavy, pytest.mark.slow]


@pytest.mark.timeout(800)  # two and a half minutes on a quiet machine
def test_a_cluster_from_ray_up_to_ray_down() -> None:
    try:
        result = play()
    except HostsError as exc:
        pytest.skip(str(exc))
    assert not result.problems()
