"""Goal: of a link over a real network the doctor says by which interface bytes came and how fast,
and of one that is silent that nothing came; a measurement that hangs takes nothing from the next.

Method: two nodes in two network namespaces, joined by TCP. The interface's own counters, on the
other side of it, say what really went over it. A Ray cluster of its own, so a module of its own.
"""

import pytest
import ray

from benchmarks.fault_link import NAMESPACE
from kvray.core.way import Outcome, Way
from kvray.node.measuring import DEADLINE_MS
from kvray.watch.doctor import Grade, diagnose
from tests.namespaces import Namespaces
from tests.ray_nodes import Nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(240)]

MAX_OVERHEAD = 1.1  # of TCP and UCX: a header of 66 bytes and acknowledgements


def test_a_link_over_tcp_is_measured_and_its_interface_is_named(
    split: Nodes, net: Namespaces
) -> None:
    before = net.carried_bytes(NAMESPACE, "data")
    links = split.cluster.measure_links()
    went_bytes = net.carried_bytes(NAMESPACE, "data") - before

    here, there = sorted(links, key=lambda link: split.node_ids.index(link.node_id))
    # Node 0 shares its network with the bridge, which counts as well.
    assert here.way is Way.TCP
    assert set(here.devices) <= {net.own_device("data"), *net.bridge_devices(NAMESPACE, "data")}
    assert here.devices
    assert (there.way, there.devices) == (Way.TCP, (net.device("data"),))
    read_bytes = here.read_bytes + there.read_bytes
    assert read_bytes <= went_bytes <= MAX_OVERHEAD * read_bytes
    said = [f.text for f in diagnose(split.cluster.status(), links) if " - " in f.check]
    assert len(said) == 1
    for link in links:
        print(link)  # noqa: T201 (figures for whoever runs this with -s)
        assert link.latency_us > 0
        assert link.gb_per_s > 0
        assert f"tcp ({link.devices[0]}" in said[0]


def test_a_link_that_is_silent_is_late_and_is_measured_again_when_it_is_healed(
    split: Nodes, net: Namespaces
) -> None:
    store, peer = split.store(0), split.node_ids[1]
    net.cut(NAMESPACE, "data")
    try:
        # TCP may give the connection up first, which is another good answer.
        answer = ray.get(store.measure_link.remote(peer, is_far=False), timeout=60)
        assert answer["outcome"] in (Outcome.LATE, Outcome.FAILED), answer
        assert answer["reason"]
        links = split.cluster.measure_links()
        bad = [f for f in diagnose(split.cluster.status(), links) if f.grade is Grade.BAD]
        assert any("reads nothing" in finding.text for finding in bad)
    finally:
        net.heal(NAMESPACE, "data")

    def is_measured() -> bool:
        answer = ray.get(store.measure_link.remote(peer, is_far=False), timeout=60)
        return bool(answer["outcome"] == Outcome.MEASURED)

    wait_until(is_measured, what="a measurement of the healed link", limit_s=4 * DEADLINE_MS / 1e3)
    link = split.status(0)["link"]
    assert link["measures_in_flight"] == 0
